"""All that the API serves: the table, and what each line of it does.

`app` registers the table with Flask and `openapi` describes it, so nothing is served that is not
described, and nothing described that is not served.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from flask import Response

from nbagent.api import metrics, openapi
from nbagent.api.hostnames import plain_address, slot_origin
from nbagent.api.route import Call, Route, Service
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
    SlotNotFound,
    StartFailed,
    SupervisorUnavailable,
)
from nbagent.core.model import CLAIM_FIELDS, UPDATE_FIELDS, claim_link


def _claim(service: Service, call: Call) -> Any:
    client = plain_address(call.request.remote_addr or "unknown")
    claim = service.client.call("claim", options=call.options, key=call.key, client=client)
    origin = slot_origin(service.config.router, claim["slot"], call.request.headers.get("Host", ""))
    return {name: value for name, value in claim.items() if name != "query"} | {"url": origin + claim_link(claim)}


def _slots(service: Service, call: Call) -> Any:
    return service.client.call("slots")


def _slot(service: Service, call: Call) -> Any:
    return service.client.call("slot", id=call.slot)


def _update(service: Service, call: Call) -> Any:
    if not call.options:
        raise InvalidBody("nothing to change", expected=f"at least one of {', '.join(UPDATE_FIELDS)}")
    return service.client.call("update", id=call.slot, options=call.options)


def _release(service: Service, call: Call) -> Any:
    return service.client.call("release", id=call.slot)


def _drain(service: Service, call: Call) -> Any:
    return service.client.call("drain")


def _undrain(service: Service, call: Call) -> Any:
    return service.client.call("undrain")


def _recycle_pool(service: Service, call: Call) -> Any:
    return service.client.call("recycle_pool")


def _stats(service: Service, call: Call) -> Any:
    return service.client.call("stats")


def _images(service: Service, call: Call) -> Any:
    return service.client.call("images")


def _metrics(service: Service, call: Call) -> Any:
    return Response(metrics.render(service.client.call("stats")), content_type=metrics.MEDIA_TYPE)


def _healthz(service: Service, call: Call) -> Any:
    stats = service.probe.call("stats")
    return {"healthy": True, "version": stats["version"], "uptime_s": stats["uptime_s"]}


def _readyz(service: Service, call: Call) -> Any:
    stats = service.probe.call("stats")
    reasons: dict[type[NbagentError], str] = {}
    if not stats["ready"]:
        reasons[StartFailed] = f"the image {stats['container_image']} is missing or does not start"
    if stats["draining"]:
        reasons[Draining] = "the host is draining"
    elif stats["available"] <= 0:
        reasons[Full] = f"no slot is available; capacity is {stats['capacity']}"
    for kind in reasons:  # the first is the hardest to mend, and names the problem
        raise kind("; ".join(reasons.values()), reasons=list(reasons.values()), retry_after_s=5)
    return {"ready": True, "available": stats["available"]}


def _index(service: Service, call: Call) -> Any:
    return {"links": {route.name: route.path for route in ROUTES if route.method == "GET"}}


@functools.cache
def _description() -> dict[str, Any]:
    return openapi.describe(ROUTES)


def _openapi(service: Service, call: Call) -> Any:
    return _description()


_BY_POST = Route(
    "POST", "/claim", "claim", "Hand out a slot", _claim, "Claim",
    fields=CLAIM_FIELDS, takes_key=True, changes=True,
    problems=(SupervisorUnavailable, Full, Draining, StartFailed, ImageNotFound, InvalidField,
              InvalidBody, IdempotencyMismatch, ContentFailed, ArchiveFailed),
)
ROUTES: tuple[Route, ...] = (
    Route("GET", "/", "index", "Links to what is here", _index, "Index", is_open=True, problems=()),
    _BY_POST,
    replace(_BY_POST, method="GET", name="claimByGet", summary="Hand out a slot, options in the query",
            fields=tuple(field for field in CLAIM_FIELDS if field != "files")),
    Route("GET", "/slots", "slots", "All slots of this host", _slots, "Slot", is_list=True),
    Route("GET", "/slots/{slot}", "slot", "One slot", _slot, "Slot",
          problems=(SupervisorUnavailable, SlotNotFound)),
    Route("PATCH", "/slots/{slot}", "updateSlot", "Other limits or a longer life for a running slot",
          _update, "Slot", fields=UPDATE_FIELDS, changes=True,
          problems=(SupervisorUnavailable, SlotNotFound, IllegalMove, InvalidField, InvalidBody)),
    Route("DELETE", "/slots/{slot}", "releaseSlot", "End a slot", _release, "Slot", changes=True,
          problems=(SupervisorUnavailable, SlotNotFound, IllegalMove)),
    Route("POST", "/drain", "drain", "Stop handing out slots; users stay", _drain, "Drain", changes=True),
    Route("DELETE", "/drain", "undrain", "Hand out slots again", _undrain, "Drain", changes=True),
    Route("DELETE", "/api/pool", "recyclePool", "End all warm slots; the pool makes new ones (tmpnb's admin API)",
          _recycle_pool, "Recycled", changes=True),
    Route("GET", "/stats", "stats", "How full the host is, and what it has done", _stats, "Stats"),
    Route("GET", "/images", "images", "What a claim can ask for", _images, "Image", is_list=True),
    Route("GET", "/metrics", "metrics", "The stats for Prometheus", _metrics, "Metrics",
          media_type="text/plain"),
    Route("GET", "/healthz", "healthz", "The API and the supervisor answer", _healthz, "Health",
          is_open=True),
    Route("GET", "/readyz", "readyz", "A claim would be answered now", _readyz, "Ready", is_open=True,
          problems=(SupervisorUnavailable, Full, Draining, StartFailed)),
    Route("GET", "/openapi.json", "openapi", "This description", _openapi, "OpenApi", is_open=True,
          problems=()),
)
