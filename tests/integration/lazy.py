# SPDX-License-Identifier: BSD-3-Clause
"""Finds the modules that a forked server and kernel import after the fork: none if modules.json is complete."""

from __future__ import annotations

from forked import Slot

COMMAND = "tests/lazy-modules --write"
# The requests of JupyterLab when it opens, and a user's first ones.
PAGES = (
    "/api", "/lab", "/api/contents?content=1", "/api/contents/Welcome.ipynb?content=1", "/api/kernelspecs", "/api/me",
    "/api/status", "/api/sessions", "/api/terminals", "/lab/api/settings", "/lab/api/workspaces",
    "/lab/api/translations", "/lab/api/themes", "/files/Welcome.ipynb", "/api/contents/none.txt?content=0",
    "/lab/tree/Welcome.ipynb", "/lab/api/settings?ids_only=true",
    "/lab/api/settings/@jupyterlab/notebook-extension:panel",
    "/lab/api/translations/default", "/lab/api/build", "/lab/api/workspaces/default", "/api/nbconvert", "/lsp/status",
    "/lab/api/themes/@jupyterlab/theme-light-extension/index.css", "/api/contents/Welcome.ipynb/checkpoints",
    "/api/contents/Welcome.ipynb?type=notebook&content=1&hash=1", "/static/favicons/favicon.ico",
    "/kernelspecs/python3/logo-svg.svg",
)


def imported(slot: Slot) -> dict[str, list[str]]:
    """Modules imported after the fork, by "kernel" and by "server"."""
    before_use = set(slot.call("GET", "/modules")["modules"])
    for page in PAGES:
        try:
            slot.call("GET", page)
        except AssertionError:
            continue  # a response with an error status imports modules too
    slot.call("PUT", "/api/contents/new.txt", {"type": "file", "format": "text", "content": "x"})
    slot.call("POST", "/api/terminals", {})
    session = slot.call("POST", "/api/sessions", {"path": "a.ipynb", "type": "notebook", "name": "a",
                                                  "kernel": {"name": "python3"}})
    slot.call("DELETE", f"/api/sessions/{session['id']}")
    with slot.kernel() as kernel:
        loaded = "sorted(__import__('sys').modules)"
        before = set(eval(kernel.value(loaded)))
        kernel.everything()
        kernel.debug("initialize", clientID="test", adapterID="", pathFormat="path", linesStartAt1=True)
        after = set(eval(kernel.value(loaded)))
    server = set(slot.call("GET", "/modules")["modules"]) - before_use
    return {"kernel": importable(after - before), "server": importable(server)}


def importable(names: set[str]) -> list[str]:
    """Leaves out modules that are created at run time or stand for __main__."""
    return sorted(name for name in names if not name.startswith(("__", "storemagic")))
