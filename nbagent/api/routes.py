# SPDX-License-Identifier: BSD-3-Clause
"""The route table of the API, and the functions of the routes that do more than forward an operation.

`app` registers the table with Flask and `openapi` describes it, so that the API serves exactly what is described.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

from flask import Response

from nbagent.api import metrics, openapi
from nbagent.api.hostnames import plain_address, slot_origin
from nbagent.api.route import Call, Route, Service, forward, forward_slot
from nbagent.core.errors import (
    ArchiveFailed,
    ContentFailed,
    Draining,
    Full,
    IdempotencyMismatch,
    IllegalMove,
    ImageNotFound,
    InvalidBody,
    InvalidField,
    NbagentError,
    NotReady,
    RecordFailed,
    SlotNotFound,
    StartFailed,
    SupervisorUnavailable,
)
from nbagent.core.model import CLAIM_FIELDS, UPDATE_FIELDS, claim_link
from nbagent.web.trace import trace_of
from nbagent.wire import operations
from nbagent.wire.operations import ClaimArguments, ReleaseArguments, UpdateArguments, own_key


def _claim(service: Service, call: Call) -> object:
    claim = service.client.call(operations.CLAIM, ClaimArguments(
        call.options, call.key or own_key(), _client(call), trace_of(call.request.headers)
    ))
    origin = slot_origin(service.config.router, claim["slot"], call.request.headers.get("Host", ""))
    return {name: value for name, value in claim.items() if name != "query"} | {"url": origin + claim_link(claim)}


def _client(call: Call) -> str:
    return plain_address(call.request.remote_addr or "unknown")


def _release(service: Service, call: Call) -> object:
    return service.client.call(operations.RELEASE, ReleaseArguments(call.slot, _client(call)))


def _update(service: Service, call: Call) -> object:
    if not call.options:
        raise InvalidBody("nothing to change", expected=f"at least one of {', '.join(UPDATE_FIELDS)}")
    return service.client.call(operations.UPDATE, UpdateArguments(call.slot, call.options, _client(call)))


def _metrics(service: Service, call: Call) -> object:
    return Response(metrics.render(service.client.call(operations.STATS)), content_type=metrics.MEDIA_TYPE)


def _healthz(service: Service, call: Call) -> object:
    stats = service.probe.call(operations.STATS)
    return {"healthy": True, "version": stats["version"], "uptime_s": stats["uptime_s"]}


def _readyz(service: Service, call: Call) -> object:
    stats = service.probe.call(operations.STATS)
    reasons: dict[type[NbagentError], str] = {}
    if stats["faults"]:
        reasons[StartFailed] = "; ".join(f"{part}: {text}" for part, text in sorted(stats["faults"].items()))
    elif not stats["ready"]:
        reasons[StartFailed] = f"the image {stats['container_image']} is missing or does not start"
    if stats["draining"]:
        reasons[Draining] = "the host is draining"
    elif stats["available"] <= 0:
        reasons[Full] = f"no slot is available; capacity is {stats['capacity']}"
    for kind in reasons:  # the first names the problem, because the ones after it are easier to repair
        raise kind("; ".join(reasons.values()), reasons=list(reasons.values()), retry_after_s=5)
    return {"ready": True, "available": stats["available"]}


def _index(service: Service, call: Call) -> object:
    return {"links": {route.name: route.path for route in ROUTES if route.method == "GET"}}


@functools.cache
def _description() -> Mapping[str, object]:
    return openapi.describe(ROUTES)


def _openapi(service: Service, call: Call) -> object:
    return _description()


_BY_POST = Route(
    "POST", "/claim", "claim", "Hand out a slot", _claim, "Claim",
    fields=CLAIM_FIELDS, takes_key=True, changes=True,
    problems=(SupervisorUnavailable, Full, Draining, NotReady, StartFailed, RecordFailed, ImageNotFound,
              InvalidField, InvalidBody, IdempotencyMismatch, ContentFailed, ArchiveFailed),
)
ROUTES: tuple[Route, ...] = (
    Route("GET", "/", "index", "Links to all GET routes", _index, "Index", is_open=True, problems=()),
    _BY_POST,
    replace(_BY_POST, method="GET", name="claimByGet", summary="Hand out a slot, options in the query",
            fields=tuple(field for field in CLAIM_FIELDS if field != "files")),
    Route("GET", "/slots", "slots", "All slots of this host", forward(operations.SLOTS), "Slot", is_list=True),
    Route("GET", "/slots/{slot}", "slot", "One slot", forward_slot(operations.SLOT), "Slot",
          problems=(SupervisorUnavailable, SlotNotFound)),
    Route("PATCH", "/slots/{slot}", "updateSlot", "Other limits or a longer life for a running slot",
          _update, "Slot", fields=UPDATE_FIELDS, changes=True,
          problems=(SupervisorUnavailable, RecordFailed, SlotNotFound, IllegalMove, InvalidField, InvalidBody)),
    Route("DELETE", "/slots/{slot}", "releaseSlot", "End a slot", _release, "Slot",
          changes=True, problems=(SupervisorUnavailable, SlotNotFound, IllegalMove)),
    Route("POST", "/drain", "drain", "Stop handing out slots; users stay", forward(operations.DRAIN), "Drain",
          changes=True),
    Route("DELETE", "/drain", "undrain", "Hand out slots again", forward(operations.UNDRAIN), "Drain", changes=True),
    Route("DELETE", "/api/pool", "recyclePool", "End all warm slots; the pool makes new ones (tmpnb's admin API)",
          forward(operations.RECYCLE_POOL), "Recycled", changes=True),
    Route("GET", "/stats", "stats", "Figures and counters of the host", forward(operations.STATS), "Stats"),
    Route("GET", "/images", "images", "The images that a claim may name", forward(operations.IMAGES), "Image",
          is_list=True),
    Route("GET", "/metrics", "metrics", "The stats for Prometheus", _metrics, "Metrics",
          media_type="text/plain"),
    Route("GET", "/healthz", "healthz", "The API and the supervisor respond", _healthz, "Health",
          is_open=True),
    Route("GET", "/readyz", "readyz", "A claim would succeed now", _readyz, "Ready", is_open=True,
          problems=(SupervisorUnavailable, Full, Draining, StartFailed)),
    Route("GET", "/openapi.json", "openapi", "This description", _openapi, "OpenApi", is_open=True,
          problems=()),
)
