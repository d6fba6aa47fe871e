# SPDX-License-Identifier: BSD-3-Clause
"""`nbagent image check`: tries an image by one slot, as its users will, and lists the results.

The slot is claimed by the control API of this host and ended afterwards. A try that fails is a result, and not an
error of the command.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nbagent.cli.remote import Remote
from nbagent.cli.slot_client import Response, SlotClient, Websocket
from nbagent.core import paths
from nbagent.core.errors import ImageNotFound
from nbagent.core.events import Event
from nbagent.core.quantities import format_size
from nbagent.untrusted.refusal import plain

COLUMNS = ("CHECK", "RESULT", "FOUND")
OK, WARN, FAIL = "ok", "warn", "fail"
ZYGOTE_WAIT_S = 120.0
# Reasons of nbagent.supervisor.zygotes; a busy host has a zygote without a warm-up first.
_TEMPORARY = ("its zygote is being started", "its zygote has no warm-up")
# The zygote's second try, if the first one fails, begins after pool.backoff.
_POLL_S = 0.5
_CELL_WAIT_S = 60.0
_HANDLER_WAIT_S = 10.0
_HANDLERS_MAX = 300
_TEXT_MAX = 200
_FILE = "nbagent-check"
# Runs in the slot under the server's Python, in another server than the slot's, which does not listen. Prints the
# paths without parameters for which an extension has a GET handler, each with the handler's module.
_HANDLERS = r"""
import json, re, sys
from jupyterlab.labapp import LabApp
from tornado.web import RequestHandler
from tornado.websocket import WebSocketHandler
app = LabApp.make_serverapp(jpserver_extensions={"jupyterlab": True})
app.initialize(["--ServerApp.base_url=/", "--ServerApp.port=0"], new_httpserver=False)
found = {}
def walk(router):
    for rule in router.rules:
        target, regex = rule.target, getattr(rule.matcher, "regex", None)
        if hasattr(target, "rules"):
            walk(target)
        elif isinstance(target, type) and issubclass(target, RequestHandler) and regex is not None:
            path = regex.pattern.rstrip("$").removesuffix("/?").replace("\\/", "/").replace("\\.", ".")
            path = path.replace("\\-", "-")
            if (re.fullmatch(r"/[A-Za-z0-9/._@-]+", path) and target.get is not RequestHandler.get
                    and not issubclass(target, WebSocketHandler)):
                found.setdefault(path[1:], target.__module__)
walk(app.web_app.wildcard_router)
walk(app.web_app.default_router)
print("HANDLERS" + json.dumps(found))
"""
# These end the session or the server, or wait for events by design.
_NOT_TRIED = {"logout", "api/shutdown", "lab/api/shutdown", "api/events"}


@dataclass(frozen=True)
class Result:
    """The result of one check."""

    check: str
    status: str
    found: str


def check(remote: Remote, name: str) -> Iterator[Result]:
    """Claims a slot of an image, and yields results as they are found. Raises NbagentError."""
    image = _image(remote, name)
    began_s = time.monotonic()
    claim = remote.call("POST", "/claim", {"image": name})
    claimed_s = time.monotonic() - began_s
    try:
        slot = remote.call("GET", f"/slots/{claim['slot']}")
        yield _launch(image, slot)
        if slot["launch"] == "fork":
            yield from _left_out(name)
        yield _start(claim["slot"], claimed_s)
        yield Result("memory at rest", OK, _memory(slot))
        base = f"/user/{claim['slot']}/"
        client = SlotClient(paths.SLOTS / claim["slot"] / "http.sock", base, claim["token"])
        yield _tried("page", lambda: _page(client, claim, base))
        if _has_jupyter(client):
            yield from _jupyter(client, lambda: _memory(remote.call("GET", f"/slots/{claim['slot']}")))
    finally:
        remote.call("DELETE", f"/slots/{claim['slot']}")


def _image(remote: Remote, name: str) -> dict[str, Any]:
    """The image's document, when its complete zygote forks or has failed, or none is ready within ZYGOTE_WAIT_S."""
    until_s = time.monotonic() + ZYGOTE_WAIT_S
    while True:
        image = next((image for image in remote.call("GET", "/images") if image["name"] == name), None)
        if image is None:
            raise ImageNotFound(f"no image has the name {name!r}", image=name)
        if not any(reason in image["launch_reason"] for reason in _TEMPORARY) or time.monotonic() > until_s:
            return dict(image)
        time.sleep(_POLL_S)


