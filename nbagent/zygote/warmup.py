"""A notebook's first minutes, played in the zygote before it forks anything.

What is made when it is first used, and code that CPython specialises as it runs (by writing into it, from the second
run on), is then there for all who are forked, and not each one's own to make. So everything happens that a browser
which opens JupyterLab brings about: the server answers its requests, starts a kernel, and carries its messages, in the
two forms that there are. The kernel runs in the main thread, as kernels do, and the server in another; both are
the ones that will be forked. In the place of the seed is an understudy, which forks nothing.

Afterwards there is one thread again, and no event loop, zmq context, connection or file of this. How long it may take
is the supervisor's affair, which knows whether anybody waits for it.

Runs under the image's own Python, 3.9 and up.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import json
import logging
import queue
import socket
import tempfile
import threading
import uuid
from collections.abc import Awaitable
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from jupyter_server.services.kernels.connection.base import deserialize_msg_from_ws_v1, serialize_msg_to_ws_v1
from jupyterlab_server.handlers import LabHandler
from tornado.httpclient import HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.netutil import Resolver
from tornado.websocket import websocket_connect

from nbagent.zygote import provisioner

# Of two runs each, one by either protocol. The first run of a piece of code counts, the second specialises it, and
# what that calls is specialised only in the third.
ROUNDS = 2
PROTOCOLS = ("", "v1.kernel.websocket.jupyter.org")

# What JupyterLab asks for when it opens.
PAGES = (
    "api", "lab", "api/contents?content=1", "api/kernelspecs", "api/me", "api/status", "api/kernels", "api/sessions",
    "api/terminals", "lab/api/settings", "lab/api/workspaces/default", "lab/api/translations",
    "api/contents/none.ipynb",
)
# What it says to a kernel.
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

# Is a kernel with this connection file until it is shut down, or the function that it gives away is called from any
# thread; calls the second when it listens.
Perform = Callable[[str, Callable[[], None], Callable[[Callable[[], None]], None]], None]


def warm_up(server: Any, perform: Perform) -> None:
    """One round, from the first request to the end of the kernels. Raises RuntimeError when something went wrong."""
    logging.disable()  # errors are a part of the warm_up
    try:
        for protocol in PROTOCOLS:
            _round(server, perform, protocol)
        gc.collect()  # tasks that nobody waited for say so in the end
    finally:
        logging.disable(logging.NOTSET)


def _round(server: Any, perform: Perform, protocol: str) -> None:
    understudy, failures = FakeForkServer(), []  # type: FakeForkServer, List[BaseException]

    def client() -> None:
        try:
            asyncio.run(_watch(server, protocol))
        except BaseException as error:
            failures.append(error)
        finally:
            understudy.dismiss()

    provisioner.use(understudy)
    thread = threading.Thread(target=client)
    thread.start()
    try:
        if (ordered := understudy.ordered.get()) is not None:
            # In a context of its own, or what the kernel sets in this one would outlive it.
            contextvars.copy_context().run(perform, ordered, understudy.listens, understudy.can_be_ended_by)
    finally:
        understudy.ended.set()
        thread.join()
        provisioner.use(None)
    if failures:
        raise RuntimeError("the notebook could not be rehearsed") from failures[0]


class FakeForkServer:
    """What a `ForkServerClient` is to the provisioner, and its one kernel: none that is a process."""

    alive = exclusive = True
    pid = 0  # nobody's, so nobody is sent a signal or looked up in /proc
    returncode: Optional[int] = None
    stdin = stdout = stderr = None

    def __init__(self) -> None:
        # A connection file; None when nobody will order a kernel any more.
        self.ordered: queue.Queue[Optional[str]] = queue.Queue()
        self.ended = threading.Event()
        self._listens = threading.Event()
        self._end: Callable[[], None] = lambda: None

    async def fork(self, order: Mapping[str, Any]) -> FakeForkServer:
        self.ordered.put(order["connection_file"])
        return self

    async def bound(self) -> None:
        while not self._listens.is_set() and not self.ended.is_set():
            await asyncio.sleep(0.001)

    def listens(self) -> None:
        self._listens.set()

    def can_be_ended_by(self, end: Callable[[], None]) -> None:
        self._end = end

    def dismiss(self) -> None:
        """Ends the kernel, if there is one and it has not ended."""
        self.ordered.put(None)
        self._end()

    def poll(self) -> Optional[int]:
        self.returncode = 0 if self.ended.is_set() else None
        return self.returncode

    def wait(self, timeout: Optional[float] = None) -> int:
        self.ended.wait(timeout)
        return 0

    def send_signal(self, _number: int) -> None:
        self._end()

    def terminate(self) -> None:
        self._end()

    def kill(self) -> None:
        self._end()


class _UnixResolver(Resolver):
    """Any name leads to one unix socket."""

    def initialize(self, path: str) -> None:
        self.path = path

    async def resolve(self, *_args: Any, **_options: Any) -> List[Tuple[int, Any]]:
        return [(int(socket.AF_UNIX), self.path)]


async def _watch(server: Any, protocol: str) -> None:
    """Serves, and asks for all of it."""
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener:
        path = f"{directory}/http.sock"
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)
        http = HTTPServer(server.web_app, xheaders=True)
        http.add_socket(listener)
        try:
            await _visit(server, path, protocol)
        finally:
            http.stop()
            await http.close_all_connections()
            await _tidy(server)


async def _visit(server: Any, path: str, protocol: str) -> None:
    for page in PAGES:
        await _request(server, path, "GET", page)
    wanted = {"path": "rehearsal.ipynb", "name": "rehearsal.ipynb", "type": "notebook", "kernel": {"name": "python3"}}
    session = json.loads(await _request(server, path, "POST", "api/sessions", json.dumps(wanted).encode()))
    if "kernel" not in session:
        return  # an image may have no such kernel, or one of another Python; its server is rehearsed all the same
    kernel_id = session["kernel"]["id"]
    url = f"ws://localhost{server.base_url}api/kernels/{kernel_id}/channels?session_id={uuid.uuid4()}"
    connection = await websocket_connect(
        HTTPRequest(url, headers=_headers(server)), resolver=_UnixResolver(path=path),
        subprotocols=[protocol] if protocol else None,
    )
    for kind, content in MESSAGES:
        await _ask(connection, kind, content, protocol)
    connection.close()
    for page in ("api/kernels", "api/sessions", f"api/kernels/{kernel_id}"):
        await _request(server, path, "GET", page)
    await _request(server, path, "DELETE", f"api/sessions/{session['id']}")


def _headers(server: Any) -> Dict[str, str]:
    return {"Authorization": f"token {server.web_app.settings['token']}"}


async def _request(server: Any, path: str, method: str, page: str, body: bytes = b"") -> bytes:
    """The body of what is answered, whatever the status."""
    reader, writer = await asyncio.open_unix_connection(path)
    said = {"Host": "localhost", "Connection": "close", "Content-Length": str(len(body)), **_headers(server)}
    head = "".join(f"{name}: {value}\r\n" for name, value in said.items())
    writer.write(f"{method} {server.base_url}{page} HTTP/1.1\r\n{head}\r\n".encode() + body)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer.partition(b"\r\n\r\n")[2]


async def _ask(connection: Any, kind: str, content: Dict[str, Any], protocol: str) -> None:
    """Sends a message to the kernel, and reads what comes until the kernel has replied and is idle again."""
    sent = uuid.uuid4().hex
    header = {"msg_id": sent, "msg_type": kind, "username": "", "session": "", "version": "5.4", "date": ""}
    message: Dict[str, Any] = {"header": header, "parent_header": {}, "metadata": {}, "content": content}
    if protocol:
        packed = serialize_msg_to_ws_v1(message, "shell", lambda part: json.dumps(part).encode())
    else:
        packed = json.dumps({**message, "channel": "shell", "buffers": []})
    await connection.write_message(packed, binary=bool(protocol))
    awaited = {kind.replace("_request", "_reply"), "idle"}
    while awaited:
        said = await connection.read_message()
        if said is None:
            raise ConnectionError(f"the websocket was closed after {kind} {content}")
        if isinstance(said, bytes):
            _channel, (header, parent, _metadata, body) = deserialize_msg_from_ws_v1(said)
            header, parent, body = json.loads(header), json.loads(parent), json.loads(body)
        else:
            whole = json.loads(said)
            header, parent, body = whole["header"], whole["parent_header"], whole["content"]
        if parent.get("msg_id") == sent:
            awaited -= {header["msg_type"], body.get("execution_state", "")}


async def _tidy(server: Any) -> None:
    """Takes back what the server holds of this: the zmq context, the sessions' database, threads."""
    kernels, sessions = server.kernel_manager, server.session_manager
    with contextlib.suppress(Exception):
        await _maybe(kernels.shutdown_all(now=True))
    # Both are made again when somebody needs them.
    if "context" in kernels._trait_values:
        kernels.context.destroy(linger=0)
        del kernels._trait_values["context"]
    if getattr(sessions, "_connection", None) is not None:
        sessions.close()
        sessions._connection.close()
        sessions._connection = None
    # A cache that keeps every handler that ever answered with a page, and with it its request and connection.
    with contextlib.suppress(AttributeError):
        LabHandler.get_page_config.cache_clear()
    await asyncio.get_running_loop().shutdown_default_executor()


async def _maybe(result: Any) -> None:
    if isinstance(result, Awaitable):
        await result
