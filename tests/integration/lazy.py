"""What a forked slot and a forked kernel still import when a notebook is worked at: nothing, if the list is right."""

from __future__ import annotations

from forked import Slot

COMMAND = "tests/lazy-modules --write"
# What JupyterLab asks for when it opens, and what a person does first.
PAGES = (
    "/api", "/lab", "/api/contents?content=1", "/api/contents/Welcome.ipynb?content=1", "/api/kernelspecs", "/api/me",
    "/api/status", "/api/sessions", "/api/terminals", "/lab/api/settings", "/lab/api/workspaces",
    "/lab/api/translations", "/lab/api/themes", "/files/Welcome.ipynb", "/api/contents/none.txt?content=0",
)


def imported(slot: Slot) -> dict[str, list[str]]:
    """Modules imported after the fork, by "kernel" and by "server"."""
    at_first = set(slot.call("GET", "/modules")["modules"])
    for page in PAGES:
        try:
            slot.call("GET", page)
        except AssertionError:
            continue  # an answer that says no imports as much
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
    server = set(slot.call("GET", "/modules")["modules"]) - at_first
    return {"kernel": wanted(after - before), "server": wanted(server)}


def wanted(names: set[str]) -> list[str]:
    """Without what is made at run time, or stands for __main__."""
    return sorted(name for name in names if not name.startswith(("__", "storemagic")))
