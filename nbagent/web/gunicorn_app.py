"""gunicorn as our services need it: embedded, threaded, on systemd's socket or an address.

What differs from gunicorn's own ways, and why:
- A connection that says nothing holds one of the few threads. It may for READ_TIMEOUT_S, so
  idle connections neither block a service nor delay its restart.
- An answer that is sent before the body was read (413, 401, 403) would be lost: closing a socket
  with unread data resets it. So the rest is read and thrown away, within bounds.
- A header with an underscore looks like another one to WSGI, and gunicorn 20 takes SCRIPT_NAME
  from anybody. Such headers are dropped.
- No access log: it would hold queries. What happens to slots is in the supervisor's journal.
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
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger
from gunicorn.workers.gthread import ThreadWorker

from nbagent.core.errors import ConfigError

if TYPE_CHECKING:
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
    """`app`, but one of `others` for connections to the unix socket of its path.

    The socket decides, and nothing that a caller says: no path, header or address leads from one to the other.
    """

    def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        name = environ["gunicorn.socket"].getsockname()
        return (others[name] if isinstance(name, str) else app)(environ, start_response)

    return serve


@dataclass(frozen=True)
class Shape:
    """How a service is served: processes, threads of each, and how long a call under way may take to its end."""

    workers: int
    threads: int
    graceful_s: float


class GunicornApp(BaseApplication, Generic[C]):  # type: ignore[misc]
    """A service under gunicorn's arbiter.

    `make_app` runs in the arbiter, before the workers are forked, so that they share its memory;
    and again at each reload. `read_config` raises ConfigError. `address` is where to listen without
    socket activation.
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
        """Called by gunicorn at SIGHUP. A configuration that is refused changes nothing."""
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
        settings: dict[str, Any] = {
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
            # Nobody's X-Forwarded-Proto decides what a service of ours believes.
            "forwarded_allow_ips": "",
            "post_fork": heed_sigterm,
            "pre_request": drop_ambiguous_headers,
            "post_request": discard_body,
        }
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> WSGIApplication:
        """The WSGI application."""
        return self.make_app(self.config)


class Worker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's threaded worker with an end to waiting for a caller, and a gentle end of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ends_s: float | None = None

    def handle(self, conn: Any) -> Any:
        """Serves one request of a connection; gunicorn takes care of the connection itself."""
        conn.sock.settimeout(READ_TIMEOUT_S)
        return super().handle(conn)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: accepts nothing more, but reads what was accepted, which gunicorn 23 drops."""
        # The arbiter says it again each second until the worker is gone, which must not put the end off.
        if self._ends_s is None:
            self._ends_s = time.monotonic() + LAST_READ_S

    def accept(self, server: Any, listener: Any) -> None:
        """Takes a connection unless told to stop: then a successor finds it in the backlog."""
        if self._ends_s is None:
            super().accept(server, listener)
        else:
            self.poller.unregister(listener)

    def notify(self) -> None:
        """Called by gunicorn in each turn of the worker's loop, at least once a second."""
        super().notify()
        if self._ends_s is not None and time.monotonic() > self._ends_s:
            self.alive = False


def heed_sigterm(arbiter: Any, worker: Any) -> None:
    """gunicorn's hook in a new worker, which has the arbiter's handlers until it is initialised.

    They only queue a SIGTERM for an arbiter that the worker is not, and the real arbiter would
    wait the whole graceful_timeout for it.
    """
    signal.signal(signal.SIGTERM, worker.handle_exit)
    if signal.SIGTERM in arbiter.SIG_QUEUE:
        worker.handle_exit(signal.SIGTERM, None)


def drop_ambiguous_headers(worker: Any, request: Any) -> None:
    """gunicorn's hook before a request."""
    request.headers = [(name, value) for name, value in request.headers if "_" not in name]


def discard_body(worker: Any, request: Any, environ: Any, response: Any) -> None:
    """gunicorn's hook after the answer was sent: lets the caller finish what it is sending."""
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
    """Lines that carry their priority for journald, each line of a traceback too."""

    def format(self, record: logging.LogRecord) -> str:
        """`<3>text` under systemd, plain text elsewhere."""
        text = super().format(record)
        if "JOURNAL_STREAM" not in os.environ:
            return text
        prefix = f"<{_journal_priority(record.levelno)}>"
        return prefix + text.replace("\n", "\n" + prefix)


class JournalLogger(Logger):  # type: ignore[misc]
    """gunicorn's logger with our format, silent about callers that were too slow."""

    def setup(self, cfg: Any) -> None:
        """Called by gunicorn for its own loggers."""
        super().setup(cfg)
        for handler in self.error_log.handlers:
            handler.setFormatter(JournalFormatter())
            handler.addFilter(_is_news)

    def exception(self, msg: str, *args: Any, **kwargs: Any) -> None:
        """A bug is an error; a caller that sent nothing for READ_TIMEOUT_S is none of ours."""
        if isinstance(sys.exc_info()[1], TimeoutError):
            self.debug("connection closed: its caller was silent for %s s", READ_TIMEOUT_S)
        else:
            super().exception(msg, *args, **kwargs)


def _is_news(record: logging.LogRecord) -> bool:
    # A worker that SIGTERM meets before it heeds it was told so by the arbiter, which then warns
    # of its own doing; gunicorn 20 in the first words, 23 in the second.
    return not record.getMessage().endswith(("due to signal 15", "was sent SIGTERM!"))


def configure_logging() -> None:
    """Sends what our own modules log to standard error, which is the journal."""
    handler = logging.StreamHandler()
    handler.setFormatter(JournalFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _journal_priority(level: int) -> int:
    # syslog's err, warning and info.
    return 3 if level >= logging.ERROR else 4 if level >= logging.WARNING else 6
