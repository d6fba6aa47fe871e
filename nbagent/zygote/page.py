# SPDX-License-Identifier: BSD-3-Clause
"""Additions to the source of JupyterLab's page: a sign of progress, and another address for its program.

The page itself has no content: a browser that has the program in its cache needs half a second to run it, and others
some seconds to load it. The sign is a part of the page's source, so that the browser paints it at once, and it is
hidden when the program has made the window, or shows its own sign.

If the first script of the program cannot be loaded from the address of a CDN or an object storage, because that is
down, does not have the image or has changed the script, the page loads the program from the router (`assets.FALLBACK`).

Runs under the image's own Python, 3.9 and up.
"""

from __future__ import annotations

import os
import re
from typing import Any, Callable, Optional, Tuple

from nbagent.zygote.assets import FALLBACK

# The mark of a page of JupyterLab or of an application that is built like it, such as Notebook.
_PAGE = 'id="jupyter-config-data"'
# An error of a script element is seen in the capturing phase only. Nothing has read the configuration before the first
# script, and the new script delays the window's load event, for which the program waits. A CDN that changes a script's
# bytes or type makes it throw instead, and the browser does not tell the file of such an error of another origin.
_OTHER_ADDRESS = f"""<script>{{
  let broken = false;
  const read = () => JSON.parse(document.getElementById("jupyter-config-data").textContent);
  const replace = (event) => {{
    const config = read(), other = config.{FALLBACK}, base = config.fullStaticUrl + "/";
    const failed = String(event.target.src || "");
    if (!other || !failed.startsWith(base)) return;
    removeEventListener("error", onError, true);
    document.removeEventListener("load", onLoad, true);
    document.getElementById("jupyter-config-data").textContent = JSON.stringify(Object.assign(config, other));
    const script = document.createElement("script");
    script.src = other.fullStaticUrl + "/" + failed.slice(base.length);
    document.head.append(script);
  }};
  const onError = (event) => {{
    if (event.target !== window) replace(event);
    else broken ||= !event.filename || event.filename.startsWith(read().fullStaticUrl);
  }};
  const onLoad = (event) => {{
    if (!String(event.target.src || "").startsWith(read().fullStaticUrl)) return;
    document.removeEventListener("load", onLoad, true);
    if (broken) replace(event);
  }};
  addEventListener("error", onError, true);
  document.addEventListener("load", onLoad, true);
}}</script>"""
_SIGN = (
    "<style>#nbagent-sign{color:#616161;display:grid;font:1.1rem/1.6 system-ui,sans-serif;gap:.6em;inset:0;"
    "place-content:center;position:fixed;text-align:center;z-index:-1}"
    "#nbagent-sign i{background:#e6e6e6;border-radius:.2em;height:.3em;width:16em}"
    "#nbagent-sign i::after{animation:nbagent-sign 1.2s ease-in-out infinite alternate;background:#f37726;"
    'border-radius:inherit;content:"";display:block;height:inherit;width:30%}'
    "@keyframes nbagent-sign{to{margin-left:70%}}"
    "body:has(>#main) #nbagent-sign,body:has(>#jupyterlab-splash) #nbagent-sign{display:none}</style>"
    '<div id="nbagent-sign" role="status">Your notebook is opening …<i></i></div>'
)


def _script(*names: str) -> str:
    """A script element with some files of this directory, in one scope."""
    text = ""
    for name in names:
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), name), encoding="utf-8") as file:
            text += file.read()
    # Without the comments, which each page would contain. A regular expression finds only those of whole lines.
    return "<script>(() => {\n" + re.sub(r"(?m)^\s*(//.*)?\n", "", text) + "})();</script>"


_ADDITIONS = (
    (re.compile(r"<head\b[^>]*>"), _OTHER_ADDRESS),
    (re.compile(r"<body\b[^>]*>"), _SIGN),
    (re.compile(re.escape(_PAGE) + r".*?</script>", re.DOTALL),
     _script("settings.js", "first_answers.js", "less_work.js", "boot.js")),
)

Source = Tuple[str, Optional[str], Optional[Callable[[], bool]]]


def install(settings: Any) -> None:
    """Makes the additions to the pages of all applications of a notebook server, by their Jinja environments."""
    for name, environment in settings.items():
        loader = getattr(environment, "loader", None)
        if name.endswith("jinja2_env") and loader is not None:
            loader.get_source = _with_additions(loader.get_source)


def _with_additions(get_source: Callable[[Any, str], Source]) -> Callable[[Any, str], Source]:
    def changed(environment: Any, template: str) -> Source:
        source, name, is_fresh = get_source(environment, template)
        return add(source), name, is_fresh

    return changed


def add(source: str) -> str:
    """The source of a template with the additions, if it is a page of an application."""
    if _PAGE not in source:
        return source
    for element, addition in _ADDITIONS:
        if found := element.search(source):
            source = source[:found.end()] + addition + source[found.end():]
    return source