def _launch(image: dict[str, Any], slot: dict[str, Any]) -> Result:
    reason = slot["launch_reason"] or image["launch_reason"]
    status = WARN if image["launch"] == "fork" and slot["launch"] != "fork" else OK
    return Result("launch", status, slot["launch"] + (f": {plain(reason, 1000)}" if reason else ""))


def _start(slot: str, claimed_s: float) -> Result:
    """The time of the start, which the journal has, because the slot may have been warm before the claim."""
    took = ""
    with contextlib.suppress(ValueError, KeyError, IndexError):
        took = f"started in {int(_entries(f'NBAGENT_SLOT={slot}', Event.SLOT_WARM)[-1]['NBAGENT_TOOK_MS']):,} ms, "
    return Result("start", OK, f"{took}claimed in {claimed_s * 1000:,.0f} ms")


def _left_out(name: str) -> Iterator[Result]:
    """The modules and extensions that the image's last zygote has not loaded, with the reasons, from the journal."""
    entries = _entries(f"NBAGENT_IMAGE={name}", Event.ZYGOTE_READY, Event.ZYGOTE_LEFT_OUT)
    ready = [entry for entry in entries if entry.get("MESSAGE_ID") == Event.ZYGOTE_READY.value.message_id]
    for entry in entries:
        left_out = entry.get("MESSAGE_ID") == Event.ZYGOTE_LEFT_OUT.value.message_id
        if left_out and ready and entry.get("NBAGENT_ZYGOTE") == ready[-1].get("NBAGENT_ZYGOTE"):
            yield Result("zygote", WARN, plain(str(entry.get("NBAGENT_TEXT")), 1000))


