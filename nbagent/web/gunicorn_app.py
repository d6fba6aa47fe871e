# SPDX-License-Identifier: BSD-3-Clause
"""gunicorn's arbiter as our services need it: it starts, reloads and replaces processes that run nbagent.web.server.

gunicorn's own workers are not used, because in them a connection occupies a thread while its request is received and
its response is sent, and a chunked body that is cut off makes a thread of gunicorn 20 run for ever.

There is no access log, because it would contain tokens of queries. The supervisor logs what happens to slots.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter as BaseArbiter
from gunicorn.glogging import Logger
from gunicorn.workers.base import Worker as BaseWorker

from nbagent.core.errors import ConfigError
from nbagent.core.logs import JournalFormatter
from nbagent.web.server import Server, Service

if TYPE_CHECKING:
    from types import FrameType

_LOG = logging.getLogger(__name__)
C = TypeVar("C")


@dataclass(frozen=True)
class Shape:
    """The number of processes, and how long a request may still run when the service stops."""

    workers: int
    graceful_s: float


class GunicornApp(BaseApplication, Generic[C]):  # type: ignore[misc]
    """A service under gunicorn's arbiter.

    `make_service` runs in the arbiter before it forks the workers, so that they share memory, and again at
    each reload. `read_config` raises ConfigError. The service listens on `address` without socket activation.
    """

    def __init__(
        self,
        name: str,
        read_config: Callable[[], C],
        shape: Callable[[C], Shape],
        make_service: Callable[[C], Service],
        address: str,
    ) -> None:
        self.name = name
        self.read_config = read_config
        self.config = read_config()
        self.shape = shape
        self.make_service = make_service
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
            "worker_class": f"{__name__}.{Worker.__name__}",
            "preload_app": True,
            "graceful_timeout": int(shape.graceful_s),
            "accesslog": None,
            "errorlog": "-",
            "loglevel": "warning",
            "logger_class": JournalLogger,
            "proc_name": self.name,
        }
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> Service:
        """Called by gunicorn for what its workers serve."""
        return self.make_service(self.config)

    def run(self) -> None:
        """Serves until SIGTERM."""
        Arbiter(self).run()


class Arbiter(BaseArbiter):  # type: ignore[misc]
    """gunicorn's arbiter, whose workers lose no SIGTERM.

    A new process has the signal handlers of the arbiter until its initialisation, and Python forgets signals that it
    gets before fork(2) has returned in it. Without the signal, the arbiter would wait for the worker during the whole
    graceful_timeout.
    """

    def spawn_worker(self) -> Any:
        """Forks a worker, in which SIGTERM is blocked until Worker.run."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().spawn_worker()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


class Worker(BaseWorker):  # type: ignore[misc]
    """A worker process of gunicorn that runs a Server."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._server: Server | None = None
        self._stop_s: float | None = None

    def run(self) -> None:
        """Called by gunicorn after the initialisation. Returns after SIGTERM, or when the arbiter has ended."""
        for listener in self.sockets:
            listener.setblocking(False)
        self._server = server = Server([listener.sock for listener in self.sockets], self.wsgi)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        while self.alive and self.ppid == os.getppid() and not server.is_finished:
            self.notify()
            if self._stop_s is not None:
                server.stop()
                if time.monotonic() > self._stop_s + self.cfg.graceful_timeout:
                    break
            server.turn(1.0)
        server.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM, leaves further connections in the backlog for the next worker and serves the accepted ones."""
        # The arbiter repeats the signal each second until the worker exits, so a repeated one must not delay the exit.
        if self._stop_s is None:
            self._stop_s = time.monotonic()
        if self._server is not None:
            self._server.wake()


class JournalLogger(Logger):  # type: ignore[misc]
    """gunicorn's logger in our format. Normal ends of workers are no errors."""

    def setup(self, cfg: object) -> None:
        """Called by gunicorn for its own loggers."""
        super().setup(cfg)
        for handler in self.error_log.handlers:
            handler.setFormatter(JournalFormatter())
            handler.addFilter(_is_unexpected)


def _is_unexpected(record: logging.LogRecord) -> bool:
    # The arbiter warns when a worker dies of the SIGTERM that the arbiter sent, which happens when it repeats the
    # signal while the worker exits. The first text is gunicorn 20's, the second gunicorn 23's.
    return not record.getMessage().endswith(("due to signal 15", "was sent SIGTERM!"))
