# SPDX-License-Identifier: BSD-3-Clause
"""JupyterLab's page before its program runs: a sign of progress instead of an empty window.

The page itself has no content; a browser that has the program in its cache needs half a second to run it, and others
some seconds to load it. The sign is a part of the page's source, so that the browser paints it at once, and it is hidden
when the program has made the window, or shows its own sign.

Runs under the image's own Python, 3.9 and up.
"""

from __future__ import annotations

import re
from typing import Any, Callable, Optional, Tuple

# The mark of a page of JupyterLab or of an application that is built like it, such as Notebook.
PAGE = 'id="jupyter-config-data"'
SPLASH = (
    "<style>#nbagent-splash{color:#616161;display:grid;font:1.1rem/1.6 system-ui,sans-serif;gap:.6em;inset:0;"
    "place-content:center;position:fixed;text-align:center;z-index:-1}"
    "#nbagent-splash progress{accent-color:#f37726;height:.4em;width:16em}"
    "body:has(>#main) #nbagent-splash,body:has(>#jupyterlab-splash) #nbagent-splash{display:none}</style>"
    '<div id="nbagent-splash" role="status">Your notebook is opening …'
    '<progress aria-hidden="true"></progress></div>'
)
_BODY = re.compile(r"<body\b[^>]*>")

Source = Tuple[str, Optional[str], Optional[Callable[[], bool]]]


def install(settings: Any) -> None:
    """Adds the sign to the pages of all applications of a notebook server."""
    for name, environment in settings.items():
        loader = getattr(environment, "loader", None)
        if name.endswith("jinja2_env") and loader is not None:
            loader.get_source = _with_splash(loader.get_source)


def _with_splash(get_source: Callable[[Any, str], Source]) -> Callable[[Any, str], Source]:
    def changed(environment: Any, template: str) -> Source:
        source, name, is_fresh = get_source(environment, template)
        return add(source), name, is_fresh

    return changed


def add(source: str) -> str:
    """The source of a template, with the sign at the begin of a page's body."""
    return _BODY.sub(lambda found: found[0] + SPLASH, source, count=1) if PAGE in source else source
