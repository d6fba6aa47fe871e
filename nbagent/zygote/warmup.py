# SPDX-License-Identifier: BSD-3-Clause
"""The zygote's warm-up: a browser session with a notebook, run within the zygote before it forks anything.

Objects that are created on first use, and code that CPython specialises while running it (by writing into it, from the
second run on), then exist before the fork and are shared by all forked processes. So the warm-up repeats the requests
of a browser that opens JupyterLab: pages, the start of a kernel, and messages to it, by both websocket protocols. The
kernel runs in the main thread, as kernels do, and the server in another one. Both are the objects that will be
forked. A `FakeForkServer` takes the place of the fork server and hands the kernel to the main thread.

Afterwards the process has one thread, and no event loop, zmq context, connection or file of the warm-up. The supervisor
bounds the duration, because only it has the start's deadline.

Runs under the image's own Python, 3.9 and up.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import importlib
import json
import logging
import queue
import socket
import tempfile
import threading
import uuid
from collections.abc import Awaitable
from typing import Any, Callable, Dict, List, Mapping, Optional, Set, Tuple

from jupyter_server.services.kernels.connection.base import deserialize_msg_from_ws_v1, serialize_msg_to_ws_v1
from jupyterlab_server.handlers import LabHandler
from tornado.httpclient import HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.netutil import Resolver
from tornado.websocket import websocket_connect

from nbagent.zygote import provisioner

# Warm-ups after the code was moved (memory/code_layout.py), each with one session by either protocol. CPython counts
# the first run of a code object and specialises it in the second; the code that it calls is specialised in the third.
ROUNDS = 2
WORKER_END_S = 5.0
# Subprotocols of the kernel websocket: "" is the older one, with JSON messages.
PROTOCOLS = ("", "v1.kernel.websocket.jupyter.org")

# The requests of JupyterLab when it opens.
PAGES = (
    "api", "lab", "api/contents?content=1", "api/kernelspecs", "api/me", "api/status", "api/kernels", "api/sessions",
    "api/terminals", "lab/api/settings", "lab/api/settings?ids_only=true", "lab/api/settings/@jupyterlab/none:none",
    *(f"lab/api/settings/@jupyterlab/{name}" for name in (
        "codemirror-extension:plugin", "docmanager-extension:plugin", "notebook-extension:panel")),
    "lab/api/workspaces", "lab/api/workspaces/default", "lab/api/translations", "lab/api/translations/default",
    "lab/api/themes/@jupyterlab/theme-light-extension/index.css", "api/nbconvert",
    "api/contents/none.ipynb", "api/contents/none.ipynb/checkpoints",
    "api/nbagent/answers?path=api/me&path=api/kernels",
)
# The messages of JupyterLab to a kernel.
MESSAGES: Tuple[Tuple[str, Dict[str, Any]], ...] = (
    ("kernel_info_request", {}),
    *(
        ("execute_request", {"code": code, "silent": False, "store_history": True, "user_expressions": {},
                             "allow_stdin": False, "stop_on_error": False})
        for code in (
            "1 + 1", "import sys; print('x', file=sys.stderr)", "1 / 0", "def f(x):\n    return x\nf(1)", "%pwd",
            "from IPython.display import HTML, display; display(HTML('x'))", "import asyncio; await asyncio.sleep(0)",
            "f?", "nothing", "a b", "[f] * 3",
        )
    ),
    ("complete_request", {"code": "sys.ver", "cursor_pos": 7}),
    ("inspect_request", {"code": "sys", "cursor_pos": 3, "detail_level": 0}),
    ("is_complete_request", {"code": "1 +"}),
    ("comm_info_request", {}),
    ("history_request", {"hist_access_type": "tail", "n": 1, "raw": True, "output": False}),
)

# A page takes less than a second on an idle machine.
RESPONSE_TIMEOUT_S = 10.0
# The pages without a response, which the next sessions leave out.
_unresponsive: Set[str] = set()

# Runs a kernel in the calling thread until it is shut down or stopped. Arguments: the connection file; a function to
# call when the kernel listens; a function to call with another one, which stops the kernel from any thread.
RunKernel = Callable[[str, Callable[[], None], Callable[[Callable[[], None]], None]], None]


def warm_up(server: Any, run_kernel: RunKernel) -> None:
    """Runs one session by each protocol, from the first request to the end of the kernel. Raises RuntimeError."""
    logging.disable()  # some requests and cells fail on purpose
    # So that the collection examines the objects of the sessions only: 30 ms instead of 250.
    gc.freeze()
    try:
        for protocol in PROTOCOLS:
            _run_session(server, run_kernel, protocol)
        # While logging is disabled, because asyncio logs unretrieved exceptions when it destroys their tasks.
        gc.collect()
    finally:
        gc.unfreeze()
        logging.disable(logging.NOTSET)


def _run_session(server: Any, run_kernel: RunKernel, protocol: str) -> None:
    forkserver, failures = FakeForkServer(), []  # type: FakeForkServer, List[BaseException]

    def run_server() -> None:
        try:
            asyncio.run(_serve_session(server, protocol))
        except BaseException as error:
            failures.append(error)
        finally:
            forkserver.close()

    provisioner.use(forkserver)
    thread = threading.Thread(target=run_server)
    thread.start()
    try:
        if (connection_file := forkserver.orders.get()) is not None:
            # In a copied context, because variables that the kernel sets in this one would outlive the kernel.
            contextvars.copy_context().run(run_kernel, connection_file, forkserver.set_bound, forkserver.set_stop)
    finally:
        forkserver.ended.set()
        thread.join()
        provisioner.use(None)
        # Worker threads of anyio are ended with the event loop, which does not wait for them.
        for worker in threading.enumerate():
            if worker is not threading.current_thread():
                worker.join(WORKER_END_S)
    if failures:
        raise RuntimeError(f"the zygote's warm-up failed: {failures[0]!r}") from failures[0]


class FakeForkServer:
    """Stands for a `ForkServerClient` and for the kernel that it forks, which runs in this process."""

    alive = exclusive = True
    pid = 0  # so that the server sends no signal and opens no file in /proc
    returncode: Optional[int] = None
    stdin = stdout = stderr = None

    def __init__(self) -> None:
        # Connection files of kernels; None ends the queue.
        self.orders: queue.Queue[Optional[str]] = queue.Queue()
        self.ended = threading.Event()
        self._bound = threading.Event()
        self._stop: Callable[[], None] = lambda: None

    async def fork(self, order: Mapping[str, Any]) -> FakeForkServer:
        self.orders.put(order["connection_file"])
        return self

    async def bound(self) -> None:
        while not self._bound.is_set() and not self.ended.is_set():
            await asyncio.sleep(0.001)

    def set_bound(self) -> None:
        self._bound.set()

    def set_stop(self, stop: Callable[[], None]) -> None:
        self._stop = stop

    def close(self) -> None:
        """Stops the kernel, unless it has ended, and accepts no further order."""
        self.orders.put(None)
        self._stop()

    def poll(self) -> Optional[int]:
        self.returncode = 0 if self.ended.is_set() else None
        return self.returncode

    def wait(self, timeout: Optional[float] = None) -> int:
        self.ended.wait(timeout)
        return 0

    def send_signal(self, _number: int) -> None:
        self._stop()

    def terminate(self) -> None:
        self._stop()

    def kill(self) -> None:
        self._stop()


class _UnixResolver(Resolver):
    """Resolves any name to one unix socket."""

    def initialize(self, path: str) -> None:
        self.path = path

    async def resolve(self, *_args: Any, **_options: Any) -> List[Tuple[int, Any]]:
        return [(int(socket.AF_UNIX), self.path)]


async def _serve_session(server: Any, protocol: str) -> None:
    """Serves the server's application on a temporary socket for the duration of one session."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        path = f"{directory}/http.sock"
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)
        http = HTTPServer(server.web_app, xheaders=True)
        http.add_socket(listener)
        try:
            await _use_notebook(server, path, protocol)
        finally:
            http.stop()
            await http.close_all_connections()
            await _release(server)


