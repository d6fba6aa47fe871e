// Runs in a page of JupyterLab before its own scripts: compares each validation of settings with that by a validator of
// JupyterLab that nothing has replaced. window.compared has the plugins, window.different the differences.
(() => {
  const { defineProperty } = Object;
  window.compared = [];
  window.different = [];
  const text = value => JSON.stringify(value, (_, part) =>
    part && typeof part === "object" && !Array.isArray(part) ? Object.fromEntries(Object.entries(part).sort()) : part);
  function compare(validator) {
    const { validateData } = validator;
    const original = new validator.constructor();
    validator.validateData = function (plugin, ...rest) {
      const copy = JSON.parse(JSON.stringify({ ...plugin, data: {} }));
      const errors = validateData.call(this, plugin, ...rest);
      const wanted = original.validateData(copy, ...rest);
      window.compared.push(plugin.id);
      if (Boolean(errors) !== Boolean(wanted) || (!errors && rest[0] !== false && text(copy.data) !== text(plugin.data))) {
        window.different.push(`${plugin.id}: ${text(errors ?? plugin.data)}, not ${text(wanted ?? copy.data)}`);
      }
      return errors;
    };
  }
  Object.defineProperty = function (object, name, descriptor) {
    if (object !== window || name !== "jupyterapp") return defineProperty(object, name, descriptor);
    Object.defineProperty = defineProperty;
    const set = function (app) {
      descriptor.set.call(this, app);
      const plugin = (app.pluginRegistry ?? app)._plugins.get("@jupyterlab/apputils-extension:settings");
      const { activate } = plugin;
      plugin.activate = async (...services) => {
        window.registry = await activate(...services);
        compare(window.registry.validator);
        return window.registry;
      };
    };
    return defineProperty(object, name, { ...descriptor, set });
  };
})();
