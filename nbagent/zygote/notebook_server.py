"""The notebook server of a slot: JupyterLab on a socket it is handed, with a token nobody sees.

Runs inside an image, as the slot's user, under the image's own Python; started by exec (`cold`) or
forked when all is initialised (`zygote`). It finds, by number: LISTEN_FD, a bound and listening unix
socket; ACTIVITY_FD, the activity page; CONFIG_FD, a file of JSON {"base_url": str, "token": str}.
Neither the command line nor the environment holds the token, and the configuration is closed before
any code of the user runs.

What it adds to a stock JupyterLab: the activity page is written when a person or a kernel acts
(a browser tab that only polls is not acting), and kernels die before the server when memory ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import json
import logging
import os
import signal
import socket
import sys
from typing import Any, Callable, Dict, Optional, Set

# jsonschema imports it if it is there, to check the formats iri and iri-reference, which no schema of
# the server uses; it compiles a grammar on import, two thirds of a start's processor time and 15 MiB.
# jsonschema then does not check these formats. Kernels are processes of their own and not concerned.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

from jupyter_client import manager
from jupyter_server.auth.identity import PasswordIdentityProvider
from jupyter_server.services.kernels.connection import channels
from jupyter_server.services.kernels.kernelmanager import ServerKernelManager
from jupyterlab.labapp import LabApp
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPMessageDelegate, HTTPServerRequest
from tornado.ioloop import IOLoop
from tornado.routing import Router
from traitlets import default, observe
from traitlets.config import Config

from nbagent.linux.process import make_room_for_descriptors
from nbagent.sandbox.spec import ACTIVITY_FD, LISTEN_FD
from nbagent.wire import activity
from nbagent.zygote import provisioner

# Of 0 to 1000: the kernel's OOM killer takes a notebook's kernel long before its server.
KERNEL_OOM_SCORE_ADJ = 500
# A server with a kernel has 30, and 15 more for each other one.
DESCRIPTORS = 256
# What a page does by itself is read; what a person does writes.
ACTING_METHODS = frozenset({"POST", "PUT", "PATCH", "DELETE"})


class _Prompt:
    """The module asyncio for those who wait for kernels by sleeping: nobody sleeps through what he waits for.

    jupyter_client sleeps 10 ms after each start and each end of a kernel, "to ensure tests can capture the state before
    done" (in_pending_state); jupyter_server looks every 50 ms whether a kernel has left its first state (nudge).
    """

    def __init__(self) -> None:
        self._asleep: Set[asyncio.Future[None]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, delay: float, result: Any = None) -> Any:
        if delay <= 0.01:
            return await asyncio.sleep(0, result)
        change = asyncio.get_running_loop().create_future()
        self._asleep.add(change)
        try:
            await asyncio.wait([change], timeout=delay)
        finally:
            self._asleep.discard(change)
        return result

    def wake(self) -> None:
        """Something about a kernel has changed."""
        for change in self._asleep:
            if not change.done():
                change.set_result(None)


_prompt = _Prompt()
manager.asyncio = channels.asyncio = _prompt


class SlotIdentityProvider(PasswordIdentityProvider):
    """Knows a browser again by a cookie that is this slot's alone.

    The router passes no other login on. Where the slot has an origin of its own, by TLS, the
    cookie's name begins with __Host-, and browsers then let nobody but this origin set it.
    """

    def get_cookie_name(self, handler: Any) -> str:
        name = "nbagent-" + _slot_of(handler)
        return "__Host-" + name if _has_own_origin(handler) else name

    def set_login_cookie(self, handler: Any, user: Any) -> None:
        self.cookie_options = {"path": "/"} if _has_own_origin(handler) else {}
        super().set_login_cookie(handler, user)


def _slot_of(handler: Any) -> str:
    return str(handler.base_url).strip("/").rpartition("/")[2]


def _has_own_origin(handler: Any) -> bool:
    host = str(handler.request.host)
    return bool(handler.request.protocol == "https" and host.startswith(_slot_of(handler) + "."))


class SlotKernelManager(ServerKernelManager):
    """A kernel whose acts are noted on the activity page."""

    # jupyter_server 2.21 lists a kernel before it has set this, a trait without a default, and
    # answers 500 to a page that asks for the list just then.
    @default("last_activity")
    def _starts_now(self) -> datetime.datetime:
        return datetime.datetime.now(datetime.timezone.utc)

    @observe("execution_state", "last_activity")
    def _acted(self, _change: Any) -> None:
        _prompt.wake()
        activity.write(ACTIVITY_FD, _busy(self.parent))

    # What jupyter_client calls after a start and after a restart, its own after an OOM kill included.
    async def _async_post_start_kernel(self, **kwargs: Any) -> None:
        await super()._async_post_start_kernel(**kwargs)
        if pid := getattr(self.provisioner, "pid", None):
            # It may have ended by now.
            gone = (ProcessLookupError, FileNotFoundError)
            with contextlib.suppress(*gone), open(f"/proc/{pid}/oom_score_adj", "w") as file:
                file.write(str(KERNEL_OOM_SCORE_ADJ))

    async def shutdown_kernel(self, *args: Any, **kwargs: Any) -> Any:
        result = await super().shutdown_kernel(*args, **kwargs)
        self.execution_state = "dead"
        return result


def _busy(kernels: Any) -> int:
    """How many kernels of a MappingKernelManager are busy."""
    managers = (kernels.get_kernel(kernel_id) for kernel_id in kernels.list_kernel_ids())
    return sum(getattr(manager, "execution_state", None) == "busy" for manager in managers)


def _note_requests(server: Any) -> None:
    """Makes a request that changes something, or input to a terminal, count as an act."""
    log_request = server.web_app.settings["log_function"]

    def note_and_log(handler: Any) -> None:
        if handler.request.method in ACTING_METHODS:
            activity.write(ACTIVITY_FD, _busy(server.kernel_manager))
        log_request(handler)

    server.web_app.settings["log_function"] = note_and_log
    try:
        from jupyter_server_terminals.handlers import TermSocket
    except ImportError:
        return
    on_message = TermSocket.on_message

    async def note_and_pass_on(handler: Any, message: Any) -> None:
        activity.write(ACTIVITY_FD, _busy(server.kernel_manager))
        await on_message(handler, message)

    TermSocket.on_message = note_and_pass_on


def _keep_out_of_log(log: logging.Logger, settings: Dict[str, Any]) -> None:
    """Hides the token in what the server logs: tornado writes the whole address of a request that failed."""
    def hide(record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(settings["token"], "..."), None
        return True

    for handler in log.handlers:
        handler.addFilter(hide)


def configuration(base_url: str, token: str) -> Config:
    """The traits of a slot's server."""
    config = Config()
    server = config.ServerApp
    server.base_url = base_url
    server.allow_remote_access = True  # a unix socket is no loopback address to it, so any Host is
    server.trust_xheaders = True
    server.open_browser = False
    server.quit_button = False
    server.port_retries = 0
    server.websocket_compression_options = None
    server.identity_provider_class = f"{__name__}.SlotIdentityProvider"
    config.IdentityProvider.token = token
    config.AsyncMappingKernelManager.kernel_manager_class = f"{__name__}.SlotKernelManager"
    provisioner.register()
    config.KernelProvisionerFactory.default_provisioner_name = provisioner.NAME
    config.LabApp.news_url = None
    config.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
    return config


