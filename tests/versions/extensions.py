#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make extensions`: extensions of the notebook server, tried in a forked slot and with a plain `jupyter lab`.

    tests/versions/extensions.py [--only NAME …] [--keep]

One image has all of them, in the form of docker-stacks (versions.py). Each trial does what an extension's page does, by
requests, websockets, cells, and two windows of Chromium; its value has to be the same in a forked slot as with a plain
server of the same files. packaging/docs/extensions.md has the results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / name) for name in ("integration", "conformance", ".", "..")] + [str(HERE)]

import suite
import websocket
from acts import cell, kernel_of, notebook_of, put, user_of

import browser
import versions
from notebook import Notebook
from product import say
from versions import Version

PATH = "/opt/conda/bin:/usr/local/bin:/usr/bin:/bin"
MEMORY = "2G"
# A server of jupyter-server-proxy: its page is its own command line, and /ws returns each message.
ECHO = b"""
import sys, tornado.ioloop, tornado.web, tornado.websocket
class Page(tornado.web.RequestHandler):
    def get(self):
        self.write(" ".join(sys.argv[1:]))
class Echo(tornado.websocket.WebSocketHandler):
    def on_message(self, message):
        self.write_message(message)
tornado.web.Application([("/ws", Echo), (".*", Page)]).listen(int(sys.argv[1]), "127.0.0.1")
tornado.ioloop.IOLoop.current().start()
"""
SETTINGS = {"ServerProxy": {"servers": {"echo": {
    "command": ["/opt/conda/bin/python3", "/usr/local/share/echo.py", "{port}", "{base_url}"], "timeout": 60}}}}
IMAGE = Version(
    "extensions", "stacks", "trixie", "3.13",
    ("jupyterlab==4.6.6", "ipykernel==7.4.0", "jupyterlab-lsp", "python-lsp-server", "jupyter-collaboration",
     "jupyterlab-git", "nbdime", "jupyter-server-proxy", "nbgitpuller", "voila", "jupyter-resource-usage",
     "dask-labextension", "distributed", "ipywidgets", "ipympl", "bokeh", "panel", "jupyter-ai"),
    packages="git",
    files=(("etc/jupyter/jupyter_server_config.json", json.dumps(SETTINGS).encode()),
           ("usr/local/share/echo.py", ECHO)),
)
# A persona of jupyter-ai, as a file of the user: it responds without a model.
PERSONA = """
from jupyter_ai_persona_manager import BasePersona, PersonaDefaults

class Echo(BasePersona):
    @property
    def defaults(self):
        return PersonaDefaults(name="Echo", description="echo", avatar_path="", system_prompt="")

    async def process_message(self, message):
        self.send_message("echo of " + message.body)
"""
# A cell: the tools of jupyter_server_mcp, which listens on a port of its own.
TOOLS = """
from fastmcp import Client
async with Client("http://localhost:3001/mcp") as client:
    print(sorted(tool.name for tool in await client.list_tools()))
"""
BOKEH = """
from bokeh.io import output_notebook
from bokeh.plotting import figure, show
output_notebook(hide_banner=True)
made = figure()
made.line([1, 2], [1, 2])
show(made)
"""
# One request of each page, beside those of the trials below.
REQUESTS: tuple[tuple[str, str, Any], ...] = (
    ("GET", "lab/api/extensions", None), ("GET", "lsp/status", None), ("GET", "server-proxy/servers-info", None),
    ("GET", "git/settings", None), ("POST", "nbdime/api/isgit", {"path": ""}), ("GET", "git-pull?repo=x", None),
    ("GET", "voila", None), ("GET", "dask/clusters", None), ("GET", "api/metrics/v1", None),
    ("GET", "proxy/8766/", None),
)
MACHINE = versions.Machine("extensions")
TRIALS: list[Callable[[Notebook], Any]] = []


def trial(function: Callable[[Notebook], Any]) -> Callable[[Notebook], Any]:
    TRIALS.append(function)
    return function


def call(user: Notebook, method: str, path: str, body: Any = None, timeout: float = 60) -> Any:
    """A request below the server with its token; returns the response."""
    user.router.timeout = timeout
    return user.router.call(method, user.base + path, body, user.headers)


@contextlib.contextmanager
def connected(user: Notebook, path: str) -> Iterator[websocket.WebSocket]:
    """A websocket below the server."""
    socket = websocket.create_connection(
        f"ws://127.0.0.1:{user.router.port}{user.base}{path}", socket=user.host.connect(user.router.port),
        header=[f"Authorization: token {user.token}"], timeout=60)
    try:
        yield socket
    finally:
        socket.close()