def _read_notebooks() -> None:
    """Reads a notebook of each format that is in use, because nbformat compiles the schema of a format on first use."""
    with contextlib.suppress(ImportError, AttributeError):
        nbformat = importlib.import_module("nbformat")
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1"), nbformat.v4.new_markdown_cell("1")])
        text = nbformat.writes(notebook)
        for minor in (4, 5):
            older = json.loads(text)
            older["nbformat_minor"] = minor
            if minor < 5:
                for cell in older["cells"]:
                    cell.pop("id", None)
            nbformat.reads(json.dumps(older), as_version=4)


async def _use_notebook(server: Any, path: str, protocol: str) -> None:
    _read_notebooks()
    for page in PAGES:
        await _request(server, path, "GET", page)
    notebook = {"path": "warmup.ipynb", "name": "warmup.ipynb", "type": "notebook", "kernel": {"name": "python3"}}
    session = json.loads(await _request(server, path, "POST", "api/sessions", json.dumps(notebook).encode()))
    if "kernel" not in session:
        return  # the image has no such kernel, or one of another Python, which cannot be forked
    kernel_id = session["kernel"]["id"]
    url = f"ws://localhost{server.base_url}api/kernels/{kernel_id}/channels?session_id={uuid.uuid4()}"
    connection = await websocket_connect(
        HTTPRequest(url, headers=_headers(server)), resolver=_UnixResolver(path=path),
        subprotocols=[protocol] if protocol else None,
    )
    for kind, content in MESSAGES:
        await _send_message(connection, kind, content, protocol)
    connection.close()
    for page in ("api/kernels", "api/sessions", f"api/kernels/{kernel_id}"):
        await _request(server, path, "GET", page)
    await _request(server, path, "DELETE", f"api/sessions/{session['id']}")


