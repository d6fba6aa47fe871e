// Runs in the page of JupyterLab, after its configuration and before its program. It ends two waits of JupyterLab 4
// early, which are on the way of a link to its notebook, and saves it some work (settings.js, less_work.js). Where an
// object is not as expected, JupyterLab waits and works as usual.
//
// The configuration's exposeAppInBrowser makes the program assign its application to window.jupyterapp when all plugins
// are registered and none is active. Scripts of others find the variable only if the image has set the option itself.
const data = document.getElementById("jupyter-config-data");
const config = JSON.parse(data.textContent);

// A link's notebook is opened after the command that loads the workspace. That command ends when the workspace has
// been saved again, which takes place when it has not changed for half a second. The layout is restored long before.
// Not with one document (/doc), where JupyterLab adds the workspace's other documents if the link's is opened before.
//
// When an empty window changes, JupyterLab opens a launcher. Without the wait the window changes while the link's
// notebook is being opened, so that a launcher waits for that, for a while, and until a person acts.
function openWhenRestored(app) {
  const { commands } = app;
  const { execute } = commands;
  const end = () => (commands.execute = execute);
  let opening = Boolean(config.treePath);
  const opened = () => (opening = false);
  for (const act of ["keydown", "pointerdown"]) addEventListener(act, opened, { capture: true, once: true });
  setTimeout(opened, NEW_MS);
  commands.execute = function (id, ...rest) {
    if (id === "launcher:create" && opening) return Promise.resolve();
    const result = execute.call(this, id, ...rest);
    if (id === "filebrowser:open-path") result.then(end, end);
    if (id !== "apputils:load-statedb") return result;
    if (!opening) end();
    const clones = new URLSearchParams(location.search).has("clone");
    return clones ? result : Promise.race([result, app.restored.then(() => undefined)]);
  };
}

// Two windows may not use the same workspace, so that JupyterLab waits 200 to 500 ms for the response of another
// window, and if there is one, loads its page again with another workspace. A lock is granted at once if no other
// window has this slot's workspace. The window of another slot at the same origin is not one of those; JupyterLab
// would take it for one, because its workspace has the same name.
function takeName(plugin) {
  if (!navigator.locks) return;
  const name = config.workspace || "default";
  // Whether it is granted; then it is held as long as the window has this page.
  const take = options => new Promise(granted => {
    navigator.locks.request(`nbagent ${config.baseUrl} ${name}`, options, lock => {
      granted(lock !== null);
      return lock && new Promise(() => {});
    });
  });
  // A prerendered page gets a lock only when it is shown.
  if (document.prerendering) return void take({});
  const { activate } = plugin;
  plugin.activate = async (...services) => {
    const free = { ifAvailable: true };
    if (await take(free)) return { name };
    // When a page is loaded again, the page before may still have the lock.
    await new Promise(resolve => setTimeout(resolve, 500));
    if (await take(free)) return { name };
    const newValue = `${name}-${Date.now()}`;
    dispatchEvent(new StorageEvent("storage", { key: "@jupyterlab/statedb:StateDB:window", newValue }));
    return activate(...services);
  };
}

const CHANGES = [
  ["apputils-extension:resolver", takeName], ["apputils-extension:settings", quickenSettings],
  ["mathjax-extension:plugin", typesetMathematics],
];

answerFirst();
customElements.whenDefined("jp-toolbar").then(searchToolbarsOnce);
const exposed = String(config.exposeAppInBrowser).toLowerCase() === "true";
data.textContent = JSON.stringify({ ...config, exposeAppInBrowser: "true" });
Object.defineProperty(window, "jupyterapp", {
  configurable: true,
  set(app) {
    delete window.jupyterapp;
    if (exposed) window.jupyterapp = app;
    if (config.mode !== "single-document") openWhenRestored(app);
    const plugins = (app.pluginRegistry ?? app)._plugins;
    for (const [id, change] of CHANGES) {
      const plugin = plugins?.get?.(`@jupyterlab/${id}`);
      if (plugin) change(plugin);
    }
  },
});
