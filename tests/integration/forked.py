"""Slots forked in the image minimal, without an agent: the zygote's kernels alone, near enough to look into.

The image is unpacked from its package, once in a run; a program of tests/integration/forked_slot.py runs in it in
mount, pid and network namespaces of its own, over a layer that is gone with them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import websocket

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent.parent / "nbagent"
START_TIMEOUT_S = 120
MESSAGE_TIMEOUT_S = 30

# Runs in the namespaces: $1 the image, $2 a directory shared with the test, $3 nbagent, $4 these files; then a command.
ENTER = """
set -e
image=$1 shared=$2 code=$3 here=$4; shift 4
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
mount --bind "$here" "$root/run/test"
mount --bind "$shared" "$root/run/shared"
ip link set lo up
exec chroot "$root" /usr/bin/env -i HOME=/home/jovyan LANG=C.UTF-8 SHELL=/bin/bash USER=jovyan LOGNAME=jovyan \
    PATH=/home/jovyan/.local/bin:/usr/local/bin:/usr/bin:/bin /usr/bin/python3 -I -X frozen_modules=off \
    /run/test/forked_slot.py "$@"
"""


def unpack(package: Path, into: Path) -> Path:
    """The tree of an image, out of its package."""
    subprocess.run(["dpkg-deb", "-x", str(package), str(into)], check=True)
    (archive,) = into.glob("usr/share/nbagent/images/*.tar.zst")
    tree = into / "tree"
    tree.mkdir()
    subprocess.run(["tar", "--zstd", "-xpf", str(archive), "-C", str(tree)], check=True)
    archive.unlink()
    return tree


def command(tree: Path | str, shared: Path, *words: str) -> list[str]:
    """The command that runs forked_slot.py in the image, its layers joined by colons; it ends with its parent."""
    return ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "--propagation", "private",
            "sh", "-c", ENTER, "sh", str(tree), str(shared), str(PACKAGE), str(HERE), *words]


@contextlib.contextmanager
def slots(tree: Path | str, shared: Path, count: int) -> Iterator[list[Slot]]:
    """That many forked slots; what they printed is in `shared`/log."""
    with (shared / "log").open("wb") as log:
        process = subprocess.Popen(
            command(tree, shared, "serve", "/run/shared/http.sock", str(count)),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )
    try:
        made = [Slot(shared / f"http.sock.{number}") for number in range(count)]
        deadline = time.monotonic() + START_TIMEOUT_S
        while not all(slot.answers() for slot in made):
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
    """One slot's server."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def answers(self) -> bool:
        try:
            return bool(self.call("GET", "/api/kernels") == [])
        except OSError:
            return False

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON that a request answers."""
        with contextlib.closing(_Connection(self.path)) as connection:
            sent = None if body is None else json.dumps(body)
            connection.request(method, path, sent, {"Authorization": "token token"})
            answer = connection.getresponse()
            said = answer.read()
        assert answer.status < 300, (answer.status, said)
        return json.loads(said) if said.startswith((b"{", b"[")) else said

    @contextlib.contextmanager
    def kernel(self, **wanted: Any) -> Iterator[Kernel]:
        """A kernel with an open websocket; shut down afterwards."""
        kernel = Kernel(self, self.call("POST", "/api/kernels", wanted)["id"])
        try:
            yield kernel
        finally:
            kernel.socket.close()
            self.call("DELETE", f"/api/kernels/{kernel.id}")


class Kernel:
    """One kernel, as a notebook talks to it."""

    def __init__(self, slot: Slot, kernel_id: str) -> None:
        self.slot, self.id, self.patience_s = slot, kernel_id, MESSAGE_TIMEOUT_S
        self.passed_over: list[dict[str, Any]] = []
        self.socket = self._open()

    def _open(self) -> websocket.WebSocket:
        return websocket.create_connection(
            f"ws://localhost/api/kernels/{self.id}/channels?session_id={uuid.uuid4().hex}",
            socket=connect(self.slot.path), header=["Authorization: token token"], timeout=MESSAGE_TIMEOUT_S,
        )

    def wait_restarted(self) -> None:
        """Waits until a kernel that restarts takes cells; what is sent to it before that may be lost."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            self.socket.close()
            self.socket = self._open()
            self.patience_s, self.passed_over = 5, []
            with contextlib.suppress(TimeoutError):
                if self.value("1") == "1":
                    self.patience_s = MESSAGE_TIMEOUT_S
                    return
        raise AssertionError("the kernel did not come back")

    def send(self, kind: str, content: dict[str, Any], channel: str = "shell", parent: Any = None) -> str:
        """Sends a message; its id."""
        header = {"msg_id": uuid.uuid4().hex, "msg_type": kind, "username": "", "session": "test", "version": "5.3",
                  "date": ""}
        message = {"header": header, "parent_header": parent or {}, "metadata": {}, "content": content,
                   "channel": channel, "buffers": []}
        self.socket.send(json.dumps(message))
        return header["msg_id"]

    def arriving(self) -> Iterator[dict[str, Any]]:
        """Messages, first those that an earlier call skipped; raises TimeoutError at the deadline."""
        deadline = time.monotonic() + self.patience_s
        while self.passed_over:
            yield self.passed_over.pop(0)
        while time.monotonic() < deadline:
            # Shorter than between two pings, each of which begins the time anew.
            self.socket.settimeout(2)
            with contextlib.suppress(websocket.WebSocketTimeoutException):
                yield json.loads(self.socket.recv())
        raise TimeoutError(f"what was waited for did not come in {self.patience_s} s")

    def ask(self, kind: str, content: dict[str, Any], channel: str = "shell") -> dict[str, Any]:
        """Sends a request and gives the content of the reply."""
        sent = self.send(kind, content, channel)
        reply = self.first(lambda message: message["parent_header"].get("msg_id") == sent
                           and message["header"]["msg_type"].endswith("_reply"))
        return dict(reply["content"])

    def start(self, code: str, stdin: bool = False) -> str:
        """Sends a cell."""
        return self.send("execute_request", {"code": code, "silent": False, "store_history": True,
                                             "user_expressions": {}, "allow_stdin": stdin})

    def finish(self, sent: str, typed: str = "") -> dict[str, Any]:
        """The result of a cell: "status", "text", "stream", "error", "data"; a request for input gets `typed`."""
        got: dict[str, Any] = {"status": "", "text": "", "stream": "", "error": "", "data": {}, "kinds": []}
        idle = False
        for message in self.arriving():
            if message["parent_header"].get("msg_id") != sent:
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

    def first(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first message that is `wanted`; those before it stay to be looked at."""
        others: list[dict[str, Any]] = []
        for message in self.arriving():
            if wanted(message):
                self.passed_over = others + self.passed_over
                return message
            others.append(message)
        raise AssertionError("unreachable")

    def everything(self) -> None:
        """Does one of everything that a notebook does."""
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
        """A request to the debugger, and its answer."""
        return self.ask("debug_request", {"type": "request", "seq": 1, "command": request, "arguments": arguments},
                        "control")
