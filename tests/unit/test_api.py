"""What each call of the control API answers, by Flask's client and a supervisor on a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import LABEL, FakeSupervisor
from flask.testing import FlaskClient

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


def ops(supervisor: FakeSupervisor) -> list[str]:
    return [request["op"] for request in supervisor.asked]


def test_a_claim_gives_the_whole_document_and_a_url_with_the_token(api: FlaskClient) -> None:
    answer = api.post("/claim")
    claim = answer.json
    assert answer.status_code == 200
    assert claim["url"] == f"http://localhost:8000{claim['path']}?token={claim['token']}"
    assert {"slot", "image", "claimed_at", "expires_at", "limits"} <= set(claim)
    assert answer.headers["Cache-Control"] == "no-store"


def test_a_claim_by_get_takes_its_options_from_the_query(api: FlaskClient) -> None:
    claim = api.get("/claim?memory=512M&cpu_weight=50&cpu_quota=1/4&ttl=2h").json
    assert claim["limits"] == {"memory_bytes": 512 << 20, "cpu_weight": 50, "cpu_quota": 1.0, "tasks": 256}


def test_a_claim_tells_the_supervisor_who_called(api: FlaskClient, supervisor: FakeSupervisor) -> None:
    api.post("/claim", json={"ttl": 60}, headers={"Idempotency-Key": "k1"})
    assert supervisor.asked[-1]["args"] == {"options": {"ttl": 60}, "key": "k1", "client": "127.0.0.1"}


@pytest.mark.parametrize(
    ("host", "front"),
    [
        ("agent:9000", "http://agent:8000"),
        ("10.0.0.7:9000", "http://10.0.0.7:8000"),
        ("[::1]:9000", "http://[::1]:8000"),
        ("[::1]", "http://[::1]:8000"),
    ],
)
def test_the_url_has_the_name_that_the_api_was_called_by(
    supervisor: FakeSupervisor, tmp_path: Path, host: str, front: str
) -> None:
    (tmp_path / "token").write_text("secret-token")
    bearer = {"Host": host, "Authorization": "Bearer secret-token"}
    api = client(supervisor, tmp_path)
    assert api.post("/claim", headers=bearer).json["url"].startswith(front + "/user/")


@pytest.mark.parametrize("host", ["a b", "evil<script>", "x/y", "@", "[1.2.3.4]:x"])
def test_a_host_header_that_is_no_name_is_replaced_by_the_machines(
    supervisor: FakeSupervisor, tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "c07.example")
    (tmp_path / "token").write_text("secret-token")
    bearer = {"Host": host, "Authorization": "token secret-token"}
    api = client(supervisor, tmp_path)
    assert api.post("/claim", headers=bearer).json["url"].startswith("http://c07.example:8000/user/")


def test_the_operators_public_url_wins_over_the_host_header(
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
def test_with_subdomains_each_url_has_an_origin_of_its_own(
    supervisor: FakeSupervisor, tmp_path: Path, public_url: str, scheme: str, port: str
) -> None:
    router = {"url_mode": "subdomain", "domain": "nb.example.org", "public_url": public_url}
    api = client(supervisor, tmp_path, router=router)
    claim = api.get("/claim").json
    front = f"{scheme}://{claim['slot']}.nb.example.org{port}"
    assert claim["url"] == f"{front}{claim['path']}?token={claim['token']}"


def test_a_deep_link_keeps_its_query_and_its_fragment(api: FlaskClient) -> None:
    claim = api.post("/claim", json={"path": "lab/tree/a.ipynb?reset=1#cell"}).json
    assert claim["url"].endswith(f"/lab/tree/a.ipynb?reset=1&token={claim['token']}#cell")


def test_a_claim_brings_a_megabyte_of_files(api: FlaskClient, supervisor: FakeSupervisor) -> None:
    files = {"a/b.txt": "ä" * 400_000, "c.bin": {"base64": "AAEC"}}
    assert api.post("/claim", json={"files": files}).status_code == 200
    args = supervisor.asked[-1]["args"]
    assert args["options"] == {} and args["files"]["entries"] == [["a/b.txt", 800_000], ["c.bin", 3]]


def test_files_are_too_long_for_a_query_and_an_archive_is_not(api: FlaskClient) -> None:
    assert api.get("/claim?files=a").status_code == 400
    assert api.get("/claim?archive=https://data.example.org/a.zip").status_code == 200


def test_only_a_claim_may_be_as_long_as_files_are(api: FlaskClient) -> None:
    answer = api.patch(f"/slots/{ABSENT}", data=b" " * 70_000, content_type="application/json")
    assert answer.status_code == 413


def test_the_same_idempotency_key_gives_the_same_slot(api: FlaskClient, supervisor: FakeSupervisor) -> None:
    key = {"Idempotency-Key": "one-of-a-kind"}
    first, second = (api.post("/claim", headers=key).json for _ in range(2))
    assert first["slot"] == second["slot"]
    assert len(supervisor.slots) == 1
    assert api.post("/claim", json={"ttl": 60}, headers=key).status_code == 422


def test_slots_are_listed_shown_changed_and_released_without_their_token(api: FlaskClient) -> None:
    claim = api.post("/claim").json
    path = f"/slots/{claim['slot']}"
    assert [slot["slot"] for slot in api.get("/slots").json] == [claim["slot"]]
    assert claim["token"] not in api.get("/slots").text + api.get(path).text
    assert api.patch(path, json={"memory": "2G"}).json["limits"]["memory_bytes"] == 2 << 30
    assert api.delete(path).json["state"] == "stopping"
    assert api.get(path).status_code == 404


def test_drain_stops_claims_and_its_end_resumes_them(api: FlaskClient) -> None:
    assert api.post("/drain").json["draining"] is True
    refused = api.post("/claim")
    assert (refused.status_code, refused.json["type"]) == (503, "urn:nbagent:problem:draining")
    assert api.delete("/drain").json["draining"] is False
    assert api.post("/claim").status_code == 200


def test_a_full_host_says_when_to_come_back(supervisor: FakeSupervisor, api: FlaskClient) -> None:
    supervisor.capacity = 0
    answer = api.post("/claim")
    assert (answer.status_code, answer.json["type"]) == (503, "urn:nbagent:problem:full")
    assert answer.headers["Retry-After"] == "5"  # 4.2 s, rounded up
    assert answer.content_type == "application/problem+json"


def test_stats_speak_tmpnbs_words(api: FlaskClient) -> None:
    stats = api.get("/stats").json
    assert {"available", "capacity", "version", "container_image"} <= set(stats)
    assert api.get("/images").json[0]["name"] == "minimal"


def test_healthz_says_whether_the_supervisor_answers(supervisor: FakeSupervisor, api: FlaskClient) -> None:
    assert api.get("/healthz").json["healthy"] is True
    supervisor.close()
    answer = api.get("/healthz")
    assert (answer.status_code, answer.json["type"]) == (503, "urn:nbagent:problem:supervisor-unavailable")
    assert answer.headers["Retry-After"]


def test_readyz_gives_every_reason_why_a_claim_would_be_refused(
    supervisor: FakeSupervisor, api: FlaskClient
) -> None:
    assert api.get("/readyz").json == {"ready": True, "available": 1000}
    supervisor.capacity = 0
    assert api.get("/readyz").json["type"] == "urn:nbagent:problem:full"
    supervisor.draining = True
    answer = api.get("/readyz")
    assert (answer.status_code, answer.json["type"]) == (503, "urn:nbagent:problem:draining")
    assert answer.json["reasons"] == ["the host is draining"]
    supervisor.ready = False
    answer = api.get("/readyz")
    assert (answer.json["type"], len(answer.json["reasons"])) == ("urn:nbagent:problem:start-failed", 2)
    assert answer.headers["Retry-After"]


def test_metrics_are_prometheus_text_of_the_stats(api: FlaskClient) -> None:
    answer = api.get("/metrics")
    lines = answer.text.splitlines()
    assert answer.content_type.startswith("text/plain")
    for line in (
        'nbagent_slots{state="warm"} 2.0',
        'nbagent_pool_warm{image="minimal"} 2.0',
        "nbagent_claims_refused_total 1.0",
        'nbagent_build_info{label="c07",version="0.3.0"} 1.0',
        'nbagent_claim_seconds_bucket{le="0.05"} 3.0',
        'nbagent_claim_seconds_bucket{le="+Inf"} 3.0',
        "nbagent_claim_seconds_count 3.0",
        "nbagent_claim_seconds_sum 0.06",
        "nbagent_draining 0.0",
    ):
        assert line in lines


def test_head_of_claim_costs_no_slot(api: FlaskClient, supervisor: FakeSupervisor) -> None:
    answer = api.head("/claim")
    assert (answer.status_code, set(answer.headers["Allow"].split(", "))) == (405, {"GET", "POST"})
    assert ops(supervisor) == []
    assert api.head("/stats").status_code == 200
    assert api.head("/stats").text == ""


def test_options_says_what_a_path_allows(api: FlaskClient) -> None:
    answer = api.options("/claim")
    assert (answer.status_code, answer.headers["Allow"]) == (204, "GET, OPTIONS, POST")
    assert api.options("/nowhere").status_code == 404


@pytest.mark.parametrize("path", ["/nowhere", "/claim/", "/slots/", "/api", "/static/x"])
def test_a_path_that_is_not_in_the_table_is_a_problem(api: FlaskClient, path: str) -> None:
    answer = api.get(path)
    assert (answer.status_code, answer.json["type"]) == (404, "urn:nbagent:problem:not-found")
    assert answer.headers["Cache-Control"] == "no-store"


def test_a_method_that_is_not_in_the_table_is_a_problem(api: FlaskClient) -> None:
    answer = api.put("/claim")
    assert (answer.status_code, answer.json["type"]) == (405, "urn:nbagent:problem:method-not-allowed")
    assert answer.headers["Allow"]


def test_a_supervisor_that_is_down_is_a_problem_with_retry_after(
    supervisor: FakeSupervisor, api: FlaskClient
) -> None:
    supervisor.close()
    for path in ("/claim", "/slots", f"/slots/{ABSENT}", "/stats", "/metrics", "/images"):
        answer = api.get(path)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")


def test_a_bug_is_a_problem_without_a_traceback(
    api: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(ControlClient, "call", broken)
    answer = api.get("/stats")
    assert (answer.status_code, answer.json["type"]) == (500, "urn:nbagent:problem:internal")
    assert "secret" not in answer.text
    assert "a secret detail" in caplog.text


def test_the_index_links_to_everything_that_can_be_read(api: FlaskClient) -> None:
    assert api.get("/").json["links"]["openapi"] == "/openapi.json"
