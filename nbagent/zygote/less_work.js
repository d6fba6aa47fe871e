// Work of JupyterLab's start that has no effect, or that can be done once instead of many times.

// MathJax is loaded and started for the first Markdown, also for one without mathematics. Each of its delimiters has a
// dollar sign or a backslash.
function typesetMathematics(plugin) {
  const { activate } = plugin;
  plugin.activate = async (...services) => {
    const typesetter = await activate(...services);
    const { typeset } = typesetter;
    typesetter.typeset = function (node) {
      return /[$\\]/.test(node.textContent) ? typeset.call(this, node) : Promise.resolve();
    };
    return typesetter;
  };
}

// All shortcuts are collected, sorted and bound again whenever one of some fifteen plugins has its settings. Here this is
// done once for all plugins of a moment, while the page starts.
const SHORTCUTS = "@jupyterlab/shortcuts-extension:shortcuts", MOMENT_MS = 200;

function bindShortcutsTogether(registry) {
  const { load } = registry, end_ms = performance.now() + NEW_MS;
  let next;
  registry.load = function (id, again = false) {
    if (id !== SHORTCUTS || !again || performance.now() > end_ms) return load.call(this, id, again);
    next ??= new Promise(resolve => setTimeout(resolve, MOMENT_MS)).then(() => {
      next = undefined;
      return load.call(this, id, again);
    });
    return next;
  };
}

// A toolbar searches its items for those that can have the focus at each change of an item, and the search needs the
// page's layout. Here it does so once for all changes before a frame.
function searchToolbarsOnce({ prototype }) {
  const { reduceFocusableElements } = prototype, waiting = new WeakSet();
  if (!reduceFocusableElements) return;
  prototype.reduceFocusableElements = function () {
    this.focusableElements ??= [];
    if (waiting.has(this)) return;
    waiting.add(this);
    requestAnimationFrame(() => {
      waiting.delete(this);
      if (this.isConnected) reduceFocusableElements.call(this);
    });
  };
}
