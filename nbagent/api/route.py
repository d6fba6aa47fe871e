"""What one line of the route table is, and what an answer is given to stand on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from werkzeug.wrappers import Request

from nbagent.config.host_config import HostConfig
from nbagent.core.errors import NbagentError, SupervisorUnavailable
from nbagent.wire.control import ControlClient


@dataclass(frozen=True)
class Service:
    """What answers stand on. `probe` is a client whose patience is that of a health check."""

    config: HostConfig
    client: ControlClient
    probe: ControlClient


@dataclass(frozen=True)
class Call:
    """One request, its inputs checked for shape. `key` is its Idempotency-Key."""

    request: Request
    options: dict[str, Any]
    slot: str = ""
    key: str | None = None


Answer = Callable[[Service, Call], Any]


@dataclass(frozen=True)
class Route:
    """One line of the table. `path` is written as OpenAPI does, `schema` names its components.

    `changes`: the request changes something, so HEAD is no harmless form of it. `is_open`: anybody
    may call, since the answer says nothing of the slots. `problems` are those beside the ones
    that every route has.
    """

    method: str
    path: str
    name: str
    summary: str
    answer: Answer
    schema: str
    is_list: bool = False
    fields: tuple[str, ...] = ()
    takes_key: bool = False
    changes: bool = False
    is_open: bool = False
    problems: tuple[type[NbagentError], ...] = (SupervisorUnavailable,)
    media_type: str = "application/json"