@trial
def every_page_responds(user: Notebook) -> Any:
    return {f"{method} {path}": call(user, method, path, body).status for method, path, body in REQUESTS}


@trial
def the_language_server_starts_and_knows_its_capabilities(user: Notebook) -> Any:
    servers = user.get("lsp/status")
    with connected(user, "lsp/ws/pylsp") as socket:
        parameters = {"processId": None, "rootUri": None, "capabilities": {}}
        socket.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": parameters}))
        while (answer := json.loads(socket.recv())).get("id") != 1:
            pass
    return sorted(servers["sessions"]), sorted(answer["result"]["capabilities"])


@trial
def a_server_behind_jupyter_server_proxy_has_its_page_its_address_and_its_websocket(user: Notebook) -> Any:
    page = call(user, "GET", "echo/")
    with connected(user, "echo/ws") as socket:
        socket.send("around")
        echoed = socket.recv()
    # {base_url} in the command is the slot's own path, not the zygote's.
    return page.status, page.body.decode().split()[1:] == [user.base], echoed


@trial
def a_repository_is_made_and_a_file_committed_by_jupyterlab_git(user: Notebook) -> Any:
    with kernel_of(user) as kernel:
        cell(kernel, "import os, subprocess\nos.makedirs('repo', exist_ok=True)\nopen('repo/a.txt', 'w').write('a')\n"
                     "for key in ('name', 'email'):\n    subprocess.run(['git', 'config', '--global', f'user.{key}',"
                     " 'x@example.org'], check=True)")
    found = []
    for step, body in (("init", {}), ("add", {"add_all": False, "filename": "a.txt"}), ("status", {}),
                       ("commit", {"commit_msg": "first"}), ("log", {"history_count": 2})):
        answer = call(user, "POST", f"git/repo/{step}", body)
        document = answer.json()
        found.append((step, answer.status, document.get("code")))
        if step == "status":
            found.append(("files", [(one["x"], one["to"]) for one in document.get("files", ())]))
        if step == "log":
            found.append(("commits", [one["commit_msg"] for one in document.get("commits", ())]))
    return found


