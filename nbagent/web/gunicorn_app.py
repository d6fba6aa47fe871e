# SPDX-License-Identifier: BSD-3-Clause
"""gunicorn as our services need it: embedded, threaded, on systemd's socket or an address.

Differences from gunicorn's defaults, and their reasons:
- A connection without a request occupies one of the few threads. It is closed after READ_TIMEOUT_S, so
  that idle connections neither block a service nor delay its restart.
- A response that is sent before the body was read (413, 401, 403) would be lost, because closing a socket
  with unread data resets the connection. So the rest of the body is read and discarded, within bounds.
- Headers with an underscore are dropped, because in WSGI they equal the same name with a hyphen,
  and gunicorn 20 accepts SCRIPT_NAME as a header.
- There is no access log, because it would contain tokens of queries. The supervisor logs what happens to slots.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Generic, Protocol, TypeVar

from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger
from gunicorn.workers.gthread import ThreadWorker

from nbagent.core.errors import ConfigError

if TYPE_CHECKING:
    from types import FrameType

    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

READ_TIMEOUT_S = 10.0
KEEPALIVE_S = 30
LAST_READ_S = 0.3
LINGER_S = 2.0
LINGER_MAX_BYTES = 32 << 20
# A deep link of 2,000 characters may be three times as long when percent-encoded.
REQUEST_LINE_MAX_BYTES = 8190
_LOG = logging.getLogger(__name__)
C = TypeVar("C")


def by_listener(app: WSGIApplication, others: Mapping[str, WSGIApplication]) -> WSGIApplication:
    """`app`, and for connections to a unix socket the one of `others` with the path of that socket.

    Only the listening socket selects the application, so that no path, header or address of a request can.
    """

    def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        name = environ["gunicorn.socket"].getsockname()
        return (others[name] if isinstance(name, str) else app)(environ, start_response)

    return serve


@dataclass(frozen=True)
class Shape:
    """The number of processes, the threads of each, and how long a request may still run when the service stops."""

    workers: int
    threads: int
    graceful_s: float


class GunicornApp(BaseApplication, Generic[C]):  # type: ignore[misc]
    """A service under gunicorn's arbiter.

    `make_app` runs in the arbiter before it forks the workers, so that they share memory, and again at
    each reload. `read_config` raises ConfigError. The service listens on `address` without socket activation.
    """

    def __init__(
        self,
        name: str,
        read_config: Callable[[], C],
        shape: Callable[[C], Shape],
        make_app: Callable[[C], WSGIApplication],
        address: str,
    ) -> None:
        self.name = name
        self.read_config = read_config
        self.config = read_config()
        self.shape = shape
        self.make_app = make_app
        self.address = address
        super().__init__(prog=name)

    def reload(self) -> None:
        """Called by gunicorn at SIGHUP. The former settings stay when the new ones are invalid."""
        try:
            self.config = self.read_config()
        except ConfigError as error:
            _LOG.error("configuration not reloaded: %s", error)
        else:
            self.callable = None
        super().reload()

    def load_config(self) -> None:
        """Sets what differs from gunicorn's defaults; LISTEN_FDS wins over the address."""
        shape = self.shape(self.config)
        settings: dict[str, object] = {
            "bind": self.address,
            "workers": shape.workers,
            "threads": shape.threads,
            "worker_class": f"{__name__}.{Worker.__name__}",
            "preload_app": True,
            "graceful_timeout": int(shape.graceful_s),
            "keepalive": KEEPALIVE_S,
            "limit_request_line": REQUEST_LINE_MAX_BYTES,
            "accesslog": None,
            "errorlog": "-",
            "loglevel": "warning",
            "logger_class": JournalLogger,
            "proc_name": self.name,
            # No peer may set the scheme of a request by X-Forwarded-Proto.
            "forwarded_allow_ips": "",
            "post_fork": handle_sigterm,
            "pre_request": drop_ambiguous_headers,
            "post_request": discard_body,
        }
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> WSGIApplication:
        """The WSGI application."""
        return self.make_app(self.config)


class Connection(Protocol):
    """A connection of gunicorn's threaded worker."""

    sock: socket.socket


class GunicornRequest(Protocol):
    """A request as gunicorn passes it to its hooks."""

    headers: list[tuple[str, str]]
    body: BinaryIO


class Arbiter(Protocol):
    """gunicorn's arbiter, with the signals that it has not handled yet."""

    SIG_QUEUE: list[int]


