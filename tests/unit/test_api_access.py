"""Who may call: trusted peers and bearers of the token; no foreign web page, no rebound name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import LABEL, FakeSupervisor
from flask.testing import FlaskClient

from nbagent.api import hostnames
from nbagent.api.access import is_trusted
from nbagent.api.app import create_app
from nbagent.config import host_config
from nbagent.config.host_config import ApiSettings
from nbagent.web import tokens
from nbagent.wire.control import ControlClient

TOKEN = "a-token-of-forty-three-characters-or-so"
OUTSIDE = "192.0.2.9"
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[FakeSupervisor]:
    with FakeSupervisor(tmp_path / "control.sock") as running:
        yield running


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture
def api(supervisor: FakeSupervisor, token_file: Path) -> FlaskClient:
    return client(supervisor, token_file)


def client(supervisor: FakeSupervisor, token_file: Path, **settings: Any) -> FlaskClient:
    tables = {"host": {"label": LABEL}, "api": settings}
    app = create_app(host_config.parse(tables), ControlClient(supervisor.path, 5), token_file)
    return app.test_client()


def status(api: FlaskClient, path: str = "/slots", peer: str = "127.0.0.1", **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return api.get(path, headers=named, environ_base={"REMOTE_ADDR": peer}).status_code


def test_a_trusted_peer_needs_no_token(api: FlaskClient) -> None:
    for peer in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        assert status(api, peer=peer) == 200


def test_another_peer_needs_the_token(api: FlaskClient) -> None:
    answer = api.get("/slots", environ_base={"REMOTE_ADDR": OUTSIDE})
    assert (answer.status_code, answer.json["type"]) == (401, "urn:nbagent:problem:unauthenticated")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    for peer in (OUTSIDE, "::ffff:192.0.2.9", "", "unix"):
        assert status(api, peer=peer) == 401
        assert status(api, peer=peer, Authorization=f"Bearer {TOKEN}") == 200
        assert status(api, peer=peer, Authorization=f"token {TOKEN}") == 200


@pytest.mark.parametrize("token", ["wrong", "", TOKEN + "x", TOKEN[:-1], "\xff", "ä" * 40])
def test_a_wrong_token_is_forbidden_even_to_a_trusted_peer(api: FlaskClient, token: str) -> None:
    assert status(api, peer=OUTSIDE, Authorization=f"Bearer {token}") == 403
    assert status(api, Authorization=f"Bearer {token}") == 403


def test_another_scheme_of_authorization_counts_as_none(api: FlaskClient) -> None:
    assert status(api, Authorization="Basic dTpw") == 200
    assert status(api, peer=OUTSIDE, Authorization="Basic dTpw") == 401


@pytest.mark.parametrize(
    "header", ["X-Forwarded-For", "X-Forwarded-Host", "Forwarded", "X-Real-IP", "Via", "x-forwarded-for"]
)
def test_an_address_is_not_trusted_behind_a_proxy(api: FlaskClient, header: str) -> None:
    assert status(api, **{header: "127.0.0.1"}) == 401
    assert status(api, **{header: "127.0.0.1"}, Authorization=f"Bearer {TOKEN}") == 200


def test_an_empty_or_absent_token_file_admits_nobody(supervisor: FakeSupervisor, token_file: Path) -> None:
    token_file.write_text("\n")
    for _ in range(2):
        api = client(supervisor, token_file)
        assert status(api, peer=OUTSIDE, Authorization="Bearer ") == 403
        assert status(api, peer=OUTSIDE, Authorization=f"Bearer {TOKEN}") == 403
        token_file.unlink(missing_ok=True)


def test_a_changed_token_file_is_read_again(token_file: Path) -> None:
    token = tokens.TokenFile(token_file)
    assert token.matches(TOKEN)
    token_file.write_text("another")
    os.utime(token_file, ns=(1, 1))
    assert token.matches("another")
    assert not token.matches(TOKEN)


def test_what_says_nothing_of_the_slots_is_open(api: FlaskClient) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json", "/"):
        assert status(api, path, peer=OUTSIDE) == 200
    for path in ("/claim", "/slots", "/stats", "/images", "/metrics", f"/slots/{LABEL}-x8q2m4k9w1ze"):
        assert status(api, path, peer=OUTSIDE) == 401


@pytest.mark.parametrize("path", ["/claim", "/slots", "/stats"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:8000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Referer": "http://localhost:8000/user/x/lab"},
        {"Sec-Fetch-Site": "cross-site", "Referer": "https://evil.example/page"},
        {"Origin": "https://evil.example", "Authorization": f"Bearer {TOKEN}"},
    ],
)
def test_a_foreign_web_page_is_forbidden(
    api: FlaskClient, supervisor: FakeSupervisor, path: str, headers: dict[str, str]
) -> None:
    assert status(api, path, **headers) == 403
    assert supervisor.asked == []


def test_the_apis_own_origin_may_call(api: FlaskClient) -> None:
    assert status(api, Origin="http://localhost", Sec_Fetch_Site="same-origin") == 200
    assert status(api, Sec_Fetch_Site="none", User_Agent=FIREFOX) == 200


def test_a_browser_may_not_claim_by_get_without_saying_where_it_comes_from(api: FlaskClient) -> None:
    assert status(api, "/claim", Host="10.0.0.7:9000", User_Agent=FIREFOX) == 403
    assert status(api, "/claim", User_Agent=FIREFOX, Sec_Fetch_Site="none") == 200
    assert status(api, "/claim", User_Agent=FIREFOX, Authorization=f"Bearer {TOKEN}") == 200
    assert status(api, "/claim", User_Agent="curl/8.14.1") == 200


def test_an_allowed_origin_may_call_and_read(supervisor: FakeSupervisor, token_file: Path) -> None:
    origin = "https://example.org"
    api = client(supervisor, token_file, allowed_origins=[origin])
    answer = api.post("/claim", headers={"Origin": origin, "Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    assert answer.headers["Vary"] == "Origin"
    assert status(api, Sec_Fetch_Site="cross-site", Referer=origin + "/page") == 200
    assert status(api, Origin="https://example.org.evil.example") == 403


def test_an_allowed_origin_can_read_a_refusal(supervisor: FakeSupervisor, token_file: Path) -> None:
    api = client(supervisor, token_file, allowed_origins=["https://example.org"])
    supervisor.capacity = 0
    answer = api.post("/claim", headers={"Origin": "https://example.org"})
    assert answer.status_code == 503
    assert answer.headers["Access-Control-Allow-Origin"] == "https://example.org"
    assert "Retry-After" in answer.headers["Access-Control-Expose-Headers"]


def test_a_preflight_is_answered_without_a_token(supervisor: FakeSupervisor, token_file: Path) -> None:
    api = client(supervisor, token_file, allowed_origins=["https://example.org"])
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    answer = api.options("/claim", headers=asked, environ_base={"REMOTE_ADDR": OUTSIDE})
    assert answer.status_code == 204
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert "Idempotency-Key" in answer.headers["Access-Control-Allow-Headers"]
    assert api.options("/claim", headers=asked | {"Origin": "https://evil.example"}).status_code == 403


def test_any_origin_may_call_when_all_are_allowed(supervisor: FakeSupervisor, token_file: Path) -> None:
    api = client(supervisor, token_file, allowed_origins=["*"])
    assert status(api, "/claim", Origin="https://anybody.example") == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9000", "localhost.evil.example", "a b"])
def test_a_name_that_is_not_this_hosts_is_forbidden(api: FlaskClient, host: str) -> None:
    assert status(api, Host=host) == 403
    assert status(api, Host=host, Origin=f"http://{host}") == 403
    assert status(api, Host=host, Authorization=f"Bearer {TOKEN}") == 200


@pytest.mark.parametrize(
    "host", ["127.0.0.1:9000", "[::1]:9000", "localhost", "LOCALHOST:9000", "a.localhost"]
)
def test_an_address_and_localhost_are_names_of_this_host(api: FlaskClient, host: str) -> None:
    assert status(api, Host=host) == 200


def test_the_machines_and_the_routers_names_are_names_of_this_host(
    supervisor: FakeSupervisor, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "C07")
    settings = host_config.parse(
        {"host": {"label": LABEL}, "router": {"public_url": "https://nb.example.org:8443"}}
    )
    api = create_app(settings, ControlClient(supervisor.path, 5), token_file).test_client()
    for host in ("c07:9000", "c07", "nb.example.org", "NB.example.org:9000", "c07."):
        assert status(api, Host=host) == 200


def test_the_machine_is_also_named_by_its_search_domains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "c07")
    resolver = tmp_path / "resolv.conf"
    resolver.write_text("# comment\n\nnameserver 10.0.0.1\nsearch lab.example. example\n")
    assert hostnames.machine_names(resolver) == {"c07", "c07.lab.example", "c07.example"}
    assert hostnames.machine_names(tmp_path / "absent") == {"c07"}


def test_trust_is_by_network() -> None:
    networks = ApiSettings().trusted_networks
    assert is_trusted("127.0.0.1", networks)
    assert not is_trusted("10.0.0.1", networks)
    assert not is_trusted("not an address", networks)
    assert not is_trusted("fe80::1%eth0", networks)