def _entries(match: str, *events: Event) -> list[dict[str, Any]]:
    """The journal's entries with a field and one of these events; none where this user may not read it."""
    messages = [f"MESSAGE_ID={event.value.message_id}" for event in events]
    command = ["journalctl", "--quiet", "--output=json", "--unit=nbagent.service", match, *messages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _memory(slot: dict[str, Any]) -> str:
    used = slot.get("memory_bytes")
    return "unknown" if used is None else f"{format_size(used)} of {format_size(slot['limits']['memory_bytes'])}"


def _tried(name: str, attempt: Callable[[], Result]) -> Result:
    began_s = time.monotonic()
    try:
        return attempt()
    except TimeoutError:
        return Result(name, FAIL, f"no response in {time.monotonic() - began_s:.0f} s")
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        return Result(name, FAIL, plain(f"{type(error).__name__}: {error}", _TEXT_MAX))


def _page(client: SlotClient, claim: dict[str, Any], base: str) -> Result:
    url = str(claim["url"])
    path = url[url.index(base) + len(base):] if base in url else ""
    response = client.request("GET", path, timeout_s=_CELL_WAIT_S)
    status = OK if response.status < 400 else FAIL
    return Result("page", status, f"{path.partition('?')[0] or '/'}: status {response.status} in {_ms(response)}")


def _ms(response: Response) -> str:
    return f"{response.took_s * 1000:,.0f} ms"


def _has_jupyter(client: SlotClient) -> bool:
    try:
        return "version" in client.request("GET", "api").json()
    except (OSError, ValueError, TypeError, http.client.HTTPException):
        return False


def _jupyter(client: SlotClient, memory: Callable[[], str]) -> Iterator[Result]:
    handlers: dict[str, str] = {}
    yield _tried("kernel", lambda: _kernel(client, memory, handlers))
    if handlers:  # the default kernel is Python
        yield _tried("interrupt", lambda: _interrupt(client))
    yield _tried("terminal", lambda: _terminal(client))
    yield _tried("files", lambda: _files(client))
    if handlers:
        yield from _handlers(client, handlers)
    else:
        yield Result("handlers", WARN, "not tried: the default kernel is not Python, or could not list them")


def _kernel(client: SlotClient, memory: Callable[[], str], handlers: dict[str, str]) -> Result:
    """Runs a cell in the default kernel; fills in `handlers`."""
    began_s = time.monotonic()
    response = client.request("POST", "api/kernels", {}, _CELL_WAIT_S)
    if response.status != http.HTTPStatus.CREATED:
        return Result("kernel", FAIL, f"status {response.status}")
    kernel = response.json()["id"]
    try:
        with client.websocket(f"api/kernels/{kernel}/channels?session_id={uuid.uuid4().hex}") as socket:
            output = _run(socket, "print(6 * 7)")
            took_s = time.monotonic() - began_s
            used = memory()
            if output.strip() != "42":
                return Result("kernel", FAIL, f"6 * 7 is {plain(output.strip(), _TEXT_MAX)} instead of 42")
            # sys.executable may be the Python of another environment; then the import fails, and nothing is listed.
            with contextlib.suppress(OSError, ValueError):
                listed = _run(socket, _listing())
                handlers.update(json.loads(listed.partition("HANDLERS")[2] or "{}"))
            return Result("kernel", OK, f"a cell ran {took_s * 1000:,.0f} ms after the request; memory {used}")
    finally:
        client.request("DELETE", f"api/kernels/{kernel}")


def _listing() -> str:
    run = f"[sys.executable, '-c', {_HANDLERS!r}]"
    return (
        f"import subprocess, sys\nprint(subprocess.run({run}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,"
        " stderr=subprocess.DEVNULL, text=True, timeout=50).stdout)"
    )


def _interrupt(client: SlotClient) -> Result:
    """Interrupts a cell that sleeps, and restarts its kernel."""
    kernel = client.request("POST", "api/kernels", {}, _CELL_WAIT_S).json()["id"]
    path = f"api/kernels/{kernel}"
    times: list[float] = []

    def interrupt() -> None:
        times.append(time.monotonic())
        client.request("POST", f"{path}/interrupt", {})

    try:
        with client.websocket(f"{path}/channels?session_id={uuid.uuid4().hex}") as socket:
            output = _run(socket, "print('begun', flush=True)\nimport time\ntime.sleep(600)", interrupt)
        took_ms = (time.monotonic() - times[0]) * 1000
        if "KeyboardInterrupt" not in output:
            return Result("interrupt", FAIL, f"a cell that sleeps ended with {plain(output, _TEXT_MAX)}")
        response = client.request("POST", f"{path}/restart", {}, _CELL_WAIT_S)
        with client.websocket(f"{path}/channels?session_id={uuid.uuid4().hex}") as socket:
            output = _run(socket, "print('time' in globals())").strip()
        if response.status != http.HTTPStatus.OK or output != "False":
            return Result("interrupt", FAIL, f"a restart has status {response.status}; names remain: {output}")
        return Result("interrupt", OK, f"a cell that sleeps ended in {took_ms:,.0f} ms, and its kernel restarted")
    finally:
        client.request("DELETE", path)


def _run(socket: Websocket, code: str, at_output: Callable[[], None] | None = None) -> str:
    """The output of a cell; `at_output` is called at its first output. Raises TimeoutError, OSError."""
    header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "username": "", "session": uuid.uuid4().hex,
              "version": "5.3", "date": ""}
    content = {"code": code, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
    socket.send({"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"})
    output, has_reply, is_idle = "", False, False
    for message in socket.messages(time.monotonic() + _CELL_WAIT_S):
        if message["parent_header"].get("msg_id") != header["msg_id"]:
            continue
        kind, body = message["header"]["msg_type"], message["content"]
        if kind == "stream":
            output += body["text"]
            if at_output is not None:
                at_output()
                at_output = None
        elif kind == "error":
            output += f"{body['ename']}: {body['evalue']}"
        has_reply = has_reply or kind == "execute_reply"
        is_idle = is_idle or (kind == "status" and body["execution_state"] == "idle")
        if has_reply and is_idle:
            break
    return output


def _terminal(client: SlotClient) -> Result:
    response = client.request("POST", "api/terminals", {})
    if response.status == http.HTTPStatus.NOT_FOUND:
        return Result("terminal", WARN, "the image has no terminals (jupyter_server_terminals)")
    if response.status not in (http.HTTPStatus.OK, http.HTTPStatus.CREATED):
        return Result("terminal", FAIL, f"status {response.status}")
    name, output, began_s = response.json()["name"], "", time.monotonic()
    try:
        with client.websocket(f"terminals/websocket/{name}") as socket:
            socket.send(["stdin", "echo $((6 * 7))is\r"])
            for message in socket.messages(time.monotonic() + _CELL_WAIT_S):
                output += str(message[1]) if message[0] == "stdout" else ""
                if "42is" in output:
                    break
    finally:
        client.request("DELETE", f"api/terminals/{name}")
    return Result("terminal", OK, f"a command ran in {(time.monotonic() - began_s) * 1000:,.0f} ms")


def _files(client: SlotClient) -> Result:
    """Creates, renames and deletes a file and a directory with a file."""
    steps = (
        ("PUT", f"{_FILE}.txt", {"type": "file", "format": "text", "content": "x"}),
        ("PATCH", f"{_FILE}.txt", {"path": f"{_FILE}-2.txt"}),
        ("DELETE", f"{_FILE}-2.txt", None),
        ("PUT", _FILE, {"type": "directory"}),
        ("PUT", f"{_FILE}/x.txt", {"type": "file", "format": "text", "content": "x"}),
        ("PATCH", _FILE, {"path": f"{_FILE}-2"}),
        ("DELETE", f"{_FILE}-2/x.txt", None),
        ("DELETE", f"{_FILE}-2", None),
    )
    for method, path, body in steps:
        response = client.request(method, f"api/contents/{path}", body)
        if response.status >= 300:
            return Result("files", FAIL, f"{method} {path}: status {response.status}")
    return Result("files", OK, "a file and a directory were created, renamed and deleted")


def _handlers(client: SlotClient, found: dict[str, str]) -> Iterator[Result]:
    """Requests each handler of an extension once. One without a response was broken by a fork, or needs a network."""
    tried = sorted(path for path in found if path not in _NOT_TRIED)[:_HANDLERS_MAX]

    def status_of(path: str) -> int:
        try:
            return client.request("GET", path, timeout_s=_HANDLER_WAIT_S).status
        except TimeoutError:
            return 0
        except (OSError, http.client.HTTPException):
            return -1

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        statuses = dict(zip(tried, threads.map(status_of, tried), strict=True))
    for path, status in statuses.items():
        where = f"{plain(path)} of {plain(str(found[path]))}"
        if status == 0:
            yield Result("handlers", FAIL, f"GET {where}: no response in {_HANDLER_WAIT_S:.0f} s")
        elif status < 0:
            yield Result("handlers", FAIL, f"GET {where}: the connection was closed")
        elif status >= 500:
            yield Result("handlers", WARN, f"GET {where}: status {status}")
    responded = sum(0 < status < 500 for status in statuses.values())
    yield Result("handlers", OK, f"{responded} of {len(tried)} responded")