def _headers(server: Any) -> Dict[str, str]:
    return {"Authorization": f"token {server.web_app.settings['token']}"}


async def _request(server: Any, path: str, method: str, page: str, body: bytes = b"") -> bytes:
    """The body of the response, for any status; empty when there is none within RESPONSE_TIMEOUT_S, now or before."""
    if page in _unresponsive:
        return b""
    reader, writer = await asyncio.open_unix_connection(path)
    headers = {"Host": "localhost", "Connection": "close", "Content-Length": str(len(body)), **_headers(server)}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"{method} {server.base_url}{page} HTTP/1.1\r\n{head}\r\n".encode() + body)
    response = b""
    # A handler of an extension that does not respond costs its own page, and not the zygote.
    try:
        response = await asyncio.wait_for(reader.read(), RESPONSE_TIMEOUT_S)
    except asyncio.TimeoutError:
        _unresponsive.add(page)
    writer.close()
    await writer.wait_closed()
    return response.partition(b"\r\n\r\n")[2]


async def _send_message(connection: Any, kind: str, content: Dict[str, Any], protocol: str) -> None:
    """Sends a message to the kernel, and reads messages until the kernel has replied and is idle again."""
    message_id = uuid.uuid4().hex
    header = {"msg_id": message_id, "msg_type": kind, "username": "", "session": "", "version": "5.4", "date": ""}
    message: Dict[str, Any] = {"header": header, "parent_header": {}, "metadata": {}, "content": content}
    if protocol:
        packed = serialize_msg_to_ws_v1(message, "shell", lambda part: json.dumps(part).encode())
    else:
        packed = json.dumps({**message, "channel": "shell", "buffers": []})
    await connection.write_message(packed, binary=bool(protocol))
    awaited = {kind.replace("_request", "_reply"), "idle"}
    while awaited:
        received = await connection.read_message()
        if received is None:
            raise ConnectionError(f"the websocket was closed after {kind} {content}")
        if isinstance(received, bytes):
            _channel, (header, parent, _metadata, body) = deserialize_msg_from_ws_v1(received)
            header, parent, body = json.loads(header), json.loads(parent), json.loads(body)
        else:
            document = json.loads(received)
            header, parent, body = document["header"], document["parent_header"], document["content"]
        if parent.get("msg_id") == message_id:
            awaited -= {header["msg_type"], body.get("execution_state", "")}


async def _release(server: Any) -> None:
    """Releases what the server has acquired in the session: kernels, zmq context, sessions' database, threads."""
    kernels, sessions = server.kernel_manager, server.session_manager
    with contextlib.suppress(Exception):
        # A coroutine or not, by the kind of kernel manager that the image configures.
        if isinstance(shutdown := kernels.shutdown_all(now=True), Awaitable):
            await shutdown
    # The server recreates the context and the database connection on their next use.
    if "context" in kernels._trait_values:
        kernels.context.destroy(linger=0)
        del kernels._trait_values["context"]
    if getattr(sessions, "_connection", None) is not None:
        sessions.close()
        sessions._connection.close()
        sessions._connection = None
    # This cache refers to every handler that has served a page, and so to its request and connection.
    with contextlib.suppress(AttributeError):
        LabHandler.get_page_config.cache_clear()
    await asyncio.get_running_loop().shutdown_default_executor()
