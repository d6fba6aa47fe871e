# SPDX-License-Identifier: BSD-3-Clause
"""The responses of the control API's routes, by Flask's test client and a fake supervisor on a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import LABEL, FakeSupervisor
from flask.testing import FlaskClient

import nbagent
from nbagent.api.app import create_app
from nbagent.config import host_config
from nbagent.wire.control import ControlClient

SETTINGS = {"host": {"label": LABEL}}
ABSENT = f"{LABEL}-000000000000"


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[FakeSupervisor]:
    with FakeSupervisor(tmp_path / "control.sock") as running:
        yield running


@pytest.fixture
def api(supervisor: FakeSupervisor, tmp_path: Path) -> FlaskClient:
    return client(supervisor, tmp_path)


def client(supervisor: FakeSupervisor, tmp_path: Path, **tables: Any) -> FlaskClient:
    settings = host_config.parse(SETTINGS | tables)
    return create_app(settings, ControlClient(supervisor.path, 5), tmp_path / "token").test_client()


def operations(supervisor: FakeSupervisor) -> list[str]:
    return [request["op"] for request in supervisor.asked]


def test_claim_returns_the_whole_document_and_a_url_with_the_token(api: FlaskClient) -> None:
    response = api.post("/claim")
    claim = response.json
    assert response.status_code == 200
    assert claim["url"] == f"http://localhost:8000{claim['path']}?token={claim['token']}"
    assert {"slot", "image", "claimed_at", "expires_at", "limits"} <= set(claim)
    assert response.headers["Cache-Control"] == "no-store"


def test_a_claim_by_get_takes_its_options_from_the_query(api: FlaskClient) -> None:
    claim = api.get("/claim?memory=512M&cpu_weight=50&cpu_quota=1/4&ttl=2h").json
    assert claim["limits"] == {"memory_bytes": 512 << 20, "cpu_weight": 50, "cpu_quota": 1.0, "tasks": 256}


def test_claim_sends_options_key_and_client_to_the_supervisor(api: FlaskClient, supervisor: FakeSupervisor) -> None:
    api.post("/claim", json={"ttl": 60}, headers={"Idempotency-Key": "k1"})
    assert supervisor.asked[-1]["args"] == {"options": {"ttl": 60}, "key": "k1", "client": "127.0.0.1"}


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("agent:9000", "http://agent:8000"),
        ("10.0.0.7:9000", "http://10.0.0.7:8000"),
        ("[::1]:9000", "http://[::1]:8000"),
        ("[::1]", "http://[::1]:8000"),
    ],
)
def test_url_has_the_host_of_the_request(
    supervisor: FakeSupervisor, tmp_path: Path, host: str, origin: str
) -> None:
    (tmp_path / "token").write_text("secret-token")
    bearer = {"Host": host, "Authorization": "Bearer secret-token"}
    api = client(supervisor, tmp_path)
    assert api.post("/claim", headers=bearer).json["url"].startswith(origin + "/user/")


@pytest.mark.parametrize("host", ["a b", "evil<script>", "x/y", "@", "[1.2.3.4]:x"])
def test_malformed_host_header_is_replaced_by_the_hostname(
    supervisor: FakeSupervisor, tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "c07.example")
    (tmp_path / "token").write_text("secret-token")
    bearer = {"Host": host, "Authorization": "token secret-token"}
    api = client(supervisor, tmp_path)
    assert api.post("/claim", headers=bearer).json["url"].startswith("http://c07.example:8000/user/")


def test_public_url_overrides_the_host_header(
    supervisor: FakeSupervisor, tmp_path: Path
) -> None:
    api = client(supervisor, tmp_path, router={"public_url": "https://nb.example.org"})
    assert api.get("/claim").json["url"].startswith("https://nb.example.org/user/")


@pytest.mark.parametrize(
    ("public_url", "scheme", "port"),
    [
        ("auto", "http", ":8000"),
        ("https://nb.example.org", "https", ""),
        ("https://nb.example.org:8443", "https", ":8443"),
    ],
)
def test_subdomain_mode_gives_each_slot_an_origin(
    supervisor: FakeSupervisor, tmp_path: Path, public_url: str, scheme: str, port: str
) -> None:
    router = {"url_mode": "subdomain", "domain": "nb.example.org", "public_url": public_url}
    api = client(supervisor, tmp_path, router=router)
    claim = api.get("/claim").json
    origin = f"{scheme}://{claim['slot']}.nb.example.org{port}"
    assert claim["url"] == f"{origin}{claim['path']}?token={claim['token']}"


def test_deep_link_keeps_query_and_fragment(api: FlaskClient) -> None:
    claim = api.post("/claim", json={"path": "lab/tree/a.ipynb?reset=1#cell"}).json
    assert claim["url"].endswith(f"/lab/tree/a.ipynb?reset=1&token={claim['token']}#cell")


def test_claim_with_a_megabyte_of_files(api: FlaskClient, supervisor: FakeSupervisor) -> None:
    files = {"a/b.txt": "ä" * 400_000, "c.bin": {"base64": "AAEC"}}
    assert api.post("/claim", json={"files": files}).status_code == 200
    args = supervisor.asked[-1]["args"]
    assert args["options"].keys() == {"files"}
    assert args["options"]["files"].entries == (("a/b.txt", 800_000), ("c.bin", 3))


def test_query_may_name_an_archive_but_no_files(api: FlaskClient) -> None:
    assert api.get("/claim?files=a").status_code == 400
    assert api.get("/claim?archive=https://data.example.org/a.zip").status_code == 200


def test_only_a_claim_may_have_a_body_above_64_kib(api: FlaskClient) -> None:
    response = api.patch(f"/slots/{ABSENT}", data=b" " * 70_000, content_type="application/json")
    assert response.status_code == 413


def test_same_idempotency_key_returns_the_same_slot(api: FlaskClient, supervisor: FakeSupervisor) -> None:
    key = {"Idempotency-Key": "one-of-a-kind"}
    first, second = (api.post("/claim", headers=key).json for _ in range(2))
    assert first["slot"] == second["slot"]
    assert len(supervisor.slots) == 1
    assert api.post("/claim", json={"ttl": 60}, headers=key).status_code == 422


def test_slots_are_listed_read_changed_and_released_without_their_token(api: FlaskClient) -> None:
    claim = api.post("/claim").json
    path = f"/slots/{claim['slot']}"
    assert [slot["slot"] for slot in api.get("/slots").json if slot["state"] == "claimed"] == [claim["slot"]]
    assert claim["token"] not in api.get("/slots").text + api.get(path).text
    assert api.patch(path, json={"memory": "2G"}).json["limits"]["memory_bytes"] == 2 << 30
    assert api.delete(path).json["state"] == "stopping"
    assert api.get(path).status_code == 404


def test_a_slot_of_a_former_label_is_read_changed_and_released(
    supervisor: FakeSupervisor, api: FlaskClient, tmp_path: Path
) -> None:
    path = f"/slots/{api.post('/claim').json['slot']}"
    assert path.startswith(f"/slots/{LABEL}-")
    api = client(supervisor, tmp_path, host={"label": "c08"})
    assert api.get(path).status_code == 200
    assert api.patch(path, json={"ttl": "1h"}).status_code == 200
    assert api.delete(path).json["state"] == "stopping"
    response = api.get(path)
    assert (response.status_code, response.json["type"]) == (404, "urn:nbagent:problem:slot-not-found")


def test_drain_refuses_claims_until_it_ends(api: FlaskClient) -> None:
    assert api.post("/drain").json["draining"] is True
    response = api.post("/claim")
    assert (response.status_code, response.json["type"]) == (503, "urn:nbagent:problem:draining")
    assert api.delete("/drain").json["draining"] is False
    assert api.post("/claim").status_code == 200


def test_full_host_sends_retry_after(supervisor: FakeSupervisor, api: FlaskClient) -> None:
    supervisor.capacity = 0
    response = api.post("/claim")
    assert (response.status_code, response.json["type"]) == (503, "urn:nbagent:problem:full")
    assert response.headers["Retry-After"] == "5"  # 4.2 s, rounded up
    assert response.content_type == "application/problem+json"


def test_stats_have_the_fields_of_tmpnb(api: FlaskClient) -> None:
    stats = api.get("/stats").json
    assert {"available", "capacity", "version", "container_image"} <= set(stats)
    assert api.get("/images").json[0]["name"] == "minimal"


def test_healthz_fails_without_the_supervisor(supervisor: FakeSupervisor, api: FlaskClient) -> None:
    assert api.get("/healthz").json["healthy"] is True
    supervisor.close()
    response = api.get("/healthz")
    assert (response.status_code, response.json["type"]) == (503, "urn:nbagent:problem:supervisor-unavailable")
    assert response.headers["Retry-After"]


def test_readyz_lists_every_reason_why_a_claim_would_be_refused(
    supervisor: FakeSupervisor, api: FlaskClient
) -> None:
    assert api.get("/readyz").json == {"ready": True, "available": 1000}
    supervisor.capacity = 0
    assert api.get("/readyz").json["type"] == "urn:nbagent:problem:full"
    supervisor.draining = True
    response = api.get("/readyz")
    assert (response.status_code, response.json["type"]) == (503, "urn:nbagent:problem:draining")
    assert response.json["reasons"] == ["the host is draining"]
    supervisor.ready = False
    response = api.get("/readyz")
    assert (response.json["type"], len(response.json["reasons"])) == ("urn:nbagent:problem:start-failed", 2)
    assert response.headers["Retry-After"]


def test_metrics_are_the_stats_in_prometheus_text_format(api: FlaskClient) -> None:
    for _ in range(3):
        api.post("/claim")
    api.get("/claim?image=no-such-image")
    response = api.get("/metrics")
    lines = response.text.splitlines()
    assert response.content_type.startswith("text/plain")
    for line in (
        'nbagent_slots{state="claimed"} 3.0',
        'nbagent_pool_wanted{image="minimal"} 2.0',
        "nbagent_claims_refused_total 1.0",
        f'nbagent_build_info{{label="c07",version="{nbagent.__version__}"}} 1.0',
        'nbagent_claim_seconds_bucket{le="+Inf"} 3.0',
        "nbagent_claim_seconds_count 3.0",
        "nbagent_draining 0.0",
    ):
        assert line in lines


def test_head_of_claim_starts_no_slot(api: FlaskClient, supervisor: FakeSupervisor) -> None:
    response = api.head("/claim")
    assert (response.status_code, set(response.headers["Allow"].split(", "))) == (405, {"GET", "POST"})
    assert operations(supervisor) == []
    assert api.head("/stats").status_code == 200
    assert api.head("/stats").text == ""


def test_options_lists_the_methods_of_a_path(api: FlaskClient) -> None:
    response = api.options("/claim")
    assert (response.status_code, response.headers["Allow"]) == (204, "GET, OPTIONS, POST")
    assert api.options("/nowhere").status_code == 404


@pytest.mark.parametrize("path", ["/nowhere", "/claim/", "/slots/", "/api", "/static/x", "/slots//x"])
def test_unknown_path_is_a_problem(api: FlaskClient, path: str) -> None:
    response = api.get(path)
    assert (response.status_code, response.json["type"]) == (404, "urn:nbagent:problem:not-found")
    assert response.headers["Cache-Control"] == "no-store"


def test_unknown_method_is_a_problem(api: FlaskClient) -> None:
    response = api.put("/claim")
    assert (response.status_code, response.json["type"]) == (405, "urn:nbagent:problem:method-not-allowed")
    assert response.headers["Allow"]


def test_unavailable_supervisor_is_a_problem_with_retry_after(
    supervisor: FakeSupervisor, api: FlaskClient
) -> None:
    supervisor.close()
    for path in ("/claim", "/slots", f"/slots/{ABSENT}", "/stats", "/metrics", "/images"):
        response = api.get(path)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "2")


def test_unexpected_exception_is_logged_and_its_problem_has_no_detail(
    api: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(ControlClient, "call", fail)
    response = api.get("/stats")
    assert (response.status_code, response.json["type"]) == (500, "urn:nbagent:problem:internal")
    assert "secret" not in response.text
    assert "a secret detail" in caplog.text


def test_index_links_to_every_get_route(api: FlaskClient) -> None:
    assert api.get("/").json["links"]["openapi"] == "/openapi.json"
