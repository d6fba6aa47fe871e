// JupyterLab requests some thirty answers of the server before it shows a notebook, in chains of up to six. Here most of
// them are requested together, while the browser loads the program, and the program gets each when it requests it: in
// two groups, since those about a notebook are needed later, and then the notebook, which may be large. The program
// sends a request of its own for an answer that the server has left out, after a change of what the answer describes,
// when a person has acted, and when the answer is no longer new.
const NEW_MS = 5000;

// How often JupyterLab 4.6 requests each until the notebook is shown.
const REQUESTED = {
  "api/kernels": 1, "api/kernelspecs": 2, "api/me": 2, "api/sessions": 1, "api/terminals": 1, "lab/api/settings": 1,
  "lab/api/translations": 1, "lab/api/translations/default": 1, "lab/api/workspaces": 1,
  "lab/api/settings/@jupyterlab/codemirror-extension:plugin": 1,
  "lab/api/settings/@jupyterlab/docmanager-extension:plugin": 1,
  "lab/api/settings/@jupyterlab/notebook-extension:panel": 1,
};

function answerFirst() {
  const base = new URL(config.baseUrl, location.href).href, { fetch } = window;
  const headers = config.token ? { Authorization: `token ${config.token}` } : {};
  const get = path => fetch(base + path, { cache: "no-store", headers });
  const responseOf = (answer, url) => {
    const response = new Response(answer[1], { headers: { "Content-Type": answer[0] } });
    return Object.defineProperty(response, "url", { value: url });
  };
  // By path, how often it may still be used, and a function of the URL for a response, undefined without one.
  const left = new Map();
  let before = Promise.resolve();
  const together = group => {
    const query = new URLSearchParams(Object.keys(group).map(path => ["path", path]));
    const answers = before.then(() => get(`api/nbagent/answers?${query}`)).then(
      response => (response.ok ? response.json() : {})).catch(() => ({}));
    for (const [path, times] of Object.entries(group)) {
      left.set(path, { times, respond: async url => (await answers)[path] && responseOf((await answers)[path], url) });
    }
    before = answers;
  };
  together(REQUESTED);
  const notebook = String(config.treePath ?? "");
  if (notebook.endsWith(".ipynb")) {
    const file = `api/contents/${notebook.split("/").map(encodeURIComponent).join("/")}`;
    together({
      [`${file.replace(/\/[^/]*$/, "")}?content=1&hash=0`]: 3, [`${file}?content=0&hash=0`]: 3,
      [`${file}/checkpoints`]: 3, "api/nbconvert": 1, "lab/api/settings?ids_only=true": 1, "lsp/status": 1,
      [`lab/api/workspaces/${encodeURIComponent(config.workspace || "default")}`]: 1,
    });
    const content = `${file}?type=notebook&content=1&hash=1&contentProviderId=undefined`;
    const response = before.then(() => get(content)).catch(() => ({}));
    left.set(content, { times: 1, respond: async () => ((await response).ok ? response : undefined) });
  }
  const end = () => left.clear();
  for (const act of ["keydown", "pointerdown"]) addEventListener(act, end, { capture: true, once: true });
  setTimeout(end, NEW_MS);
  window.fetch = async function (input, ...rest) {
    const send = () => fetch.call(this, input, ...rest);
    if (!left.size || !(input instanceof Request) || rest.length || !input.url.startsWith(base)) return send();
    const path = input.url.slice(base.length).replace(/[?&]\d{13}$/, "");
    if (input.method !== "GET") {
      // Such as api/contents, and lab/api/workspaces.
      const area = /^(?:lab\/)?api\/[^/?]*/.exec(path)?.[0];
      for (const known of left.keys()) if (area && known.startsWith(area)) left.delete(known);
      return send();
    }
    const known = left.get(path);
    if (!known || known.times-- <= 0) return send();
    const response = await known.respond(input.url);
    return response && left.has(path) ? response : send();
  };
}
