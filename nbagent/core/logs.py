# SPDX-License-Identifier: BSD-3-Clause
"""The log of a service on standard error, which systemd connects to the journal: each line has its priority.

Events (`nbagent.core.events`) are entries of their own. This is for what has no event: refused settings, warnings of
libraries, and unexpected errors with their tracebacks. Otherwise systemd gives each line the priority "info",
and `journalctl -p err` does not show why a service has ended.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from types import TracebackType

_LOG = logging.getLogger(__name__)


class JournalFormatter(logging.Formatter):
    """Prefixes each line, those of a traceback too, with its priority for journald."""

    def format(self, record: logging.LogRecord) -> str:
        """`<3>text` under systemd, plain text elsewhere."""
        text = super().format(record)
        if "JOURNAL_STREAM" not in os.environ:
            return text
        prefix = f"<{_priority(record.levelno)}>"
        return prefix + text.replace("\n", "\n" + prefix)


def configure() -> None:
    """Sends warnings and errors of this process to standard error, and exceptions that end it or one of its threads."""
    handler = logging.StreamHandler()
    handler.setFormatter(JournalFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    sys.excepthook = _log_end
    threading.excepthook = lambda found: _log_end(found.exc_type, found.exc_value, found.exc_traceback)


def _log_end(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if error is not None and not issubclass(kind, SystemExit):
        _LOG.critical("ended by an unexpected error", exc_info=(kind, error, traceback))


def _priority(level: int) -> int:
    # syslog's err, warning and info.
    return 3 if level >= logging.ERROR else 4 if level >= logging.WARNING else 6
