# SPDX-License-Identifier: BSD-3-Clause
"""The OpenAPI 3.1 description of the API, generated from the route table.

Only the schemas below are written by hand. A test validates real responses of the API against them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from nbagent import __version__
from nbagent.api.inputs import BODY_MAX_BYTES
from nbagent.api.route import Route
from nbagent.config.host_values import NETWORK_MODES
from nbagent.core import claim_content
from nbagent.core.errors import Forbidden, InvalidField, NbagentError, Unauthenticated
from nbagent.core.model import ID_EXPECTED, IMAGE_NAME, MEMORY_MIN_BYTES, PATH_EXPECTED, SlotState
from nbagent.core.quantities import DURATION_EXPECTED, QUOTA_EXPECTED, SIZE_EXPECTED
from nbagent.web import trace
from nbagent.web.keys import HEADER, KEY_EXPECTED
from nbagent.web.problems import HTTP_CODES, MEDIA_TYPE, TYPE_PREFIX

Schema = dict[str, object]


def describe(routes: Iterable[Route]) -> Schema:
    """The description of `routes`."""
    paths: dict[str, Schema] = {}
    for route in routes:
        item = paths.setdefault(route.path, {})
        item[route.method.lower()] = _operation(route)
        if "{slot}" in route.path:
            item["parameters"] = [_SLOT_PARAMETER]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nbagent control API",
            "version": __version__,
            "description": "Starts and releases notebook slots on one host. Every error is a problem document"
            " (RFC 9457) with a stable type.",
            "license": {"name": "BSD-3-Clause", "identifier": "BSD-3-Clause"},
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}, {}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The token in /etc/nbagent/token. Callers on a trusted network need none.",
                }
            },
        },
    }


def _operation(route: Route) -> Schema:
    operation: Schema = {
        "operationId": route.name,
        "summary": route.summary,
        "responses": {"200": _success(route), **_problems(route)},
    }
    parameters = [_KEY_PARAMETER, _TRACE_PARAMETER] if route.takes_key else []
    parameters += [
        {"name": name, "in": "query", "schema": OPTIONS[name], "required": False}
        for name in route.fields if name != "files"
    ]
    if parameters:
        operation["parameters"] = parameters
    if route.fields and route.method != "GET":
        limit_bytes = claim_content.BODY_MAX_BYTES if "files" in route.fields else BODY_MAX_BYTES
        operation["requestBody"] = {
            "description": f"At most {limit_bytes} bytes. A field is either in the body or in the query.",
            "required": False,
            "content": {"application/json": {"schema": _object(
                {name: OPTIONS[name] for name in route.fields}, required=(), closed=True
            )}},
        }
    if route.is_open:
        operation["security"] = []
    return operation


def _success(route: Route) -> Schema:
    schema: Schema = {"$ref": f"#/components/schemas/{route.schema}"}
    if route.is_list:
        schema = {"type": "array", "items": schema}
    return {"description": route.summary, "content": {route.media_type: {"schema": schema}}}


def _problems(route: Route) -> Schema:
    kinds: list[type[NbagentError]] = [InvalidField, *route.problems]
    if not route.is_open:
        kinds += [Unauthenticated, Forbidden]
    codes: dict[int, set[str]] = {413: {HTTP_CODES[413]}, 415: {HTTP_CODES[415]}, 500: {NbagentError.code}}
    for kind in kinds:
        codes.setdefault(kind.http_status, set()).add(kind.code)
    return {str(status): _problem(status, sorted(codes[status])) for status in sorted(codes)}


def _problem(status: int, codes: list[str]) -> Schema:
    response: Schema = {
        "description": " or ".join(TYPE_PREFIX + code for code in codes),
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    if status == 503:
        response["headers"] = {"Retry-After": {
            "description": "Seconds after which the request should be sent again.", "schema": {"type": "integer"},
        }}
    return response


def _object(
    properties: dict[str, Schema], required: Iterable[str] | None = None, closed: bool = False
) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    if names := list(properties if required is None else required):
        schema["required"] = names
    if closed:
        schema["additionalProperties"] = False
    return schema


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_AMOUNT: Schema = {"type": "number", "minimum": 0}
_FLAG: Schema = {"type": "boolean"}
_TIME: Schema = {"type": "string", "format": "date-time"}
_MAYBE_TEXT: Schema = {"type": ["string", "null"]}
_MAYBE_TIME: Schema = {"type": ["string", "null"], "format": "date-time"}
_MAYBE_AMOUNT: Schema = {"type": ["number", "null"], "minimum": 0}
_USED: Schema = _MAYBE_AMOUNT | {
    "description": "A measured value. In the list of all slots it may be as old as 30 ms times their number (3 s for a"
    " hundred, 30 s for a thousand), at most cull.interval."
}
_MEASURED = ("memory_bytes", "swapped_bytes", "cpu_s", "tasks", "oom_kills", "tasks_refused", "storage_bytes")

OPTIONS: dict[str, Schema] = {
    "image": {
        "type": "string", "pattern": f"^{IMAGE_NAME.pattern}$", "description": "A name that GET /images lists.",
    },
    "memory": {
        "type": ["string", "integer"], "minLength": 1, "minimum": MEMORY_MIN_BYTES,
        "description": f"{SIZE_EXPECTED}; at least {MEMORY_MIN_BYTES} bytes, at most slots.memory_max.",
    },
    "cpu_weight": {
        "type": ["integer", "string"], "minLength": 1, "minimum": 1, "maximum": 10000,
        "description": "A whole number from 1 to 10000.",
    },
    "cpu_quota": {"type": "string", "minLength": 1, "description": QUOTA_EXPECTED},
    "ttl": {
        "type": ["string", "number"], "minLength": 1, "exclusiveMinimum": 0,
        "description": f"{DURATION_EXPECTED}, counted from the claim; at most slots.ttl_max.",
    },
    "path": {"type": "string", "description": PATH_EXPECTED},
    "files": {
        "type": "object",
        "description": f"Files that are in the home directory when the claim returns: {claim_content.FILES_EXPECTED}.",
        "maxProperties": claim_content.FILES_MAX,
        "propertyNames": {"description": claim_content.FILE_PATH_EXPECTED},
        "additionalProperties": {
            "description": claim_content.FILE_DATA_EXPECTED,
            "oneOf": [_TEXT, _object({"base64": _TEXT}, closed=True)],
        },
    },
    "archive": {
        "type": "string", "format": "uri",
        "description": "The URL of a .tar, .tar.gz, .tar.bz2, .tar.xz or .zip below one of claims.archives. The slot"
        " fetches it and unpacks it in the home directory.",
    },
    "network": {"type": "string", "enum": list(NETWORK_MODES), "description": "One of network.allow of the host."},
}

SCHEMAS: dict[str, Schema] = {
    "Claim": _object({
        "slot": _TEXT, "url": {"type": "string", "format": "uri"}, "path": _TEXT, "token": _TEXT,
        "image": _TEXT, "claimed_at": _TIME, "expires_at": _TIME, "network": _TEXT,
        "limits": _ref("Limits"),
    }),
    "Limits": _object(
        {"memory_bytes": _COUNT, "cpu_weight": _COUNT, "cpu_quota": _MAYBE_AMOUNT, "tasks": _COUNT}
    ),
    "Slot": _object(
        {
            "slot": _TEXT, "state": {"type": "string", "enum": [state.value for state in SlotState]},
            "image": _TEXT, "created_at": _TIME, "claimed_at": _MAYBE_TIME, "expires_at": _MAYBE_TIME,
            "age_s": _AMOUNT, "idle_s": _MAYBE_AMOUNT, "launch": _TEXT, "launch_reason": _TEXT,
            **dict.fromkeys(_MEASURED, _USED),
            "network": _TEXT, "limits": _ref("Limits"),
            "limits_in_force": _ref("Limits") | {
                "description": "Those that the slot has now: less memory while it grows and the host is short of it,"
                " and less CPU weight while it computes and no processor is free."
            },
        },
        required=("slot", "state", "image", "created_at", "claimed_at", "expires_at", "age_s", "network", "limits",
                  "limits_in_force", "launch", "launch_reason"),
    ),
    "Drain": _object({"draining": _FLAG, "claimed": _COUNT, "warm": _COUNT}),
    "Recycled": _object({"drained": _COUNT}),
    "Image": _object(
        {"name": _TEXT, "digest": _TEXT, "launch": _TEXT, "launch_now": _TEXT, "launch_reason": _TEXT,
         "warm": _COUNT, "wanted": _COUNT, "default": _FLAG},
        required=("name", "digest", "launch", "launch_now", "launch_reason", "warm", "wanted", "default"),
    ),
    "Pool": _object({"wanted": _COUNT, "warm": _COUNT, "starting": _COUNT, "failures": _COUNT, "paused_s": _AMOUNT}),
    "Zygote": _object({
        "state": {"type": "string", "enum": ["ready", "starting", "none"]}, "replacing": _FLAG, "failures": _COUNT,
        "forks": _COUNT, "age_s": _AMOUNT,
    }),
    "Durations": _object({
        "count": _COUNT, "sum": _AMOUNT,
        "buckets": {"type": "object", "additionalProperties": _COUNT,
                    "description": "The number of durations of at most so many seconds."},
    }),
    "Stats": _object({
        "version": _TEXT, "label": _TEXT, "container_image": _TEXT, "assets": _MAYBE_TEXT,
        "available": _COUNT, "capacity": _COUNT,
        **dict.fromkeys(("warm", "starting", "claimed", "stopping"), _COUNT),
        "draining": _FLAG, "ready": _FLAG,
        "memory_available_bytes": _COUNT, "free_percent": _COUNT, "next_end_s": _MAYBE_AMOUNT, "uptime_s": _AMOUNT,
        "faults": {"type": "object", "additionalProperties": _TEXT,
                   "description": "The parts of the host that fail: systemd, router, image, records, network."},
        "resources": {"type": "object", "additionalProperties": _AMOUNT,
                      "description": "Percent of each resource of the host that is left: blocks, inodes, processes."},
        "pressure": {"type": "object", "additionalProperties": _AMOUNT,
                     "description": "Percent of the last ten seconds in which a process waited: cpu, memory, io."},
        "zygotes": {"type": "object", "additionalProperties": _ref("Zygote")},
        "pools": {"type": "object", "additionalProperties": _ref("Pool")},
        "counters": {"type": "object", "additionalProperties": _COUNT},
        "start_seconds": _ref("Durations"), "claim_seconds": _ref("Durations"),
    }),
    "Health": _object({"healthy": _FLAG, "version": _TEXT, "uptime_s": _AMOUNT}),
    "Ready": _object({"ready": _FLAG, "available": _COUNT}),
    "Index": _object({"links": {"type": "object", "additionalProperties": _TEXT}}),
    "Metrics": {"type": "string", "description": "Prometheus' text format."},
    "OpenApi": _object({"openapi": _TEXT, "info": {"type": "object"}, "paths": {"type": "object"}}),
    "Problem": {
        **_object({
            "type": {"type": "string", "pattern": "^" + re.escape(TYPE_PREFIX)},
            "title": _TEXT,
            "status": {"type": "integer", "minimum": 400, "maximum": 599},
            "detail": _TEXT,
            "field": {"type": "string", "description": "The field that is invalid."},
            "expected": {"type": "string", "description": "The values that are valid."},
            "value": {"type": "string", "description": "The value that was sent, shortened."},
        }, required=("type", "title", "status", "detail")),
        "additionalProperties": True,
    },
}

_SLOT_PARAMETER: Schema = {
    "name": "slot", "in": "path", "required": True, "schema": _TEXT, "description": ID_EXPECTED,
}
_KEY_PARAMETER: Schema = {
    "name": HEADER, "in": "header", "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "description": f"A claim that is sent again with the same key gets the same slot: {KEY_EXPECTED}.",
}
_TRACE_PARAMETER: Schema = {
    "name": trace.HEADER, "in": "header", "required": False, "schema": {"type": "string"},
    "description": "The caller's trace (W3C Trace Context), whose ids are in the journal with the event of the claim.",
}
