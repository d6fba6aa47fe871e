# SPDX-License-Identifier: BSD-3-Clause
"""Slots forked in the image minimal without an agent, for tests of the zygote's kernels alone.

The image is unpacked from its package, once in a test run. A program of tests/ runs in it, for example
tests/integration/forked_slot.py, with mount, pid and network namespaces of its own and a temporary overlay.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import websocket

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
PACKAGE = TESTS.parent / "nbagent"
# The directory that contains the package nbagent, as seen within the image.
PACKAGES = "/run/nbagent/lib"
FORKED_SLOT = "integration/forked_slot.py"
START_TIMEOUT_S = 120
MESSAGE_TIMEOUT_S = 30

# Runs in the namespaces: $1 the image, $2 a directory shared with the test, $3 nbagent, $4 tests/; then a program of
# tests/ and its arguments.
ENTER = """
set -e
image=$1 shared=$2 code=$3 tests=$4; shift 4
over=$shared/over; mkdir -p "$over"; mount -t tmpfs none "$over"; mkdir "$over/up" "$over/work" "$over/root"
root=$over/root
mount -t overlay none -o "lowerdir=$image,upperdir=$over/up,workdir=$over/work" "$root"
mount --bind /dev "$root/dev"; mount -t proc none "$root/proc"
mount -t devpts -o newinstance,ptmxmode=0666 none "$root/dev/pts"
mount --bind "$root/dev/pts/ptmx" "$root/dev/ptmx"
mount -t tmpfs -o mode=1777 none "$root/dev/shm"
mount -t tmpfs -o mode=1777 none "$root/tmp"; mount -t tmpfs none "$root/run"
mkdir -p "$root/run/nbagent/lib/nbagent" "$root/run/test" "$root/run/shared"
mount --bind "$code" "$root/run/nbagent/lib/nbagent"
mount --bind "$tests" "$root/run/test"
mount --bind "$shared" "$root/run/shared"
ip link set lo up
exec chroot "$root" /usr/bin/env -i HOME=/home/jovyan LANG=C.UTF-8 SHELL=/bin/bash USER=jovyan LOGNAME=jovyan \
    PATH=/home/jovyan/.local/bin:/usr/local/bin:/usr/bin:/bin $FORKED_VARIABLES /usr/bin/python3 \
    /run/test/"$@"