@trial
def a_repository_is_pulled_by_nbgitpuller(user: Notebook) -> Any:
    with kernel_of(user) as kernel:
        cell(kernel, """
            import subprocess
            script = '''set -e
            rm -rf origin copy; git init -qb main origin; cd origin; echo x > lesson.txt; git add .
            git -c user.name=x -c user.email=x@example.org commit -qm first'''
            subprocess.run(["sh", "-c", script], check=True)""")
    query = f"repo={quote('/home/jovyan/origin', safe='')}&branch=main&targetpath=copy"
    answer = call(user, "GET", f"git-pull/api?{query}")
    phases = [json.loads(line[6:])["phase"] for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    return answer.status, phases[-1:], call(user, "GET", "api/contents/copy/lesson.txt").status


@trial
def a_notebook_is_rendered_by_voila(user: Notebook) -> Any:
    put(user, "shown.ipynb", notebook_of("print('value', 6 * 7)"))
    answer = call(user, "GET", "voila/render/shown.ipynb", timeout=120)
    return answer.status, "value 42" in answer.body.decode()


@trial
def a_shared_document_gets_a_session(user: Notebook) -> Any:
    put(user, "shared.ipynb", notebook_of("1 + 1"))
    answer = call(user, "PUT", "api/collaboration/session/shared.ipynb", {"format": "json", "type": "notebook"})
    document = answer.json()
    known = call(user, "GET", "api/fileid/id?path=shared.ipynb").json()
    return answer.status, sorted(document), known.get("id") == document["fileId"]


@trial
def jupyter_ai_starts_and_a_persona_of_the_user_responds(user: Notebook) -> Any:
    page = call(user, "GET", "lab").body.decode()
    config = json.loads(re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    with kernel_of(user) as kernel:
        cell(kernel, "import os\nos.makedirs('.jupyter/personas', exist_ok=True)\n"
                     f"open('.jupyter/personas/echo_persona.py', 'w').write({PERSONA!r})")
        tools = cell(kernel, TOOLS).strip()
    answer = call(user, "POST", "api/ai/message/Echo", {"message": "hello"})
    settings = {key: config[key] for key in sorted(config) if re.search("rtc|live|ai_|collab", key, re.I)}
    return call(user, "GET", "jupyter-ai-router/health").status, settings, tools, answer.status, answer.json()


@trial
def the_figures_of_resource_usage_have_the_kernels_and_the_limit(user: Notebook) -> Any:
    with kernel_of(user) as kernel:
        cell(kernel, "kept = bytearray(b'x') * (300 << 20)")
        figures = user.get("api/metrics/v1")
        used = user.get(f"api/metrics/v1/kernel_usage/get_usage/{kernel.id}")["content"]
    memory = max(figures.get("rss") or 0, figures.get("pss") or 0)
    limit = figures.get("limits", {}).get("memory", {}).get("rss")
    if "/user/" in user.base:
        assert limit == 2 << 30, figures
        assert used["host_virtual_memory"]["total"] == 2 << 30, used
    return memory > 300 << 20, used["kernel_memory"] > 300 << 20


@trial
def dask_computes_in_the_kernel_and_in_a_cluster_of_the_page(user: Notebook) -> Any:
    with kernel_of(user) as kernel:
        total = cell(kernel, """
            from dask.distributed import Client
            with Client(processes=False, dashboard_address=None) as client:
                print(client.submit(sum, [1, 2, 3]).result())""", 120).split()[:1]
    made = call(user, "PUT", "dask/clusters", {}, timeout=120)
    name = made.json().get("id")
    workers = call(user, "GET", f"dask/clusters/{name}").json().get("workers")
    ended = call(user, "DELETE", f"dask/clusters/{name}", timeout=120).status
    return total, made.status, workers, ended


@trial
def widgets_and_figures_are_displayed(user: Notebook) -> Any:
    found = {}
    with kernel_of(user) as kernel:
        for name, code in (
            ("ipywidgets", "import ipywidgets; ipywidgets.IntSlider(3)"),
            ("ipympl", "%matplotlib widget\nimport matplotlib.pyplot as plt\nfigure = plt.figure(); figure.canvas"),
            ("bokeh", BOKEH),
            ("panel", "import panel; panel.extension(); panel.Column('text')"),
        ):
            result = kernel.run(code, 120)
            found[name] = (result.status, sorted(result.data))
    return found


@trial
def two_windows_edit_one_notebook(user: Notebook) -> Any:
    model = notebook_of("1 + 1")
    model["content"]["metadata"]["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    put(user, "both.ipynb", model)
    url = f"http://127.0.0.1:{{}}{user.base}lab/tree/both.ipynb?reset&token={user.token}"
    with contextlib.ExitStack() as stack:
        port = user.host.forward(user.router.port, 0)
        pages = []
        for _ in range(2):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            pages.append(stack.enter_context(browser.chromium(directory)))
            pages[-1].open(url.format(port))
        for page in pages:
            page.wait_for_kernel()
        for number, (page, other) in enumerate((pages, pages[::-1])):
            page.select_first_cell()
            page.type(f"  # typed by {number}")
            other.read(".jp-CodeCell .cm-content", f"# typed by {number}")
        pages[0].run_cell()
        pages[1].read(".jp-OutputArea-output", "2")
    return True


def tried(user: Notebook, function: Callable[[Notebook], Any]) -> Any:
    """The value of a trial, or the text of its error."""
    began_s = time.monotonic()
    try:
        value = function(user)
    except Exception as error:
        value = f"{type(error).__name__}: {str(error)[:800]}"
        say("".join(traceback.format_exception(error)[-3:]))
    say(f"{user.base}: {function.__name__}: {value} in {time.monotonic() - began_s:.1f} s")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[function.__name__ for function in TRIALS], default=[])
    parser.add_argument("--keep", action="store_true", help="leave the host up, and use one that is up")
    options = parser.parse_args()
    wanted = [function for function in TRIALS if not options.only or function.__name__ in options.only]
    faults = []
    with versions.agent_for([IMAGE], options.keep, MACHINE) as agent, versions.imported(agent, IMAGE):
        versions.wait_for_zygote(agent, IMAGE.name)
        root = next(one["root"] for one in json.loads(agent.run("nbagent", "image", "list", "--json"))
                    if one["name"] == IMAGE.name)
        done = agent.host.run(["nbagent", "image", "check", IMAGE.name], check=False, timeout=600)
        sys.stdout.write(done.stdout)
        slot = agent.open(image=IMAGE.name, memory=MEMORY)
        if (launch := agent.api.get(f"/slots/{slot.slot}").json())["launch"] != "fork":
            faults.append(f"not forked: {launch['launch_reason']}")
        with suite.plain(agent.host, root, PATH) as server:
            plain = user_of(server)
            for function in wanted:
                expected, found = tried(plain, function), tried(slot, function)
                if found != expected or isinstance(found, str):
                    faults.append(f"{function.__name__}: {found} instead of {expected}")
    if faults:
        raise SystemExit("\n".join(faults))
    sys.stdout.write(f"{len(wanted)} passed, 0 failed\n")


if __name__ == "__main__":
    main()
