# SPDX-License-Identifier: BSD-3-Clause
"""The kernel of the notebook in a link starts with the page, without the browser's program."""

import json
from urllib.parse import quote

import pytest

WELCOME = "Welcome.ipynb"
# The request of JupyterLab for the session, when it has shown the notebook.
REQUEST = {"path": WELCOME, "name": WELCOME, "type": "notebook", "kernel": {"name": "python3"}}
PYTHON3 = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}


def request_page(notebook, path, **headers):
    response = notebook.router.call("GET", notebook.base + quote(path, safe="/?="), headers=headers or notebook.headers)
    return response.status


def sessions(notebook):
    return {session["path"]: session["id"] for session in notebook.get("api/sessions")}


@pytest.mark.parametrize("page", ["lab/tree/", "doc/tree/", "lab/workspaces/mine/tree/"])
def test_jupyterlab_gets_the_session_and_checkpoint_that_began_with_the_page(agent, page):
    notebook = agent.open()
    assert request_page(notebook, page + WELCOME) == 200
    # At once, so that the session is usually being started.
    session = notebook.post("api/sessions", REQUEST)
    assert request_page(notebook, page + WELCOME) == 200
    assert notebook.post("api/sessions", REQUEST)["id"] == session["id"]
    assert session["kernel"]["name"] == "python3" and session["notebook"]["path"] == WELCOME
    agent.wait(lambda: len(notebook.get(f"api/contents/{WELCOME}/checkpoints")) == 1, "JupyterLab's checkpoint")
    assert sessions(notebook) == {WELCOME: session["id"]}
    assert [kernel["id"] for kernel in notebook.get("api/kernels")] == [session["kernel"]["id"]]


def test_a_link_starts_nothing_that_jupyterlab_would_not_start(agent):
    notebook = agent.open()
    kernels = {
        "unnamed": {}, "absent": {"kernelspec": {"name": "none", "display_name": "-"}}, "edited": PYTHON3,
        "größer & kleiner": PYTHON3,
    }
    files = {"broken": "[", "list": "[]"}
    for name, metadata in kernels.items():
        files[name] = json.dumps({"cells": [], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})
    written = notebook.run(f"for name, text in {files!r}.items():\n    open(name + '.ipynb', 'w').write(text)")
    assert written.status == "ok", written
    assert request_page(notebook, f"lab/tree/{WELCOME}", Authorization="token wrong") in (302, 403)
    for path in ("edited.ipynb?factory=Editor", "unnamed.ipynb", "absent.ipynb", "broken.ipynb", "list.ipynb",
                 "missing.ipynb", "größer & kleiner.ipynb"):
        assert request_page(notebook, "lab/tree/" + path) == 200
    # The last is started, and the others were requested before.
    agent.wait(lambda: sessions(notebook), "the last link's kernel")
    assert list(sessions(notebook)) == ["größer & kleiner.ipynb"]