"""


def unpack(package: Path, into: Path) -> Path:
    """Unpacks the root filesystem of an image from its package."""
    subprocess.run(["dpkg-deb", "-x", str(package), str(into)], check=True)
    (archive,) = into.glob("usr/share/nbagent/images/*.tar.zst")
    tree = into / "tree"
    tree.mkdir()
    subprocess.run(["tar", "--zstd", "-xpf", str(archive), "-C", str(tree)], check=True)
    archive.unlink()
    return tree


def add_image(agent: Any, packages: list[Path], directory: Path, name: str, settings: str) -> dict[str, Any]:
    """Adds the image minimal to a host as `name`, with `settings` before those of its manifest; the image as JSON."""
    (package,) = (path for path in packages if "image-minimal" in path.name)
    tree = unpack(package, directory / "image")
    manifest = tree / "etc/nbagent-image.toml"
    manifest.write_text(settings + manifest.read_text())
    archive = directory / f"{name}.tar"
    subprocess.run(["tar", "--numeric-owner", "-cf", str(archive), "-C", str(tree), "."], check=True)
    shutil.rmtree(directory / "image")
    agent.host.copy_in(str(archive), "/root/")
    archive.unlink()
    added = agent.host.run(["nbagent", "image", "add", "--json", "--name", name, f"/root/{name}.tar"], timeout=300)
    agent.run("rm", f"/root/{name}.tar")
    return dict(json.loads(added.stdout))


def command(tree: Path | str, shared: Path, program: str, *arguments: str) -> list[str]:
    """A command that runs a Python program of tests/ in the image `tree`, or in layers joined by colons.

    It is killed when its parent process ends.
    """
    return ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "--propagation", "private",
            "sh", "-c", ENTER, "sh", str(tree), str(shared), str(PACKAGE), str(TESTS), program, *arguments]


@contextlib.contextmanager
def slots(
    tree: Path | str, shared: Path, count: int, *options: str, variables: str = ""
) -> Iterator[list[Slot]]:
    """`count` forked slots of a zygote with these `options`; their output is in `shared`/log.

    `variables` are of the zygote's environment, as NAME=VALUE separated by blanks.
    """
    with (shared / "log").open("wb") as log:
        process = subprocess.Popen(
            command(tree, shared, FORKED_SLOT, "serve", "/run/shared/http.sock", str(count), *options),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "FORKED_VARIABLES": variables},
        )
    try:
        made = [Slot(shared / f"http.sock.{number}") for number in range(count)]
        deadline = time.monotonic() + START_TIMEOUT_S
        while not all(slot.is_ready() for slot in made):
            assert process.poll() is None and time.monotonic() < deadline, (shared / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield made
    finally:
        process.kill()
        process.wait()


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self.path = path

    def connect(self) -> None:
        self.sock = connect(self.path)


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(60)
    try:
        connection.connect(os.fspath(path))
    except OSError:
        connection.close()
        raise
    return connection


class Slot:
    """A client of one slot's server."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_ready(self) -> bool:
        try:
            return bool(self.call("GET", "/api/kernels") == [])
        except OSError:
            return False

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Sends a request; returns the response's JSON, or its bytes if it is none. Asserts success."""
        with contextlib.closing(_Connection(self.path)) as connection:
            document = None if body is None else json.dumps(body)
            connection.request(method, path, document, {"Authorization": "token token"})
            response = connection.getresponse()
            content = response.read()
        assert response.status < 300, (response.status, content)
        return json.loads(content) if content.startswith((b"{", b"[")) else content

    @contextlib.contextmanager
    def kernel(self, **model: Any) -> Iterator[Kernel]:
        """A kernel with an open websocket; shut down afterwards."""
        kernel = Kernel(self, self.call("POST", "/api/kernels", model)["id"])
        try:
            yield kernel
        finally:
            kernel.socket.close()
            self.call("DELETE", f"/api/kernels/{kernel.id}")


