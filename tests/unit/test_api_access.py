# SPDX-License-Identifier: BSD-3-Clause
"""Access control: trusted peers and bearers of the token; cross-site requests and DNS rebinding are refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import LABEL, FakeSupervisor
from flask.testing import FlaskClient

from nbagent.api import hostnames
from nbagent.api.__main__ import _warn_of_absent
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
    response = api.get("/slots", environ_base={"REMOTE_ADDR": OUTSIDE})
    assert (response.status_code, response.json["type"]) == (401, "urn:nbagent:problem:unauthenticated")
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    for peer in (OUTSIDE, "::ffff:192.0.2.9", "", "unix"):
        assert status(api, peer=peer) == 401
        assert status(api, peer=peer, Authorization=f"Bearer {TOKEN}") == 200
        assert status(api, peer=peer, Authorization=f"token {TOKEN}") == 200


@pytest.mark.parametrize("token", ["wrong", "", TOKEN + "x", TOKEN[:-1], "\xff", "ä" * 40])
def test_a_wrong_token_is_forbidden_even_to_a_trusted_peer(api: FlaskClient, token: str) -> None:
    assert status(api, peer=OUTSIDE, Authorization=f"Bearer {token}") == 403
    assert status(api, Authorization=f"Bearer {token}") == 403


def test_other_schemes_of_authorization_are_ignored(api: FlaskClient) -> None:
    assert status(api, Authorization="Basic dTpw") == 200
    assert status(api, peer=OUTSIDE, Authorization="Basic dTpw") == 401


@pytest.mark.parametrize(
    "header", ["X-Forwarded-For", "X-Forwarded-Host", "Forwarded", "X-Real-IP", "Via", "x-forwarded-for"]
)
def test_header_of_a_proxy_voids_trust_in_the_address(api: FlaskClient, header: str) -> None:
    assert status(api, **{header: "127.0.0.1"}) == 401
    assert status(api, **{header: "127.0.0.1"}, Authorization=f"Bearer {TOKEN}") == 200


def test_empty_or_absent_token_file_admits_no_token(supervisor: FakeSupervisor, token_file: Path) -> None:
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


def test_a_credential_takes_the_place_of_the_operators_file(
    token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    # Without a credential of its name, as for a service that is not started by our unit.
    assert tokens.passed(token_file).matches(TOKEN)
    (credentials / token_file.name).write_text("other\n")
    passed = tokens.passed(token_file)
    assert passed.matches("other") and not passed.matches(TOKEN) and passed.path == token_file
    # SetCredential= in the unit, where the operator's file does not exist.
    (credentials / token_file.name).write_text("\n")
    assert not tokens.passed(token_file).matches("")
    assert not tokens.passed(token_file).matches("\n")


def test_a_token_that_the_settings_need_and_that_is_absent_is_reported(
    token_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    present, absent = tokens.TokenFile(token_file), tokens.TokenFile(tmp_path / "landing-token")
    _warn_of_absent(host_config.parse({}), present, absent)
    assert caplog.messages == []
    _warn_of_absent(host_config.parse({"landing": {"access": "token"}}), present, absent)
    message, = caplog.messages
    assert str(tmp_path / "landing-token") in message and "landing.access" in message and "openssl" in message


def test_routes_without_facts_about_slots_are_open(api: FlaskClient) -> None:
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
def test_cross_site_request_is_forbidden(
    api: FlaskClient, supervisor: FakeSupervisor, path: str, headers: dict[str, str]
) -> None:
    assert status(api, path, **headers) == 403
    assert supervisor.asked == []


def test_same_origin_request_is_permitted(api: FlaskClient) -> None:
    assert status(api, Origin="http://localhost", Sec_Fetch_Site="same-origin") == 200
    assert status(api, Sec_Fetch_Site="none", User_Agent=FIREFOX) == 200


def test_browser_may_not_claim_by_get_without_sec_fetch_site(api: FlaskClient) -> None:
    assert status(api, "/claim", Host="10.0.0.7:9000", User_Agent=FIREFOX) == 403
    assert status(api, "/claim", User_Agent=FIREFOX, Sec_Fetch_Site="none") == 200
    assert status(api, "/claim", User_Agent=FIREFOX, Authorization=f"Bearer {TOKEN}") == 200
    assert status(api, "/claim", User_Agent="curl/8.14.1") == 200


def test_allowed_origin_may_call_and_read(supervisor: FakeSupervisor, token_file: Path) -> None:
    origin = "https://example.org"
    api = client(supervisor, token_file, allowed_origins=[origin])
    response = api.post("/claim", headers={"Origin": origin, "Sec-Fetch-Site": "cross-site"})
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == origin
    assert response.headers["Vary"] == "Origin"
    assert status(api, Sec_Fetch_Site="cross-site", Referer=origin + "/page") == 200
    assert status(api, Origin="https://example.org.evil.example") == 403


def test_allowed_origin_may_read_an_error(supervisor: FakeSupervisor, token_file: Path) -> None:
    api = client(supervisor, token_file, allowed_origins=["https://example.org"])
    supervisor.capacity = 0
    response = api.post("/claim", headers={"Origin": "https://example.org"})
    assert response.status_code == 503
    assert response.headers["Access-Control-Allow-Origin"] == "https://example.org"
    assert "Retry-After" in response.headers["Access-Control-Expose-Headers"]


def test_preflight_needs_no_token(supervisor: FakeSupervisor, token_file: Path) -> None:
    api = client(supervisor, token_file, allowed_origins=["https://example.org"])
    preflight = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    response = api.options("/claim", headers=preflight, environ_base={"REMOTE_ADDR": OUTSIDE})
    assert response.status_code == 204
    assert "POST" in response.headers["Access-Control-Allow-Methods"]
    assert "Idempotency-Key" in response.headers["Access-Control-Allow-Headers"]
    assert api.options("/claim", headers=preflight | {"Origin": "https://evil.example"}).status_code == 403


def test_star_allows_every_origin(supervisor: FakeSupervisor, token_file: Path) -> None:
    api = client(supervisor, token_file, allowed_origins=["*"])
    assert status(api, "/claim", Origin="https://any.example") == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9000", "localhost.evil.example", "a b"])
def test_host_header_of_another_machine_is_forbidden(api: FlaskClient, host: str) -> None:
    assert status(api, Host=host) == 403
    assert status(api, Host=host, Origin=f"http://{host}") == 403
    assert status(api, Host=host, Authorization=f"Bearer {TOKEN}") == 200


@pytest.mark.parametrize(
    "host", ["127.0.0.1:9000", "[::1]:9000", "localhost", "LOCALHOST:9000", "a.localhost"]
)
def test_addresses_and_localhost_are_names_of_this_host(api: FlaskClient, host: str) -> None:
    assert status(api, Host=host) == 200


def test_hostname_and_public_url_are_names_of_this_host(
    supervisor: FakeSupervisor, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "C07")
    settings = host_config.parse(
        {"host": {"label": LABEL}, "router": {"public_url": "https://nb.example.org:8443"}}
    )
    api = create_app(settings, ControlClient(supervisor.path, 5), token_file).test_client()
    for host in ("c07:9000", "c07", "nb.example.org", "NB.example.org:9000", "c07."):
        assert status(api, Host=host) == 200


def test_machine_names_include_search_domains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "c07")
    resolver = tmp_path / "resolv.conf"
    resolver.write_text("# comment\n\nnameserver 10.0.0.1\nsearch lab.example. example\n")
    assert hostnames.machine_names(resolver) == {"c07", "c07.lab.example", "c07.example"}
    assert hostnames.machine_names(tmp_path / "absent") == {"c07"}


def test_is_trusted() -> None:
    networks = ApiSettings().trusted_networks
    assert is_trusted("127.0.0.1", networks)
    assert not is_trusted("10.0.0.1", networks)
    assert not is_trusted("not an address", networks)
    assert not is_trusted("fe80::1%eth0", networks)