def read_settings(fd: int) -> Dict[str, str]:
    """The configuration of the slot, after which its descriptor is closed."""
    with open(fd) as file:
        return dict(json.load(file))


def initialise(base_url: str, token: str) -> Any:
    """A ServerApp that is ready to serve, with an event loop that does not run."""
    server = LabApp.make_serverapp(
        jpserver_extensions={"jupyterlab": True}, config=configuration(base_url, token)
    )
    # Both would write the token to a file, for nobody to read.
    server.write_server_info_file = lambda: None
    server.write_browser_open_files = lambda: None
    server.initialize([], starter_extension=LabApp.name, new_httpserver=False)
    _note_requests(server)
    _keep_out_of_log(server.log, server.web_app.settings)
    return server


def put_loop_away(server: Any) -> None:
    """Closes the event loop that a server was initialised with, before a fork: loops have descriptors."""
    server.io_loop.close()
    asyncio.set_event_loop(None)


def serve(server: Any, application: Any, serving: Callable[[], None] = lambda: None) -> None:
    """Serves `application`, all requests of the slot's socket, until SIGTERM; calls `serving` when its loop turns."""
    listener = socket.socket(fileno=LISTEN_FD)
    make_room_for_descriptors(DESCRIPTORS)
    listener.setblocking(False)  # tornado accepts until there is nobody left to accept
    server._http_server = _http_server(server, application)
    server._http_server.add_socket(listener)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What is there now stays, and need not be looked at by every full collection to come.
    gc.freeze()
    gc.enable()
    # What it says when it starts, addresses that are none of a slot's, says nothing to anybody.
    level = server.log.level
    server.log.setLevel(logging.WARNING)
    server.io_loop.add_callback(server.log.setLevel, level)
    server.io_loop.add_callback(serving)
    server.start()


def _http_server(server: Any, application: Any) -> HTTPServer:
    return HTTPServer(
        application, xheaders=True, max_body_size=server.max_body_size, max_buffer_size=server.max_buffer_size
    )


class Renamed(Router):
    """An application that was made for one address and is served at another.

    Only the choice of the handler is made by the former; the handler has the request as it came.
    """

    def __init__(self, application: Any, made_for: str, base_url: str) -> None:
        self.application, self.made_for, self.base_url = application, made_for, base_url

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Optional[HTTPMessageDelegate]:
        asked = request.path
        if not (asked + "/").startswith(self.base_url):
            return None
        request.path = self.made_for + asked[len(self.base_url):]
        try:
            found: Optional[HTTPMessageDelegate] = self.application.find_handler(request, **kwargs)
            return found
        finally:
            request.path = asked


def adopt(server: Any, made_for: str, base_url: str) -> Renamed:
    """What a forked server serves: nothing in it is another's, and it has a loop of its own."""
    asyncio.set_event_loop(asyncio.new_event_loop())
    server.io_loop = IOLoop.current()
    settings = server.web_app.settings
    server.cookie_secret = settings["cookie_secret"] = os.urandom(32)
    settings["started"] = settings["last_activity"] = datetime.datetime.now(datetime.timezone.utc)
    return Renamed(server.web_app, made_for, base_url)
