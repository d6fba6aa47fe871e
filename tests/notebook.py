# SPDX-License-Identifier: BSD-3-Clause
"""A notebook's user, for tests: opens the claim's URL through the router, runs cells, reads results.

Uses Jupyter's REST API and the kernels' websockets, as JupyterLab in a browser does; python3-websocket is the client.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import websocket

from product import ROUTER_PORT, Api
from testhost_driver import Host


@dataclass
class Result:
    """The output of a cell."""

    status: str = ""
    text: str = ""
    stream: str = ""
    error: str = ""
    data: dict[str, Any] = field(default_factory=dict)


class Notebook:
    """One claimed slot, through the router; `token` and paths are the claim's."""

    def __init__(self, host: Host, claim: dict[str, Any], port: int = ROUTER_PORT) -> None:
        self.host, self.slot, self.token = host, claim["slot"], claim["token"]
        self.base = f"/user/{self.slot}/"
        self.router = Api(host, port)
        self.headers = {"Authorization": f"token {self.token}"}

    def get(self, path: str) -> Any:
        """GET below the slot, with the token; returns the JSON of the response."""
        answer = self.router.call("GET", self.base + path, headers=self.headers)
        assert answer.status == 200, (answer.status, answer.body[:500])
        return answer.json()

    def post(self, path: str, body: Any = None) -> Any:
        """POST below the slot, with the token."""
        answer = self.router.call("POST", self.base + path, body or {}, self.headers)
        assert answer.status in (200, 201, 204), (answer.status, answer.body[:500])
        return answer.json() if answer.body else None

    def kernel(self) -> Kernel:
        """A new kernel with an open websocket to it."""
        return Kernel(self, self.post("api/kernels")["id"])

    def run(self, code: str, timeout: float = 60) -> Result:
        """Runs a cell in a kernel of its own, and ends the kernel."""
        kernel = self.kernel()
        try:
            return kernel.run(code, timeout)
        finally:
            kernel.end()


class Kernel:
    """One kernel's websocket. With the `session` of a former one, it gets the output that is kept for that."""

    def __init__(self, notebook: Notebook, kernel_id: str, session: str = "") -> None:
        self.notebook, self.id = notebook, kernel_id
        self.session = session or uuid.uuid4().hex
        self.socket = websocket.create_connection(
            f"ws://127.0.0.1:{notebook.router.port}{notebook.base}api/kernels/{kernel_id}/channels?session_id={self.session}",
            socket=notebook.host.connect(notebook.router.port),
            header=[f"Authorization: token {notebook.token}"],
            timeout=60,
        )

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, code: str, *, stdin: bool = False) -> str:
        """Sends a cell, which may read input if `stdin`; returns its message id."""
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": stdin}
        return self.send_message("execute_request", content, "shell")

    def send_message(self, kind: str, content: dict[str, Any], channel: str) -> str:
        """Sends a message; returns its id."""
        message_id = uuid.uuid4().hex
        header = {"msg_id": message_id, "msg_type": kind, "username": "", "session": self.session,
                  "version": "5.3", "date": ""}
        message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": channel}
        self.socket.send(json.dumps(message))
        return message_id

    def receive(self, kind: str, **content: Any) -> dict[str, Any]:
        """The next message of a kind whose content has these values; raises WebSocketTimeoutException."""
        self.socket.settimeout(60)
        while True:
            message = json.loads(self.socket.recv())
            if message["header"]["msg_type"] == kind and content.items() <= message["content"].items():
                return dict(message)

    def debug(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Sends a request of the Debug Adapter Protocol; returns the response."""
        request = {"type": "request", "seq": 1, "command": command, "arguments": arguments}
        self.send_message("debug_request", request, "control")
        return dict(self.receive("debug_reply", command=command)["content"])

    def result(self, message_id: str, timeout: float = 60) -> Result:
        """The result of a cell; raises TimeoutError after `timeout` seconds."""
        result, deadline = Result(), time.monotonic() + timeout
        idle = False
        while not (idle and result.status):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no result after {timeout} s; so far {result}")
            self.socket.settimeout(left)
            try:
                message = json.loads(self.socket.recv())
            except websocket.WebSocketTimeoutException:
                continue
            if message["parent_header"].get("msg_id") != message_id:
                continue
            kind, content = message["header"]["msg_type"], message["content"]
            if kind == "execute_reply":
                result.status = content["status"]
            elif kind == "status":
                idle = content["execution_state"] == "idle"
            elif kind == "stream":
                result.stream += content["text"]
            elif kind in ("execute_result", "display_data"):
                result.data |= content["data"]
                result.text = content["data"].get("text/plain", result.text)
            elif kind == "error":
                result.error = f"{content['ename']}: {content['evalue']}"
        return result

    def run(self, code: str, timeout: float = 60) -> Result:
        """Runs a cell."""
        return self.result(self.send(code), timeout)

    def close(self) -> None:
        """Closes the websocket, as a closed browser tab does; the kernel keeps running."""
        self.socket.close()

    def end(self) -> None:
        """Shuts the kernel down."""
        self.close()
        self.notebook.router.call("DELETE", f"{self.notebook.base}api/kernels/{self.id}", headers=self.notebook.headers)
