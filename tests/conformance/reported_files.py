# SPDX-License-Identifier: BSD-3-Clause
"""Public bug reports about files and notebooks. See reports.py."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from acts import Terminal, cell, kernel_of, notebook_of, put
from reported import reports

from notebook import Kernel, Notebook


@reports("jupyter/docker-stacks#700")
def files_have_the_usual_permissions(user: Notebook) -> Any:
    """Files of notebooks, terminals and uploads have other permissions than on a machine of one's own."""
    put(user, "umask.txt", {"type": "file", "format": "text", "content": "x"})
    put(user, "umask.ipynb", notebook_of("1"))
    terminal = Terminal(user)
    terminal.run("mkdir umask; touch umask/terminal")
    terminal.end()
    with kernel_of(user) as kernel:
        return cell(kernel, """
            import os, shutil
            open("umask/kernel", "w").close()
            os.mkdir("umask/directory")
            names = "umask.txt", "umask.ipynb", "umask", "umask/terminal", "umask/kernel", "umask/directory"
            print([oct(os.stat(name).st_mode) for name in names], oct(os.umask(0o22)))
            shutil.rmtree("umask")""")


@reports("jupyter/notebook#5715", "jupyter/notebook#1631", "jupyter/jupyter#303", "jupyter/notebook#3576")
def files_of_unusual_names_are_saved_renamed_and_downloaded(user: Notebook) -> Any:
    """Names with blanks, percent signs or letters beyond ASCII get 404, or are not renamed."""
    names = ["my file.txt", "100%.txt", "50%20.txt", "über #1?.txt", "文件名.txt", "a+b&c=d.txt", "semi;colon.txt",
             "quote\"'.txt", "~tilde.txt", "x" * 200 + ".txt", "emoji🙂.txt", "[brackets]{}.txt", "trailing .txt"]
    found = []
    for name in names:
        put(user, name, {"type": "file", "format": "text", "content": name})
        path = f"{user.base}files/{quote(name)}?download=1"
        answer = user.router.call("GET", path, headers=user.headers)
        assert answer.status == 200 and answer.body.decode() == name, (name, answer.status)
        found.append(answer.headers["content-disposition"])
        path = f"{user.base}api/contents/{quote(name)}"
        answer = user.router.call("PATCH", path, {"path": "r" + name}, user.headers)
        assert answer.status == 200, (name, answer.status, answer.body[:200])
        assert "r" + name in {one["name"] for one in user.get("api/contents/")["content"]}, name
        answer = user.router.call("DELETE", f"{user.base}api/contents/{quote('r' + name)}", headers=user.headers)
        assert answer.status == 204, (name, answer.status)
    return found


@reports("jupyterlab/jupyterlab#5866", "jupyterlab/jupyterlab#8545", "jupyterlab/jupyterlab#9120")
def a_directory_with_broken_links_is_listed(user: Notebook) -> Any:
    """One broken link, or one file without permission, makes the whole directory unusable."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            import os, socket
            os.makedirs("links/closed")
            os.symlink("nothing", "links/broken")
            os.symlink("loop", "links/loop")
            os.symlink("/root/secret", "links/forbidden")
            os.symlink("..", "links/parent")
            os.mkfifo("links/fifo")
            socket.socket(socket.AF_UNIX).bind("links/socket")
            open("links/good.txt", "w").write("good")
            os.chmod("links/closed", 0)""")
        listed = user.get("api/contents/links")["content"]
        cell(kernel, "import shutil; os.chmod('links/closed', 0o700); shutil.rmtree('links')")
    names = sorted(one["name"] for one in listed)
    assert "good.txt" in names
    return names


@reports("jupyterhub/jupyterhub#5126", "jupyterlab/jupyterlab#7382")
def a_notebook_behind_a_link_is_opened_and_saved(user: Notebook) -> Any:
    """A directory outside of the home that is linked into it is not listed, or its notebooks do not open."""
    with kernel_of(user) as kernel:
        cell(kernel, """
            import os
            os.makedirs("/tmp/outside/deep", exist_ok=True)
            os.symlink("/tmp/outside", "linked")""")
        put(user, "linked/deep/one.ipynb", notebook_of("1 + 1"))
        got = user.get("api/contents/linked/deep/one.ipynb")
        assert got["content"]["cells"][0]["source"] == "1 + 1"
        saved = user.post("api/contents/linked/deep/one.ipynb/checkpoints")
        session = user.post("api/sessions", {"path": "linked/deep/one.ipynb", "name": "one.ipynb", "type": "notebook",
                                             "kernel": {"name": "python3"}})
        with Kernel(user, session["kernel"]["id"]) as inside:
            where = cell(inside, "import os; print(os.path.realpath(os.getcwd()))")
        cell(kernel, "import shutil; os.unlink('linked'); shutil.rmtree('/tmp/outside')")
    return [where, sorted(saved)]


