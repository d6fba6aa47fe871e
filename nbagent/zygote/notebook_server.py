# SPDX-License-Identifier: BSD-3-Clause
"""The notebook server of a slot: JupyterLab on an inherited socket.

Runs inside an image, as the slot's user, under the image's own Python; started by exec (`exec_main`) or
forked from an initialised server (`zygote`). It inherits three descriptors: LISTEN_FD, a listening unix socket;
ACTIVITY_FD, the activity page; CONFIG_FD, a file of JSON {"base_url": str, "token": str}. The token is neither in the
command line nor in the environment, and CONFIG_FD is closed before any code of the user runs, so that no code of the
user can read it there.

Some things differ from a stock JupyterLab. The activity page is written when a user is active (the polling of an idle
browser tab does not count), or a kernel; `slot_kernels` has this and what else is different about kernels.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import gc
import json
import logging
import os
import re
import shutil
import signal
import site
import socket
import sys
from typing import Any, Callable, Dict, Iterable, Optional

# jsonschema imports this package where it is installed, to check the formats iri and iri-reference, which no schema of
# the server uses. On import it compiles a grammar, which takes two thirds of a start's processor time and 15 MiB.
# Without it jsonschema skips these formats. Kernels can import it, because a forked kernel removes the entry.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

from jupyter_server.auth.identity import PasswordIdentityProvider
from jupyterlab.labapp import LabApp
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPMessageDelegate, HTTPServerRequest
from tornado.ioloop import IOLoop
from tornado.routing import Router, Rule, URLSpec
from traitlets.config import Config

from nbagent.linux.process import make_room_for_descriptors
from nbagent.sandbox.spec import ACTIVITY_FD, LISTEN_FD
from nbagent.wire import activity
from nbagent.wire.limits_page import LimitVariables
from nbagent.zygote import (
    answers,
    assets,
    first_answers,
    installed,
    linked_notebook,
    page,
    provisioner,
    refusals,
    shown_limits,
)
from nbagent.zygote.acts import is_act
from nbagent.zygote.kept_loop import KeptLoop
from nbagent.zygote.slot_kernels import SlotKernelConnection, SlotKernelManager, SlotKernels, busy

# A server with one kernel has 30 descriptors, and 15 more for each further kernel.
DESCRIPTORS = 256
MESSAGE_MAX_BYTES = 64 << 20
# Modules whose scheduled callbacks run in the zygote and not in each slot, because their result is the same there.
# jupyter_lsp, a dependency of JupyterLab, looks for language servers among the entry points and programs of the image,
# which takes 0.1 to 0.3 s of a processor and 3 MiB.
RUN_IN_ZYGOTE, RUN_TIMEOUT_S = ("jupyter_lsp.serverextension",), 10.0


class SlotIdentityProvider(PasswordIdentityProvider):
    """Uses a login cookie whose name contains the slot's id, because the router passes only such a cookie on.

    Where the slot has an origin of its own, with TLS, the name begins with __Host-, so that browsers accept the cookie
    from this origin only.
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


def _note_requests(server: Any) -> None:
    """Writes the activity page on each request that is a person's act and on each message to a terminal."""
    log_request = server.web_app.settings["log_function"]

    def note_and_log(handler: Any) -> None:
        request = handler.request
        path = request.path.partition(_slot_of(handler) + "/")[2]
        if is_act(request.method, path, handler.get_status(), _has_user(handler)):
            activity.write(ACTIVITY_FD, busy(server.kernel_manager))
        log_request(handler)

    server.web_app.settings["log_function"] = note_and_log
    try:
        from jupyter_server_terminals.handlers import TermSocket
    except ImportError:
        return
    on_message = TermSocket.on_message

    async def note_and_pass_on(handler: Any, message: Any) -> None:
        activity.write(ACTIVITY_FD, busy(server.kernel_manager))
        await on_message(handler, message)

    TermSocket.on_message = note_and_pass_on


def _has_user(handler: Any) -> bool:
    """Whether the request has a login: the token, or the cookie."""
    try:
        return handler.current_user is not None
    except Exception:  # Jupyter's handlers raise it for a request that was refused before its login was read
        return False


