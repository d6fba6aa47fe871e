# SPDX-License-Identifier: BSD-3-Clause
"""`nbagent traces`: spans of traced claims, from the journal of a host or a gateway to a collector of OpenTelemetry.

A claim with a traceparent header leaves its trace, its caller's span and its times in the journal (nbagent.web.trace).
They become spans here, in another process and after the claim, so that no claim waits for a collector. They are sent by
OTLP/HTTP in its JSON encoding (https://opentelemetry.io/docs/specs/otlp/) by the standard library, because neither
Debian 12 nor 13 has OpenTelemetry's packages for Python.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import nbagent
from nbagent.core.errors import ConfigError, NbagentError

SUPERVISOR, GATEWAY = "nbagent.service", "nbagent-gateway.service"
TIMEOUT_S, RETRY_S, WAIT_S = 10.0, 5.0, 60.0
# A line of HAProxy about a claim, as nbagent.gateway.haproxy has it.
_LINE = re.compile(
    r"claim client=.* status=(?P<status>\d+) .* host=(?P<host>\S+) retries=\S+ wait_ms=(?P<wait>-?\d+) "
    r"connect_ms=(?P<connect>-?\d+) answer_ms=(?P<answer>-?\d+) total_ms=(?P<total>\d+) .*"
    r"trace=(?P<trace>[0-9a-f]{32})-(?P<parent>[0-9a-f]{16})"
)
_INTERNAL, _SERVER, _ERROR = 1, 2, 2


class CollectorFailed(NbagentError):
    """The collector did not accept spans."""

    code = "collector-failed"
    exit_status = 69  # EX_UNAVAILABLE


class Span(NamedTuple):
    """A span; times are nanoseconds since 1970. A span without a parent's name is the first of this machine."""

    trace: str
    id: str
    parent: str
    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, str | int]
    kind: int = _INTERNAL
    failed: bool = False

    def document(self) -> dict[str, object]:
        """The span in OTLP's JSON encoding."""
        return {
            "traceId": self.trace, "spanId": self.id, "parentSpanId": self.parent, "name": self.name, "kind": self.kind,
            "startTimeUnixNano": str(self.start_ns), "endTimeUnixNano": str(self.end_ns),
            "attributes": _attributes(self.attributes), "status": {"code": _ERROR} if self.failed else {},
        }


def spans(fields: Mapping[str, Any]) -> list[Span]:
    """The spans of an entry of the journal; none for an entry that is not about a traced claim."""
    unit, end_ns = fields.get("_SYSTEMD_UNIT"), round(fields["__REALTIME_TIMESTAMP"].timestamp() * 1e6) * 1000
    try:
        if unit == SUPERVISOR and "NBAGENT_TRACE_ID" in fields:  # only the event of a claim has it
            return _of_host(fields, end_ns)
        if unit == GATEWAY and (line := _LINE.fullmatch(str(fields.get("MESSAGE", "")))):
            return _of_gateway(line, end_ns)
    except (KeyError, ValueError):  # an entry of another version
        pass
    return []


def _of_host(fields: Mapping[str, Any], end_ns: int) -> list[Span]:
    trace, parent = str(fields["NBAGENT_TRACE_ID"]), str(fields["NBAGENT_PARENT_SPAN_ID"])
    took_ns, waited_ns = (int(fields[f"NBAGENT_{name}_US"]) * 1000 for name in ("TOOK", "WAITED"))
    slot, start_ns = str(fields["NBAGENT_SLOT"]), end_ns - took_ns
    attributes = {
        "nbagent.slot": slot, "nbagent.image": str(fields["NBAGENT_IMAGE"]),
        "nbagent.network": str(fields["NBAGENT_NETWORK"]), "client.address": str(fields["NBAGENT_CLIENT"]),
    }
    first = Span(trace, _id(trace, slot), parent, "claim", start_ns, end_ns, attributes, _SERVER)
    return [
        first,
        Span(trace, _id(trace, slot, "allocate"), first.id, "allocate", start_ns, start_ns + waited_ns, {}),
        Span(trace, _id(trace, slot, "prepare"), first.id, "prepare", start_ns + waited_ns, end_ns, {}),
    ]


