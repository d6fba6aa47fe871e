# SPDX-License-Identifier: BSD-3-Clause
"""The acts of a user of a server, for trials: cells, files, terminals."""

from __future__ import annotations

import contextlib
import json
import textwrap
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import suite
import websocket

from notebook import Kernel, Notebook

TIMEOUT_S = 60

def user_of(server: suite.Server) -> Notebook:
    """The user of a server: of a slot, or of the plain one."""
    base = "/" + server.url.split("/", 3)[3]
    port = int(server.url.split("/")[2].rpartition(":")[2])
    user = Notebook(server.host, {"slot": base, "token": server.token}, port)
    user.base = base
    return user


def cell(kernel: Kernel, code: str, timeout: float = TIMEOUT_S) -> str:
    """Runs a cell that must succeed; returns what it printed."""
    result = kernel.run(textwrap.dedent(code), timeout)
    assert result.status == "ok", f"{result.error}: {result.stream[-500:]}"
    return result.stream


@contextlib.contextmanager
def kernel_of(user: Notebook, **options: Any) -> Any:
    """A kernel, ended afterwards."""
    kernel = Kernel(user, user.post("api/kernels", options)["id"])
    try:
        yield kernel
    finally:
        kernel.end()


def put(user: Notebook, path: str, body: Mapping[str, Any]) -> Any:
    """Saves a file; returns its model."""
    answer = user.router.call("PUT", f"{user.base}api/contents/{quote(path)}", dict(body), user.headers)
    assert answer.status in (200, 201), (path, answer.status, answer.body[:300])
    return answer.json()


def notebook_of(*sources: str, output: str = "") -> dict[str, Any]:
    """A notebook's model with code cells; the first has `output`."""
    cells = [{"cell_type": "code", "id": f"c{n}", "source": source, "metadata": {}, "execution_count": None,
              "outputs": []} for n, source in enumerate(sources)]
    if output:
        cells[0]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": output}]
    content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    return {"type": "notebook", "format": "json", "content": content}


class Terminal:
    """A terminal's websocket."""

    def __init__(self, user: Notebook, name: str = "") -> None:
        self.user, self.name = user, name or str(user.post("api/terminals")["name"])
        self.socket = websocket.create_connection(
            f"ws://127.0.0.1:{user.router.port}{user.base}terminals/websocket/{self.name}",
            socket=user.host.connect(user.router.port), header=[f"Authorization: token {user.token}"], timeout=60,
        )

    def type(self, text: str) -> None:
        self.socket.send(json.dumps(["stdin", text]))

    def read(self, until: str, timeout: float = 30) -> str:
        """The output up to a text; raises WebSocketTimeoutException."""
        found, deadline = "", time.monotonic() + timeout
        while until not in found:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.01))
            kind, *rest = json.loads(self.socket.recv())
            if kind == "stdout":
                found += rest[0]
        return found

    def run(self, command: str) -> str:
        """The output of a command, without the lines that the shell edits."""
        self.type(f"clear; {command}; echo end-$((40 + 2))\r")
        found = self.read("end-42")
        return found.rpartition("end-42")[0].rpartition("\x1b[2J")[2].rpartition("\x1b[3J")[2].strip()

    def end(self) -> None:
        self.socket.close()
        self.user.router.call("DELETE", f"{self.user.base}api/terminals/{self.name}", headers=self.user.headers)
