# SPDX-License-Identifier: BSD-3-Clause
"""The types of the route table: a route, a request to it, and the functions that respond."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from werkzeug.wrappers import Request

from nbagent.config.host_config import HostConfig
from nbagent.core.errors import NbagentError, SupervisorUnavailable
from nbagent.wire.control import ControlClient
from nbagent.wire.operations import NoArguments, Operation, SlotArguments

R = TypeVar("R")


@dataclass(frozen=True)
class Service:
    """The configuration, and the supervisor's clients; `probe` has the short timeout of a health check."""

    config: HostConfig
    client: ControlClient
    probe: ControlClient


@dataclass(frozen=True)
class Call:
    """One request, with its inputs checked for shape. `key` is its Idempotency-Key."""

    request: Request
    options: Mapping[str, object]
    slot: str = ""
    key: str | None = None


# Returns a JSON document, or a werkzeug response.
Answer = Callable[[Service, Call], object]


def forward(operation: Operation[NoArguments, R]) -> Answer:
    """Responds with the result of an operation without arguments."""
    return lambda service, call: service.client.call(operation)


def forward_slot(operation: Operation[SlotArguments, R]) -> Answer:
    """Responds with the result of an operation on the slot in the path."""
    return lambda service, call: service.client.call(operation, SlotArguments(call.slot))


@dataclass(frozen=True)
class Route:
    """One line of the table. `path` has OpenAPI's syntax; `schema` is a name of its components.

    `changes`: the request changes something, so that HEAD is not safe. `is_open`: needs no authentication, because the
    response has nothing of the slots. `problems` are those beside the ones that every route has.
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