@reports("jupyter/nbformat#52", "jupyter/help#150")
def notebooks_are_opened_and_saved_side_by_side(user: Notebook) -> None:
    """`database is locked` of the signatures' or the history's SQLite file, and requests that hang."""
    for number in range(8):
        put(user, f"side{number}.ipynb", notebook_of("1"))

    def work(number: int) -> None:
        for _ in range(3):
            model = user.get(f"api/contents/side{number}.ipynb")
            put(user, f"side{number}.ipynb", {**notebook_of("2"), "content": model["content"]})
            answer = user.router.call("POST", f"{user.base}api/contents/side{number}.ipynb/trust", {}, user.headers)
            assert answer.status == 201, answer.body[:300]

    began_s = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert time.monotonic() - began_s < 30


@reports("jupyterhub/the-littlest-jupyterhub#693", "jupyter/nbconvert#1594", "jupyter/nbconvert#1167")
def a_notebook_is_exported_and_run_by_nbconvert(user: Notebook) -> Any:
    """Exports get 500, because templates of another user are not readable; `--execute` finds no kernel."""
    put(user, "export.ipynb", notebook_of("print(6 * 7)", "x = 1"))
    found = {}
    for kind in ("html", "script", "markdown", "latex", "slides", "rst", "asciidoc", "notebook", "pdf", "webpdf"):
        path = f"{user.base}nbconvert/{kind}/export.ipynb?download=true"
        found[kind] = user.router.call("GET", path, headers=user.headers).status
    terminal = Terminal(user)
    said = terminal.run("jupyter nbconvert --to html --execute export.ipynb >run.log 2>&1; grep -c '>42' export.html")
    assert "1" in said.splitlines()[-1], (said, user.get("api/contents/run.log")["content"][-800:])
    terminal.end()
    return found


@reports("jupyterlab/jupyterlab#7743", "jupyter/notebook#484")
def the_time_of_a_saved_file_is_that_of_the_next_request(user: Notebook) -> None:
    """`File Changed` appears at each save, because the file's time differs from that in the response."""
    for number in range(5):
        saved = put(user, "times.ipynb", notebook_of(str(number), output="x" * 100000))
        assert saved["last_modified"] == user.get("api/contents/times.ipynb?content=0")["last_modified"]


@reports("jupyterlab/jupyterlab#13108", "jupyterlab/jupyterlab#2049")
def hidden_files_are_as_the_setting_says(user: Notebook) -> Any:
    """Hidden files stay invisible, or get 404."""
    found, file = [], {"type": "file", "format": "text", "content": ""}
    for path, method, body in (
        (".hidden", "PUT", {"type": "directory"}), (".hidden/x.txt", "PUT", file), (".hidden", "GET", None),
        (".ipython", "GET", None), (".x", "PUT", file),
    ):
        answer = user.router.call(method, f"{user.base}api/contents/{path}", body, user.headers)
        found.append([method, path, answer.status])
    return found


@reports("jupyter/notebook#650", "jupyter/notebook#1478", "jupyterhub/jupyterhub#2470", "jupyterhub/jupyterhub#1569")
def a_notebook_of_fifty_megabytes_is_saved(user: Notebook) -> None:
    """A notebook with large outputs gets 413 at the proxy, or `Content-Length too long`."""
    put(user, "large.ipynb", notebook_of("1", output=("y" * 99 + "\n") * 500_000))
    assert user.get("api/contents/large.ipynb?content=0")["size"] > 50_000_000
    with kernel_of(user) as kernel:
        cell(kernel, "import os; os.remove('large.ipynb')")


@reports("jupyterlab/jupyterlab#2819", "jupyterlab/jupyterlab#9923", "jupyterhub/the-littlest-jupyterhub#986")
def a_notebook_in_a_read_only_directory_is_opened(user: Notebook) -> Any:
    """A notebook in a directory without permission to write does not open, because a checkpoint cannot be made."""
    with kernel_of(user) as kernel:
        cell(kernel, "import os; os.makedirs('read-only')")
        put(user, "read-only/one.ipynb", notebook_of("1"))
        cell(kernel, "import shutil; shutil.rmtree('read-only/.ipynb_checkpoints', ignore_errors=True)\n"
                     "os.chmod('read-only/one.ipynb', 0o444); os.chmod('read-only', 0o555)")
        file = "api/contents/read-only/one.ipynb"
        found = []
        for method, path, body in (
            ("GET", f"{file}?content=1", None), ("GET", f"{file}/checkpoints", None),
            ("POST", f"{file}/checkpoints", {}),
            ("PUT", file, notebook_of("2")), ("PATCH", file, {"path": "read-only/two.ipynb"}), ("DELETE", file, None),
            ("POST", "api/contents/read-only", {"type": "notebook"}),
        ):
            answer = user.router.call(method, user.base + path, body, user.headers)
            text = json.loads(answer.body)["message"] if answer.status >= 400 else ""
            found.append((method, answer.status, text))
        cell(kernel, "os.chmod('read-only', 0o755); shutil.rmtree('read-only')")
    assert found[0][1] == 200, found
    return found