class Kernel:
    """A websocket client of one kernel."""

    def __init__(self, slot: Slot, kernel_id: str) -> None:
        self.slot, self.id, self.timeout_s = slot, kernel_id, MESSAGE_TIMEOUT_S
        self.pending: list[dict[str, Any]] = []
        self.socket = self._open()

    def _open(self) -> websocket.WebSocket:
        return websocket.create_connection(
            f"ws://localhost/api/kernels/{self.id}/channels?session_id={uuid.uuid4().hex}",
            socket=connect(self.slot.path), header=["Authorization: token token"], timeout=MESSAGE_TIMEOUT_S,
        )

    def wait_restarted(self) -> None:
        """Waits until a restarting kernel executes cells. Messages sent to it earlier may be lost."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            self.socket.close()
            self.socket = self._open()
            self.timeout_s, self.pending = 5, []
            with contextlib.suppress(TimeoutError):
                if self.value("1") == "1":
                    self.timeout_s = MESSAGE_TIMEOUT_S
                    return
        raise AssertionError(f"the kernel did not restart within {START_TIMEOUT_S} s")

    def send(self, kind: str, content: dict[str, Any], channel: str = "shell", parent: Any = None) -> str:
        """Sends a message and returns its id."""
        header = {"msg_id": uuid.uuid4().hex, "msg_type": kind, "username": "", "session": "test", "version": "5.3",
                  "date": ""}
        message = {"header": header, "parent_header": parent or {}, "metadata": {}, "content": content,
                   "channel": channel, "buffers": []}
        self.socket.send(json.dumps(message))
        return header["msg_id"]

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yields pending and then received messages; raises TimeoutError after `timeout_s`."""
        deadline = time.monotonic() + self.timeout_s
        while self.pending:
            yield self.pending.pop(0)
        while time.monotonic() < deadline:
            # Shorter than the interval of pings, because each ping restarts the socket's timeout.
            self.socket.settimeout(2)
            with contextlib.suppress(websocket.WebSocketTimeoutException):
                yield json.loads(self.socket.recv())
        raise TimeoutError(f"the expected message was not received within {self.timeout_s} s")

    def ask(self, kind: str, content: dict[str, Any], channel: str = "shell") -> dict[str, Any]:
        """Sends a request and returns the content of the reply."""
        request_id = self.send(kind, content, channel)
        reply = self.first(lambda message: message["parent_header"].get("msg_id") == request_id
                           and message["header"]["msg_type"].endswith("_reply"))
        return dict(reply["content"])

    def start(self, code: str, stdin: bool = False) -> str:
        """Sends a cell for execution and returns the message's id."""
        return self.send("execute_request", {"code": code, "silent": False, "store_history": True,
                                             "user_expressions": {}, "allow_stdin": stdin})

    def finish(self, request_id: str, typed: str = "") -> dict[str, Any]:
        """Waits for the end of a cell; returns its "status", "text", "stream", "error" and "data".

        An input request is replied to with `typed`.
        """
        got: dict[str, Any] = {"status": "", "text": "", "stream": "", "error": "", "data": {}, "kinds": []}
        idle = False
        for message in self.messages():
            if message["parent_header"].get("msg_id") != request_id:
                continue
            kind, content = message["header"]["msg_type"], message["content"]
            got["kinds"].append(kind)
            if kind == "input_request":
                self.send("input_reply", {"value": typed, "status": "ok"}, "stdin", message["header"])
            elif kind == "execute_reply":
                got["status"] = content["status"]
            elif kind == "status":
                idle = content["execution_state"] == "idle"
            elif kind == "stream":
                got["stream"] += content["text"]
            elif kind in ("execute_result", "display_data"):
                got["data"] |= content["data"]
                got["text"] = content["data"].get("text/plain", got["text"])
            elif kind == "error":
                got["error"] = f"{content['ename']}: {content['evalue']}"
            if idle and got["status"]:
                break
        return got

    def run(self, code: str, typed: str = "") -> dict[str, Any]:
        """Runs a cell."""
        return self.finish(self.start(code, stdin=bool(typed)), typed)

    def value(self, code: str) -> str:
        """The text of a cell's result."""
        got = self.run(code)
        assert got["status"] == "ok", got
        return str(got["text"])

    def wait_for(self, kind: str, **content: Any) -> dict[str, Any]:
        """The next message of a kind with this content."""
        return self.first(lambda message: message["header"]["msg_type"] == kind
                          and content.items() <= message["content"].items())

    def first(self, matches: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first message that `matches`; the messages before it stay pending."""
        others: list[dict[str, Any]] = []
        for message in self.messages():
            if matches(message):
                self.pending = others + self.pending
                return message
            others.append(message)
        raise AssertionError("unreachable")

    def everything(self) -> None:
        """Executes cells and sends requests of every kind, for their lazy imports."""
        for code in (
            "1 + 1", "1 / 0", "a b", "undefined", "zip?", "%pwd", "%who", "%lsmagic", "%%time\nsum(range(10))", "!true",
            "%timeit -n1 -r1 1", "%%bash\ntrue", "x = !echo x", "%config InteractiveShell", "%matplotlib --list",
            "import asyncio; await asyncio.sleep(0)", "%env", "%load_ext storemagic", "%history",
            "from IPython.display import HTML, SVG, Image, Markdown, display; display(HTML('x'), Markdown('x'))",
            "import comm; c = comm.create_comm(target_name='x', data={}); c.send({}); c.close()",
            "import subprocess; subprocess.run(['true'])",
            "import threading; t = threading.Thread(target=print); t.start(); t.join()",
            "import multiprocessing; p = multiprocessing.Process(target=print); p.start(); p.join()",
        ):
            self.run(code)
        self.run("input()", typed="x")
        self.ask("complete_request", {"code": "import os; os.pa", "cursor_pos": 16})
        self.ask("complete_request", {"code": "%ti", "cursor_pos": 3})
        self.ask("complete_request", {"code": "import js", "cursor_pos": 9})
        self.ask("inspect_request", {"code": "zip", "cursor_pos": 3, "detail_level": 1})
        self.ask("is_complete_request", {"code": "if x:"})
        self.ask("history_request", {"hist_access_type": "tail", "n": 1, "raw": True, "output": False})
        self.ask("comm_info_request", {})
        self.ask("usage_request", {}, "control")
        self.debug("debugInfo")

    def debug(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request to the debugger and returns its response."""
        return self.ask("debug_request", {"type": "request", "seq": 1, "command": request, "arguments": arguments},
                        "control")
