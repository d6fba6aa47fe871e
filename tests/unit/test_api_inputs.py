# SPDX-License-Identifier: BSD-3-Clause
"""Invalid input: a problem document names the field and the expected value, and no slot starts."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import LABEL, FakeSupervisor
from flask.testing import FlaskClient

from nbagent.api.app import create_app
from nbagent.config import host_config
from nbagent.wire.control import ControlClient

INVALID_FIELD = "urn:nbagent:problem:invalid-field"
INVALID_BODY = "urn:nbagent:problem:invalid-body"


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[FakeSupervisor]:
    with FakeSupervisor(tmp_path / "control.sock") as running:
        yield running
        assert running.slots == {}, "invalid input started a slot"


@pytest.fixture
def api(supervisor: FakeSupervisor, tmp_path: Path) -> FlaskClient:
    settings = host_config.parse({"host": {"label": LABEL}})
    return create_app(settings, ControlClient(supervisor.path, 5), tmp_path / "token").test_client()


def claim(api: FlaskClient, body: bytes, kind: str = "application/json", **headers: str) -> Any:
    return api.post("/claim", data=body, content_type=kind, headers=headers)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory", "-1"), ("memory", "1e9G"), ("memory", "lots"), ("memory", "9999T"), ("memory", 1),
        ("memory", -1), ("memory", 1.5), ("memory", True), ("memory", None), ("memory", ""),
        ("memory", []), ("memory", {"a": 1}), ("memory", 10**4000), ("memory", "1G\0"), ("memory", "٣G"),
        ("cpu_quota", "2/1"), ("cpu_quota", "1/0"), ("cpu_quota", "500%"), ("cpu_quota", 1),
        ("cpu_weight", 0), ("cpu_weight", "10001"), ("cpu_weight", "9" * 5000), ("cpu_weight", 1.5),
        ("ttl", 0), ("ttl", "0"), ("ttl", "-1h"), ("ttl", "100d"), ("ttl", "soon"), ("ttl", 1e308),
        ("path", "../../etc/passwd"), ("path", "//evil.example/"), ("path", "lab\r\nX: y"),
        ("path", "%2e%2e/x"), ("path", "x" * 3000), ("path", "\ud800"),
        ("image", "../minimal"), ("image", 7),
        ("files", "a.txt"), ("files", [["a", "b"]]), ("files", {"../a": ""}), ("files", {"a": None}),
        ("files", {"a\0b": ""}), ("files", {"a": {"base64": "?"}}), ("archive", 7), ("archive", "https://example.org/x"),
        ("path", "lab/..%2f..%2fx"),
    ],
)
def test_problem_names_the_invalid_option_and_the_expected_value(
    api: FlaskClient, field: str, value: object
) -> None:
    response = api.post("/claim", json={field: value})
    problem = response.json
    assert (response.status_code, problem["type"], problem["field"]) == (400, INVALID_FIELD, field)
    assert problem["expected"]
    assert len(response.data) < 2000
    assert response.content_type == "application/problem+json"


def test_an_unknown_image_is_an_invalid_field(api: FlaskClient) -> None:
    response = api.get("/claim?image=no-such-image")
    assert (response.status_code, response.json["field"]) == (400, "image")


@pytest.mark.parametrize("query", ["memroy=1G", "x=1", "memory[]=1G", "=1"])
def test_an_unknown_field_is_refused(api: FlaskClient, supervisor: FakeSupervisor, query: str) -> None:
    response = api.get(f"/claim?{query}")
    assert (response.status_code, response.json["field"]) == (400, query.partition("=")[0])
    assert "memory" in response.json["expected"]
    assert supervisor.asked == []


def test_problem_of_a_misspelt_field_suggests_the_nearest(api: FlaskClient) -> None:
    assert "did you mean 'memory'" in api.post("/claim", json={"memroy": "1G"}).json["detail"]


def test_option_is_refused_by_routes_without_options(api: FlaskClient) -> None:
    assert api.get("/slots?limit=5").status_code == 400
    assert api.post("/drain", json={"now": True}).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[]", b"null", b'"text"', b"7", b"{'memory': '1G'}", b'{"ttl": NaN}', b'{"ttl": Infinity}',
        b'{"ttl": 1} x', b'\xff\xfe{"ttl": 1}', b'{"path": "\xc3\x28"}', b"\x00", b"\xef\xbb\xbf{}",
        b'{"ttl": 1, "ttl": 2}', b"[" * 60000, b'{"a":' * 10000, b'{"ttl": ' + b"9" * 5000 + b"}",
    ],
)
def test_body_other_than_a_json_object_is_refused(
    api: FlaskClient, supervisor: FakeSupervisor, body: bytes
) -> None:
    response = claim(api, body)
    assert (response.status_code, response.json["type"]) == (400, INVALID_BODY)
    assert len(response.data) < 1000
    assert supervisor.asked == []


def test_a_number_that_overflows_is_refused(api: FlaskClient) -> None:
    response = claim(api, b'{"ttl": 1e999}')
    assert (response.status_code, response.json["field"]) == (400, "ttl")


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "",
     "application/json; charset=utf-16", "application/xml"],
)
def test_a_body_of_another_type_is_refused(api: FlaskClient, kind: str) -> None:
    response = claim(api, b'{"ttl": 60}', kind)
    assert (response.status_code, response.json["type"]) == (415, INVALID_BODY)
    assert "application/json" in response.json["detail"]


def test_a_compressed_body_is_refused(api: FlaskClient) -> None:
    assert claim(api, b"\x1f\x8b", **{"Content-Encoding": "gzip"}).status_code == 415


def test_body_above_the_limit_is_refused_unread(api: FlaskClient) -> None:
    stream = io.BytesIO(b" " * 10_000_000)
    response = api.post(
        "/claim", input_stream=stream, content_length=10_000_000, content_type="application/json"
    )
    assert (response.status_code, response.json["type"]) == (413, INVALID_BODY)
    assert stream.tell() == 0


def test_options_that_are_too_long_when_escaped_are_refused(api: FlaskClient) -> None:
    assert claim(api, json.dumps({"path": "ä" * 20000}, ensure_ascii=False).encode()).status_code == 413


def test_a_get_with_a_body_is_refused(api: FlaskClient) -> None:
    response = api.get("/claim", data=b'{"ttl": 60}', content_type="application/json")
    assert (response.status_code, response.json["type"]) == (400, INVALID_BODY)


def test_option_in_query_and_body_is_refused(api: FlaskClient) -> None:
    response = api.post("/claim?ttl=60", json={"ttl": 90})
    assert (response.status_code, response.json["field"]) == (400, "ttl")


@pytest.mark.parametrize(
    ("query", "field"),
    [("ttl=60&ttl=90", "ttl"), ("ttl=%ff", "ttl"), ("%ff=1", "query"), ("ttl=60%00", "ttl"), ("ttl", "ttl")],
)
def test_malformed_query_is_refused(api: FlaskClient, query: str, field: str) -> None:
    response = api.get(f"/claim?{query}")
    assert (response.status_code, response.json["field"]) == (400, field)


@pytest.mark.parametrize("key", ["", " ", "a b", "ä", "x" * 256])
def test_malformed_idempotency_key_is_refused(api: FlaskClient, key: str) -> None:
    response = api.post("/claim", headers={"Idempotency-Key": key})
    assert (response.status_code, response.json["field"]) == (400, "Idempotency-Key")


@pytest.mark.parametrize(
    "slot",
    [
        "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e", f"{LABEL}-", f"{LABEL}-x8q2m4k9w1z",
        f"{LABEL}-X8Q2M4K9W1ZE", "a-label-x8q2m4k9w1ze", f"{LABEL}-x8q2m4k9w1ze/..", "%00", "%ff", "x" * 4000,
    ],
)
@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
def test_malformed_slot_id_is_refused_by_the_api(
    api: FlaskClient, supervisor: FakeSupervisor, method: str, slot: str
) -> None:
    response = api.open(f"/slots/{slot}", method=method)
    assert (response.status_code, response.json["type"]) == (404, "urn:nbagent:problem:slot-not-found")
    assert "is not a slot id" in response.json["detail"]
    assert len(response.data) < 1000
    assert supervisor.asked == []


def test_slot_id_with_a_line_break_is_refused(api: FlaskClient, supervisor: FakeSupervisor) -> None:
    assert api.get(f"/slots/{LABEL}-x8q2m4k9w1ze%0a").status_code == 404
    assert supervisor.asked == []


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("slot", [f"{LABEL}-000000000000", "c08-x8q2m4k9w1ze"])
def test_unknown_slot_id_of_any_label_is_refused_by_the_supervisor(
    api: FlaskClient, supervisor: FakeSupervisor, method: str, slot: str
) -> None:
    response = api.open(f"/slots/{slot}", method=method)
    assert (response.status_code, response.json["type"]) == (404, "urn:nbagent:problem:slot-not-found")
    assert supervisor.asked[-1]["args"] == {"id": slot}


def test_update_without_options_is_refused(api: FlaskClient) -> None:
    response = api.patch(f"/slots/{LABEL}-x8q2m4k9w1ze", json={})
    assert (response.status_code, response.json["type"]) == (400, INVALID_BODY)


def test_update_of_the_image_is_refused(api: FlaskClient) -> None:
    response = api.patch(f"/slots/{LABEL}-x8q2m4k9w1ze", json={"image": "minimal"})
    assert (response.status_code, response.json["field"]) == (400, "image")