class Worker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's threaded worker with a timeout for reads, which serves accepted connections before it exits."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._exit_s: float | None = None

    def handle(self, conn: Connection) -> object:
        """Serves one request of a connection. gunicorn closes the connection or keeps it alive."""
        conn.sock.settimeout(READ_TIMEOUT_S)
        return super().handle(conn)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM, accepts no further connection and serves the accepted ones, which gunicorn 23 would drop."""
        # The arbiter repeats the signal each second until the worker exits, so a repeated one must not delay the exit.
        if self._exit_s is None:
            self._exit_s = time.monotonic() + LAST_READ_S

    def accept(self, server: object, listener: socket.socket) -> None:
        """Accepts a connection. After SIGTERM it leaves connections in the backlog for the next worker."""
        if self._exit_s is None:
            super().accept(server, listener)
        else:
            self.poller.unregister(listener)

    def notify(self) -> None:
        """Called by gunicorn in each iteration of the worker's loop, at least once a second."""
        super().notify()
        if self._exit_s is not None and time.monotonic() > self._exit_s:
            self.alive = False


def handle_sigterm(arbiter: Arbiter, worker: Worker) -> None:
    """gunicorn's post_fork hook: a new worker handles SIGTERM from now on, and one that it has received already.

    Until its initialisation a worker has the signal handlers of the arbiter, which only queue the signal.
    The arbiter would then wait for the worker during the whole graceful_timeout.
    """
    signal.signal(signal.SIGTERM, worker.handle_exit)
    if signal.SIGTERM in arbiter.SIG_QUEUE:
        worker.handle_exit(signal.SIGTERM, None)


def drop_ambiguous_headers(worker: Worker, request: GunicornRequest) -> None:
    """gunicorn's pre_request hook."""
    request.headers = [(name, value) for name, value in request.headers if "_" not in name]


def discard_body(worker: Worker, request: GunicornRequest, environ: WSGIEnvironment, response: object) -> None:
    """gunicorn's post_request hook: reads the rest of the body, so that the caller can read the response."""
    deadline_s = time.monotonic() + LINGER_S
    discarded = 0
    with contextlib.suppress(OSError):
        while data := request.body.read(io.DEFAULT_BUFFER_SIZE):
            discarded += len(data)
            if discarded > LINGER_MAX_BYTES or time.monotonic() > deadline_s:
                break
        else:
            return
    with contextlib.suppress(OSError, KeyError):
        environ["gunicorn.socket"].shutdown(socket.SHUT_RDWR)


class JournalFormatter(logging.Formatter):
    """Prefixes each line, those of a traceback too, with its priority for journald."""

    def format(self, record: logging.LogRecord) -> str:
        """`<3>text` under systemd, plain text elsewhere."""
        text = super().format(record)
        if "JOURNAL_STREAM" not in os.environ:
            return text
        prefix = f"<{_journal_priority(record.levelno)}>"
        return prefix + text.replace("\n", "\n" + prefix)


class JournalLogger(Logger):  # type: ignore[misc]
    """gunicorn's logger in our format. Read timeouts and normal ends of workers are no errors."""

    def setup(self, cfg: object) -> None:
        """Called by gunicorn for its own loggers."""
        super().setup(cfg)
        for handler in self.error_log.handlers:
            handler.setFormatter(JournalFormatter())
            handler.addFilter(_is_unexpected)

    def exception(self, msg: str, *args: object, **kwargs: object) -> None:
        """Logs an exception as an error, but the timeout of a silent caller only at level debug."""
        if isinstance(sys.exc_info()[1], TimeoutError):
            self.debug("connection closed: the caller sent nothing for %s s", READ_TIMEOUT_S)
        else:
            super().exception(msg, *args, **kwargs)


def _is_unexpected(record: logging.LogRecord) -> bool:
    # The arbiter warns when a worker dies of the SIGTERM that the arbiter sent, which happens when the signal arrives
    # before the worker has a handler. The first text is gunicorn 20's, the second gunicorn 23's.
    return not record.getMessage().endswith(("due to signal 15", "was sent SIGTERM!"))


def configure_logging() -> None:
    """Sends the logs of nbagent's modules to standard error, which systemd connects to the journal."""
    handler = logging.StreamHandler()
    handler.setFormatter(JournalFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _journal_priority(level: int) -> int:
    # syslog's err, warning and info.
    return 3 if level >= logging.ERROR else 4 if level >= logging.WARNING else 6
