# SPDX-License-Identifier: BSD-3-Clause
"""The header traceparent of W3C's Trace Context, and the spans that are made of the journal."""

from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from nbagent.cli import traces
from nbagent.web.trace import trace_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize("header", [f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00", f"01-{TRACE}-{SPAN}-01-later"])
def test_a_trace_is_that_of_the_header(header: str) -> None:
    assert trace_of({"traceparent": header}) == f"{TRACE}-{SPAN}"


@pytest.mark.parametrize("header", [
    "", TRACE, f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01\nNBAGENT_SLOT=x", f"00-{TRACE}-{SPAN}-1",
    f"00-{TRACE}{SPAN}-01",
])
def test_a_malformed_header_is_ignored(header: str) -> None:
    assert trace_of({"traceparent": header}) == ""


AT = datetime.datetime(2026, 11, 29, 7, 0, 1, tzinfo=datetime.UTC)
END_NS = 1795935601 * 10**9
HOST_ENTRY = {
    "_SYSTEMD_UNIT": "nbagent.service", "__REALTIME_TIMESTAMP": AT, "NBAGENT_TRACE_ID": TRACE,
    "NBAGENT_PARENT_SPAN_ID": SPAN, "NBAGENT_TOOK_US": "3000", "NBAGENT_WAITED_US": "1000",
    "NBAGENT_SLOT": "c07-x8q2m4k9w1ze", "NBAGENT_IMAGE": "minimal", "NBAGENT_NETWORK": "none",
    "NBAGENT_CLIENT": "203.0.113.5",
}


def gateway_entry(
    status: int = 200, connect_ms: int = 2, answer_ms: int = 7, trace: str = f"{TRACE}-{SPAN}"
) -> dict[str, Any]:
    """An entry of HAProxy about a claim that took 10 ms."""
    line = (
        f"claim client=203.0.113.5 method=POST path=/spawn version=HTTP/1.1 status={status} bytes=700 host=c07 "
        f"retries=0 wait_ms=1 connect_ms={connect_ms} answer_ms={answer_ms} total_ms=10 end=---- trace={trace}"
    )
    return {"_SYSTEMD_UNIT": "nbagent-gateway.service", "__REALTIME_TIMESTAMP": AT, "MESSAGE": line}


def test_a_claim_of_a_host_is_a_span_with_its_parts() -> None:
    claim, allocate, prepare = traces.spans(HOST_ENTRY)
    assert (claim.trace, claim.parent, claim.start_ns, claim.end_ns) == (TRACE, SPAN, END_NS - 3_000_000, END_NS)
    assert (allocate.name, allocate.parent, allocate.end_ns - allocate.start_ns) == ("allocate", claim.id, 1_000_000)
    assert (prepare.name, prepare.parent, prepare.end_ns - prepare.start_ns) == ("prepare", claim.id, 2_000_000)
    assert claim.attributes["nbagent.slot"] == "c07-x8q2m4k9w1ze"
    # An entry that is sent again has the same ids, so that a collector stores it once.
    assert traces.spans(HOST_ENTRY)[0].id == claim.id and len({claim.id, allocate.id, prepare.id}) == 3


def test_a_claim_of_a_gateway_is_a_span_beside_that_of_its_host() -> None:
    gateway, *parts = traces.spans(gateway_entry())
    assert (gateway.trace, gateway.parent, gateway.end_ns - gateway.start_ns) == (TRACE, SPAN, 10_000_000)
    assert [(part.name, part.end_ns - part.start_ns) for part in parts] == [
        ("wait", 1_000_000), ("connect", 2_000_000), ("answer", 7_000_000),
    ]
    assert {part.parent for part in parts} == {gateway.id} and not gateway.failed
    refused, *parts = traces.spans(gateway_entry(503, -1, -1))
    assert refused.failed and [part.name for part in parts] == ["wait"]


@pytest.mark.parametrize("entry", [
    gateway_entry(trace="-"), gateway_entry(trace=f"{TRACE}-"), HOST_ENTRY | {"NBAGENT_TRACE_ID": None},
    HOST_ENTRY | {"_SYSTEMD_UNIT": "user@1000.service"}, HOST_ENTRY | {"NBAGENT_TOOK_US": "x"},
    gateway_entry() | {"_SYSTEMD_UNIT": "nbagent.service"}, {"__REALTIME_TIMESTAMP": AT},
    {name: value for name, value in HOST_ENTRY.items() if name != "NBAGENT_TOOK_US"},
])
def test_other_entries_have_no_spans(entry: dict[str, Any]) -> None:
    if entry.get("NBAGENT_TRACE_ID", "") is None:
        del entry["NBAGENT_TRACE_ID"]
    assert traces.spans(entry) == []


class Collector(HTTPServer):
    """Responds with the statuses in turn, and keeps the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Received)
        self.statuses: list[int] = []
        self.requests: list[tuple[str, str, dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"


class _Received(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, self.headers["Content-Type"], body))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def exported(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, *, once: bool = True
) -> tuple[int, list[str]]:
    """The number of spans that were sent, and what was complained about."""
    monkeypatch.setattr(traces, "_batches", lambda *_, once: iter([[HOST_ENTRY, gateway_entry(), {**HOST_ENTRY}]]))
    monkeypatch.setattr(traces, "RETRY_S", 0.01)
    complaints: list[str] = []
    return traces.export(collector.url, 0.0, once=once, complain=complaints.append), complaints


def test_spans_are_sent_by_otlp(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    assert exported(collector, monkeypatch) == (10, [])
    (path, kind, host), (_, _, gateway) = collector.requests
    assert (path, kind) == ("/v1/traces", "application/json")
    (resource,) = host["resourceSpans"]
    assert {"key": "service.name", "value": {"stringValue": "nbagent"}} in resource["resource"]["attributes"]
    (scope,) = resource["scopeSpans"]
    claim = scope["spans"][0]
    # 64-bit integers are strings in the JSON encoding of protocol buffers, and ids are hexadecimal in that of OTLP.
    assert (claim["traceId"], claim["parentSpanId"], claim["endTimeUnixNano"]) == (TRACE, SPAN, str(END_NS))
    status = {"key": "http.response.status_code", "value": {"intValue": "200"}}
    assert status in gateway["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["attributes"]


def test_spans_are_sent_again_to_a_busy_collector_and_dropped_by_one_that_refuses_them(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector.statuses = [503, 503, 200, 400]
    sent, complaints = exported(collector, monkeypatch, once=False)
    assert (sent, len(collector.requests)) == (6, 4)
    assert complaints == [f"{collector.url}: status 503", f"{collector.url}: status 400"]
    collector.statuses = [503]
    with pytest.raises(traces.CollectorFailed, match="status 503"):
        exported(collector, monkeypatch)
