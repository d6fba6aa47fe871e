"""The notebook server of a slot: JupyterLab on a socket it is handed, with a token nobody sees.

    python3 -I notebook.py

Runs inside an image, as the slot's user, under the image's own Python. It finds, by number:
LISTEN_FD, a bound and listening unix socket; ACTIVITY_FD, the activity page; CONFIG_FD, a file
of JSON {"base_url": str, "token": str}. Neither the command line nor the environment holds the
token, and the configuration is closed before any code of the user runs.

What it adds to a stock JupyterLab: the activity page is written when a person or a kernel acts
(a browser tab that only polls is not acting), and kernels die before the server when memory ends.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import logging
import os
import signal
import socket
import sys
from typing import Any, Dict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
# jsonschema imports it if it is there, to check the formats iri and iri-reference, which no schema of
# the server uses; it compiles a grammar on import, two thirds of a start's processor time and 15 MiB.
# jsonschema then does not check these formats. Kernels are processes of their own and not concerned.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]
# A start makes objects and no garbage to speak of: looking for it is a tenth of its processor time.
gc.disable()

from jupyter_server.auth.identity import PasswordIdentityProvider
from jupyter_server.services.kernels.kernelmanager import ServerKernelManager
from jupyterlab.labapp import LabApp
from tornado.httpserver import HTTPServer
from traitlets import default, observe
from traitlets.config import Config

from nbagent import activity
from nbagent.sandbox.spec import ACTIVITY_FD, CONFIG_FD, LISTEN_FD

# Of 0 to 1000: the kernel's OOM killer takes a notebook's kernel long before its server.
KERNEL_OOM_SCORE_ADJ = 500
# What a page does by itself is read; what a person does writes.
ACTING_METHODS = frozenset({"POST", "PUT", "PATCH", "DELETE"})


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
        activity.write(ACTIVITY_FD, _busy(self.parent))

    # What jupyter_client calls after a start and after a restart, its own after an OOM kill included.
    async def _async_post_start_kernel(self, **kwargs: Any) -> None:
        await super()._async_post_start_kernel(**kwargs)
        if pid := getattr(self.provisioner, "pid", None):
            with contextlib.suppress(ProcessLookupError), open(f"/proc/{pid}/oom_score_adj", "w") as file:
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


def _keep_out_of_log(log: logging.Logger, token: str) -> None:
    """Hides the token in what the server logs: tornado writes the whole address of a request that failed."""
    def hide(record: logging.LogRecord) -> bool:
        record.msg, record.args = record.getMessage().replace(token, "..."), None
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
    server.identity_provider_class = "__main__.SlotIdentityProvider"
    config.IdentityProvider.token = token
    config.AsyncMappingKernelManager.kernel_manager_class = "__main__.SlotKernelManager"
    config.LabApp.news_url = None
    config.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
    return config


def serve(settings: Dict[str, str]) -> None:
    """Serves until SIGTERM."""
    server = LabApp.make_serverapp(
        jpserver_extensions={"jupyterlab": True}, config=configuration(settings["base_url"], settings["token"])
    )
    # Both would write the token to a file, for nobody to read.
    server.write_server_info_file = lambda: None
    server.write_browser_open_files = lambda: None
    server.initialize([], starter_extension=LabApp.name, new_httpserver=False)
    _note_requests(server)
    _keep_out_of_log(server.log, settings["token"])
    http = HTTPServer(
        server.web_app, xheaders=True, max_body_size=server.max_body_size, max_buffer_size=server.max_buffer_size
    )
    listener = socket.socket(fileno=LISTEN_FD)
    listener.setblocking(False)  # tornado accepts until there is nobody left to accept
    http.add_socket(listener)
    server._http_server = http
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What is there now stays, and need not be looked at by every full collection to come.
    gc.freeze()
    gc.enable()
    server.start()


def main() -> None:
    """Reads the configuration and serves."""
    for fd in (LISTEN_FD, ACTIVITY_FD, CONFIG_FD):
        os.set_inheritable(fd, False)
    with open(CONFIG_FD) as file:
        settings = json.load(file)
    serve(settings)


if __name__ == "__main__":
    main()