def _of_gateway(line: re.Match[str], end_ns: int) -> list[Span]:
    trace, status = line["trace"], int(line["status"])
    start_ns = end_ns - int(line["total"]) * 10**6
    attributes = {"http.response.status_code": status, "nbagent.host": line["host"]}
    first_id = _id(trace, line[0])
    found = [Span(trace, first_id, line["parent"], "gateway", start_ns, end_ns, attributes, _SERVER, status >= 500)]
    for name in ("wait", "connect", "answer"):
        # -1: the request did not come so far.
        if (took_ns := int(line[name]) * 10**6) >= 0:
            found.append(Span(trace, _id(trace, line[0], name), first_id, name, start_ns, start_ns + took_ns, {}))
            start_ns += took_ns
    return found


def _id(*of: str) -> str:
    """The id of a span, which is the same when an entry is sent again."""
    return hashlib.sha256("\0".join(of).encode()).hexdigest()[:16]


def document(found: Iterable[Span], service: str) -> dict[str, object]:
    """The request of OTLP with these spans, of this machine."""
    resource = {"service.name": service, "service.version": nbagent.__version__, "host.name": socket.gethostname()}
    scope = {"scope": {"name": "nbagent"}, "spans": [span.document() for span in found]}
    return {"resourceSpans": [{"resource": {"attributes": _attributes(resource)}, "scopeSpans": [scope]}]}


def _attributes(values: Mapping[str, str | int]) -> list[dict[str, object]]:
    return [
        {"key": key, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}}
        for key, value in values.items()
    ]


def send(url: str, body: Mapping[str, object]) -> None:
    """Sends a request to a collector. Raises CollectorFailed; its `retry` is true if it may succeed later."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            return
    except urllib.error.HTTPError as error:
        # OTLP's list of statuses after which a client repeats a request.
        raise CollectorFailed(f"{url}: status {error.code}", retry=error.code in (429, 502, 503, 504)) from None
    except (OSError, http.client.HTTPException) as error:
        raise CollectorFailed(f"{url}: {getattr(error, 'reason', error)}", retry=True) from None


def export(url: str, since_s: float, *, once: bool, complain: Callable[[str], None]) -> int:
    """Sends the spans of the entries since `since_s`, and of new ones until the process is ended, unless `once`.

    The journal keeps what a collector has not accepted yet. Returns the number of spans that were sent. Raises
    ConfigError and, with `once`, CollectorFailed.
    """
    sent = 0
    for batch in _batches(since_s, once=once):
        by_service: dict[str, list[Span]] = {}
        for fields in batch:
            service = "nbagent-gateway" if fields.get("_SYSTEMD_UNIT") == GATEWAY else "nbagent"
            by_service.setdefault(service, []).extend(spans(fields))
        for service, found in by_service.items():
            if found and _sent(url, document(found, service), once=once, complain=complain):
                sent += len(found)
    return sent


def _sent(url: str, body: Mapping[str, object], *, once: bool, complain: Callable[[str], None]) -> bool:
    """Sends until the collector accepts or refuses the spans; returns whether it has accepted them."""
    shown = ""
    while True:
        try:
            send(url, body)
            return True
        except CollectorFailed as error:
            if once:
                raise
            if str(error) != shown:
                complain(str(error))
                shown = str(error)
            if not error.details.get("retry"):
                return False
            time.sleep(RETRY_S)


def _batches(since_s: float, *, once: bool) -> Iterator[list[Mapping[str, Any]]]:
    """The entries of the two services in the order of the journal, as many as there are at a time."""
    try:
        from systemd import journal
    except ImportError:
        raise ConfigError("the journal cannot be read: the package python3-systemd is not installed") from None
    with journal.Reader() as reader:
        for unit in (SUPERVISOR, GATEWAY):
            reader.add_match(_SYSTEMD_UNIT=unit)
        reader.seek_realtime(since_s)
        while True:
            if batch := [fields for _, fields in zip(range(1000), reader, strict=False)]:
                yield batch
            elif once:
                return
            else:
                reader.wait(WAIT_S)