def _keep_out_of_log(log: logging.Logger, settings: Dict[str, Any]) -> None:
    """Replaces the token in the server's log entries, because tornado logs the URL of a failed request."""
    def hide(record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(settings["token"], "..."), None
        return True

    for handler in log.handlers:
        handler.addFilter(hide)


def configuration(base_url: str, token: str) -> Config:
    """The server's configuration as traits."""
    config = Config()
    server = config.ServerApp
    server.base_url = base_url
    server.allow_remote_access = True  # otherwise a request with a public Host header gets status 403
    server.trust_xheaders = True
    server.open_browser = False
    server.quit_button = False
    server.port_retries = 0
    server.websocket_compression_options = None
    server.identity_provider_class = f"{__name__}.SlotIdentityProvider"
    config.IdentityProvider.token = token
    config.AsyncMappingKernelManager.kernel_manager_class = f"{SlotKernelManager.__module__}.SlotKernelManager"
    server.kernel_manager_class = SlotKernels
    server.kernel_websocket_connection_class = SlotKernelConnection
    provisioner.register()
    config.KernelProvisionerFactory.default_provisioner_name = provisioner.NAME
    # JupyterLab shows no trash, so that deleted files would use the slot's storage until it ends.
    config.FileContentsManager.delete_to_trash = False
    config.FileContentsManager.always_delete_dir = True
    config.LabApp.news_url = None
    config.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
    return config


def read_settings(fd: int) -> Dict[str, str]:
    """Reads the slot's configuration and closes the descriptor."""
    with open(fd) as file:
        return dict(json.load(file))


def initialise(base_url: str, token: str) -> Any:
    """An initialised ServerApp, whose event loop does not run yet."""
    answers.keep_answers()
    server = LabApp.make_serverapp(
        jpserver_extensions={"jupyterlab": True}, config=configuration(base_url, token)
    )
    # Both write the token to a file that nothing in a slot needs.
    server.write_server_info_file = lambda: None
    server.write_browser_open_files = lambda: None
    server.initialize([], starter_extension=LabApp.name, new_httpserver=False)
    if shutil.which("node") is None:
        # JupyterLab cannot be built, and the check for a due build fails; so the page need not request it.
        server.web_app.settings.setdefault("page_config_data", {})["buildCheck"] = False
    # An upload widget sends a file as one message; tornado's own limit is 10 MiB. Not in the configuration, where it
    # would replace the tornado_settings of the image.
    server.web_app.settings.setdefault("websocket_max_message_size", MESSAGE_MAX_BYTES)
    _note_requests(server)
    assets.install(server, next(iter(server.extension_manager.extension_apps["jupyterlab"])).static_dir)
    page.install(server.web_app.settings)
    refusals.answer()
    linked_notebook.install(server)
    first_answers.install(server)
    shown_limits.install(server.web_app.settings)
    _keep_out_of_log(server.log, server.web_app.settings)
    return server


def release_loop(server: Any) -> KeptLoop:
    """Closes the descriptors of the server's event loop before a fork, because forked processes would share them."""
    loop = KeptLoop(server.io_loop.asyncio_loop)
    for error in loop.run(RUN_IN_ZYGOTE, RUN_TIMEOUT_S):
        server.log.warning("a callback of an extension failed, and runs in each slot instead: %r", error)
    loop.release()
    return loop


def serve(server: Any, application: Any, on_serving: Callable[[], None] = lambda: None) -> None:
    """Serves `application` on LISTEN_FD until SIGTERM; calls `on_serving` when the event loop runs."""
    # Children that an extension starts by multiprocessing, with spawn or forkserver, execute the file of __main__ anew
    # as __mp_main__. That of a zygote or of exec_main would load a server in each of them. Without a file they skip it.
    vars(sys.modules["__main__"]).pop("__file__", None)
    installed.note()
    _make_files(server)
    _apply_limits(server)
    listener = socket.socket(fileno=LISTEN_FD)
    make_room_for_descriptors(DESCRIPTORS)
    listener.setblocking(False)  # tornado accepts connections until EAGAIN
    server._http_server = _http_server(server, application)
    server._http_server.add_socket(listener)
    # A handler without effect, because terminals and kernels by exec would inherit an ignored SIGINT: bash then starts
    # all its programs with it ignored, so that Ctrl-C ends none of them.
    signal.signal(signal.SIGINT, lambda *_: None)
    # Full collections need not traverse the objects that exist now, because these stay.
    gc.freeze()
    gc.enable()
    # The URLs that the server logs when it starts do not exist in a slot, so its log level is raised meanwhile.
    level = server.log.level
    server.log.setLevel(logging.WARNING)
    server.io_loop.add_callback(server.log.setLevel, level)
    server.io_loop.add_callback(on_serving)
    server.start()


def _make_files(server: Any) -> None:
    """Makes Jupyter's directories, and the key that signs notebooks, without which none can be opened: at the start,
    because later the storage may be full. The directories that a zygote made are in its own home.

    Also that of the user's packages, where pip installs because the image is read-only: a Python imports from there
    only if it was there when it started, so that otherwise a kernel would not find what its own cell has installed.
    """
    for directory in (server.runtime_dir, server.data_dir):
        os.makedirs(directory, mode=0o700, exist_ok=True)
    if site.ENABLE_USER_SITE:
        with contextlib.suppress(OSError):  # the image may have a file there
            os.makedirs(site.getusersitepackages(), exist_ok=True)
    with contextlib.suppress(FileExistsError):
        path = os.path.join(server.data_dir, "notebook_secret")
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(base64.encodebytes(os.urandom(1024)))


def _apply_limits(server: Any) -> None:
    """Sets the variables for the slot's limits now, and before each start of a kernel or a terminal."""
    apply = LimitVariables(ACTIVITY_FD).apply
    apply(os.environ)
    provisioner.use_limits(apply)
    shown_limits.follow(apply)
    terminals = server.web_app.settings.get("terminal_manager")
    if (make_environment := getattr(terminals, "make_term_env", None)) is not None:
        def make_limited_environment(*arguments: Any, **options: Any) -> Any:
            apply(os.environ)
            return make_environment(*arguments, **options)

        terminals.make_term_env = make_limited_environment


def _http_server(server: Any, application: Any) -> HTTPServer:
    return HTTPServer(
        application, xheaders=True, max_body_size=server.max_body_size, max_buffer_size=server.max_buffer_size
    )


class RebasedRouter(Router):
    """Serves an application initialised with `initial_base_url` below `base_url`.

    The path is replaced only while the application selects a handler; the handler gets the original request.
    """

    def __init__(self, application: Any, initial_base_url: str, base_url: str) -> None:
        self.application, self.initial_base_url, self.base_url = application, initial_base_url, base_url

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Optional[HTTPMessageDelegate]:
        path = request.path
        if not (path + "/").startswith(self.base_url):
            return None
        request.path = self.initial_base_url + path[len(self.base_url):]
        try:
            handler: Optional[HTTPMessageDelegate] = self.application.find_handler(request, **kwargs)
            return handler
        finally:
            request.path = path

    def rebased(self, handler: Any) -> Any:
        """A handler whose pattern begins with `base_url`, for the application that knows `initial_base_url` only."""
        is_rule = isinstance(handler, Rule)
        pattern = handler.matcher.regex.pattern if is_rule else handler[0]
        for own, initial in ((self.base_url, self.initial_base_url),
                             (re.escape(self.base_url), re.escape(self.initial_base_url))):
            if pattern.lstrip("^").startswith(own):
                pattern = pattern.replace(own, initial, 1)
                return URLSpec(pattern, handler.target, handler.target_kwargs, handler.name) if is_rule else (
                    pattern, *handler[1:])
        return handler


def load_after_fork(
    server: Any, names: Iterable[str], imported: Iterable[str], application: RebasedRouter
) -> None:
    """Loads the extensions that the zygote has not, in the slot, as its user; `imported` are new to the server."""
    _make_files(server)  # because an extension may open a file in Jupyter's directories
    add_handlers = server.web_app.add_handlers

    def add_rebased(host: str, handlers: Any) -> Any:
        return add_handlers(host, [application.rebased(handler) for handler in handlers])

    server.web_app.add_handlers = add_rebased
    try:
        for name in imported:
            server.extension_manager.add_extension(name, enabled=True)
            server.extension_manager.link_extension(name)
        for name in names:
            server.extension_manager.load_extension(name)
    finally:
        del server.web_app.add_handlers


def reinitialise(server: Any, loop: KeptLoop, initial_base_url: str, base_url: str) -> RebasedRouter:
    """Gives a forked server its event loop, cookie secret and times; returns the application to serve."""
    if not loop.restore():
        server.io_loop = IOLoop.current()
    settings = server.web_app.settings
    server.cookie_secret = settings["cookie_secret"] = os.urandom(32)
    settings["started"] = settings["last_activity"] = datetime.datetime.now(datetime.timezone.utc)
    return RebasedRouter(server.web_app, initial_base_url, base_url)
