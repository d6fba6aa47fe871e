# SPDX-License-Identifier: BSD-3-Clause
"""The landing page without a router: pages for people, responses to tmpnb's clients, refused requests."""

from __future__ import annotations

import html
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import LABEL, FakeSupervisor
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from nbagent.api.backend import HostBackend
from nbagent.config import host_config
from nbagent.core.errors import StartFailed, SupervisorUnavailable
from nbagent.image.store import Image
from nbagent.landing.app import create_app, duration
from nbagent.landing.backend import quantile_ms, retry_delay_s
from nbagent.policy import lending
from nbagent.wire.control import ControlClient

PERSON = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8", "X-Real-IP": "192.0.2.7", "Host": "nb.example.org"}
PROGRAM = {"Accept": "*/*", "X-Real-IP": "192.0.2.8", "Host": "nb.example.org"}
TOKEN = "the-token-of-the-landing-page"


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[FakeSupervisor]:
    with FakeSupervisor(tmp_path / "control.sock", capacity=3) as running:
        yield running


def client_of(supervisor: FakeSupervisor, **tables: Any) -> FlaskClient:
    """A test client of a landing page with the settings `tables`."""
    settings = host_config.parse({"host": {"label": LABEL}, **tables})
    client = ControlClient(supervisor.path, 5)
    backend = HostBackend(settings, client, client)
    return create_app(settings.landing, backend, lambda given: given == TOKEN).test_client()


@pytest.fixture
def landing(supervisor: FakeSupervisor) -> FlaskClient:
    return client_of(supervisor)


def send(
    landing: FlaskClient, method: str, target: str, headers: dict[str, str] | None = None, **given: Any
) -> TestResponse:
    """Sends a request whose target reaches the application unchanged, as it does by gunicorn."""
    environ = {"RAW_URI": target}
    return landing.open(target, method=method, headers=headers or PERSON, environ_overrides=environ, **given)


def claims(supervisor: FakeSupervisor) -> list[dict[str, Any]]:
    return [request["args"] for request in supervisor.asked if request["op"] == "claim"]


def test_a_claim_has_the_trace_of_the_request(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    trace, span = "4b" * 16, "00f0" * 4
    for target, method, status in (("/api/spawn", "POST", 200), ("/spawn", "GET", 302)):
        assert send(landing, method, target, PROGRAM | {"traceparent": f"00-{trace}-{span}-01"}).status_code == status
    assert [claim["trace"] for claim in claims(supervisor)] == [f"{trace}-{span}"] * 2


@pytest.mark.parametrize(("target", "slot_path"), [
    ("/spawn", "lab"),
    ("/spawn/", "lab"),
    ("/spawn/lab/tree/a.ipynb", "lab/tree/a.ipynb"),
    ("/spawn/tree", "tree"),
    ("/spawn/files/x%20y%2Fz.csv?download=1&a=b%26c", "files/x%20y%2Fz.csv?download=1&a=b%26c"),
    ("/spawn?reset", "?reset"),
    ("/spawn/notebooks/%C3%BC.ipynb", "notebooks/%C3%BC.ipynb"),
    ("/spawn/lab/tree/ü.ipynb", "lab/tree/%C3%BC.ipynb"),
    ("http://nb.example.org/spawn/lab?x=1", "lab?x=1"),
])
def test_deep_link_keeps_its_path_and_query_unchanged(
    landing: FlaskClient, supervisor: FakeSupervisor, target: str, slot_path: str
) -> None:
    response = landing.get(
        "/spawn/x" if "spawn/" in target else "/spawn", headers=PERSON, environ_overrides={"RAW_URI": target})
    assert response.status_code == 302
    (slot,) = supervisor.slots.values()
    mark = "&" if "?" in slot_path else "?"
    assert response.headers["Location"] == f"/user/{slot.id}/{slot_path}{mark}token={slot.token}"


@pytest.mark.parametrize("target", ["/spawn//lab/tree/a.ipynb", "/spawn///lab/tree/a.ipynb"])
def test_deep_link_whose_path_begins_with_a_slash_needs_no_second_request(
    landing: FlaskClient, supervisor: FakeSupervisor, target: str
) -> None:
    # A redirect to a normalised spelling would have the scheme of the proxy's connection, which is http.
    response = send(landing, "GET", target, PERSON | {"X-Forwarded-Proto": "https"})
    assert response.status_code == 302, response.headers.get("Location")
    (slot,) = supervisor.slots.values()
    assert response.headers["Location"] == f"/user/{slot.id}/lab/tree/a.ipynb?token={slot.token}"
    assert 'action="/spawn/lab//tree/a.ipynb"' in send(landing, "GET", "/lab//tree/a.ipynb").text


def test_link_that_leaves_the_slot_starts_no_slot(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    for target in ("/spawn/../slots", "/spawn/%2e%2e/slots", "/spawn/lab/..%2f..%2fx"):
        response = landing.get("/spawn/x", headers=PERSON, environ_overrides={"RAW_URI": target})
        assert response.status_code == 400, target
        assert "does not start a notebook" in response.text
    assert not supervisor.slots


def test_second_press_of_the_button_gets_the_same_slot(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    page = send(landing, "GET", "/lab/tree/x%20y.ipynb?a=b").text
    form = re.search(r'<form method="post" action="([^"]+)">\s*<input type="hidden" name="key" value="([^"]+)">', page)
    assert form and html.unescape(form[1]) == "/spawn/lab/tree/x%20y.ipynb?a=b"
    responses = [send(landing, "POST", html.unescape(form[1]), data={"key": form[2]}) for _ in range(2)]
    assert [response.status_code for response in responses] == [303, 303]
    assert responses[0].headers["Location"] == responses[1].headers["Location"]
    assert len(supervisor.slots) == 1


def test_key_of_another_address_gets_another_slot(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    for address in ("192.0.2.7", "192.0.2.8", "192.0.2.7"):
        send(landing, "POST", "/api/spawn", PROGRAM | {"X-Real-IP": address, "Idempotency-Key": "guessed"})
    assert len(supervisor.slots) == 2
    # Callers of the control API cannot send such a key, because it contains a space.
    assert all(" " in claim["key"] for claim in claims(supervisor))


def test_supervisor_receives_the_address_of_the_visitor(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    send(landing, "GET", "/spawn")
    send(landing, "POST", "/api/spawn", PROGRAM)
    assert [claim["client"] for claim in claims(supervisor)] == ["192.0.2.7", "192.0.2.8"]


def test_every_form_has_a_new_key(landing: FlaskClient) -> None:
    keys = {re.findall(r'name="key" value="([^"]+)"', send(landing, "GET", "/").text)[0] for _ in range(5)}
    assert len(keys) == 5 and min(map(len, keys)) >= 22


def test_front_page_with_start_at_once_redirects(supervisor: FakeSupervisor) -> None:
    landing = client_of(supervisor, landing={"start": "at once"})
    page = send(landing, "GET", "/tree/x%20y?a=1&b=2").text
    refresh = re.search(r'<meta http-equiv="refresh" content="1; url=([^"]+)">', page)
    assert refresh and html.unescape(refresh[1]) == "/spawn/tree/x%20y?a=1&b=2"
    assert not supervisor.slots


def test_front_page_shows_title_text_and_lifetime(supervisor: FakeSupervisor) -> None:
    texts = {"title": "Maths <2>", "text": "For you"}
    landing = client_of(supervisor, cull={"idle": "90min"}, slots={"ttl": "3h"}, landing=texts)
    text = send(landing, "GET", "/").text
    assert "at most 3 hours" in text and "90 minutes" in " ".join(text.split())
    assert "Maths &lt;2&gt;" in text and "For you" in text


def test_page_of_a_full_host_refreshes_itself(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    supervisor.capacity = 0
    response = send(landing, "GET", "/spawn/lab/tree/a.ipynb?x=1&y=2")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
    assert 'content="5; url=/spawn/lab/tree/a.ipynb?x=1&amp;y=2"' in response.text
    assert "in use" in response.text


def test_page_of_a_draining_host_does_not_show_it_as_full(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    send(landing, "GET", "/spawn")
    supervisor.draining = True
    response = client_of(supervisor).get("/spawn", headers=PERSON, environ_overrides={"RAW_URI": "/spawn"})
    assert response.status_code == 503 and "No new notebooks are started here" in response.text
    assert "in use" not in response.text


def test_full_host_sends_429_to_tmpnbs_clients_and_503_to_a_gateway(
    landing: FlaskClient, supervisor: FakeSupervisor
) -> None:
    supervisor.capacity = 0
    response = send(landing, "POST", "/api/spawn", PROGRAM)
    assert (response.status_code, response.json) == (429, {"status": "full"})
    assert response.headers["Retry-After"] == "5"
    response = send(landing, "POST", "/api/spawn", PROGRAM | {"X-Nbagent-Gateway": "1"})
    assert response.status_code == 503 and response.content_type == "application/problem+json"


@pytest.mark.parametrize("target", ["/api/spawn", "/api/spawn/"])
def test_api_spawn_returns_the_base_url(landing: FlaskClient, supervisor: FakeSupervisor, target: str) -> None:
    response = send(landing, "POST", target, PROGRAM, data=b"\xff whatever", content_type="text/plain")
    (slot,) = supervisor.slots.values()
    assert (response.status_code, response.json) == (200, {"url": f"/user/{slot.id}/?token={slot.token}"})


def test_url_is_absolute_behind_a_gateway(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    response = send(landing, "POST", "/api/spawn", PROGRAM | {"X-Nbagent-Gateway": "1", "X-Forwarded-Proto": "https"})
    (slot,) = supervisor.slots.values()
    assert response.json == {"url": f"https://nb.example.org/user/{slot.id}/?token={slot.token}"}


def test_subdomain_mode_redirects_to_the_origin_of_the_slot(supervisor: FakeSupervisor) -> None:
    router = {"url_mode": "subdomain", "domain": "nb.example.org", "public_url": "https://nb.example.org"}
    response = send(client_of(supervisor, router=router), "GET", "/spawn/tree")
    (slot,) = supervisor.slots.values()
    assert response.headers["Location"] == f"https://{slot.id}.nb.example.org/user/{slot.id}/tree?token={slot.token}"


@pytest.mark.parametrize("target", ["/api/stats", "/api/stats/"])
def test_stats_have_the_fields_of_tmpnb_and_are_public(landing: FlaskClient, target: str) -> None:
    response = send(landing, "GET", target, PROGRAM)
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    figures = response.json
    assert {name: type(figures[name]) for name in ("available", "capacity", "version", "container_image")} == {
        "available": int, "capacity": int, "version": str, "container_image": str}
    assert figures["in_use"] == 0 and figures["claim_ms"].keys() == {"p50", "p99"}
    assert "token" not in response.text and "memory_available_bytes" not in figures


def test_pages_do_not_wait_for_a_supervisor_that_hangs_one_after_the_other(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(tmp_path / "control.sock"))
        silent.listen()
        probe = ControlClient(tmp_path / "control.sock", 0.3)
        backend, began_s = HostBackend(host_config.parse({"host": {"label": LABEL}}), probe, probe), time.monotonic()

        def fetch(_: int) -> str:
            with pytest.raises(SupervisorUnavailable) as raised:
                backend.stats()
            return str(raised.value)

        with ThreadPoolExecutor(8) as pages:
            texts = set(pages.map(fetch, range(8)))
        assert time.monotonic() - began_s < 0.9 and len(texts) == 1 and "timed out" in texts.pop()


@pytest.mark.parametrize("target", ["/stats", "/stats/"])
def test_legacy_stats_redirect(landing: FlaskClient, target: str) -> None:
    response = send(landing, "GET", target)
    assert (response.status_code, response.headers["Location"]) == (301, "/api/stats")


@pytest.mark.parametrize("target", [
    "/user/c07-0123456789ab/lab/tree/a%20b.ipynb?token=old&x=1",
    "/spawn/user/c07-0123456789ab/lab/tree/a%20b.ipynb?x=1",
])
def test_page_of_an_ended_slot_has_a_button_for_the_same_path(landing: FlaskClient, target: str) -> None:
    response = send(landing, "GET", target)
    assert response.status_code == 404 and "no longer running" in response.text
    assert 'action="/spawn/lab/tree/a%20b.ipynb?x=1"' in response.text and "old" not in response.text


def test_program_gets_a_problem_for_an_ended_slot(landing: FlaskClient) -> None:
    for target in ("/user/c07-0123456789ab/api/kernels", "/user/c07-0123456789ab/api/kernels/1/channels"):
        response = send(landing, "GET", target, PROGRAM)
        assert (response.status_code, response.json["type"]) == (404, "urn:nbagent:problem:slot-not-found")


def test_head_and_prefetch_of_a_link_start_no_slot(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    assert send(landing, "HEAD", "/spawn").status_code == 405
    assert send(landing, "GET", "/spawn", PERSON | {"Sec-Purpose": "prefetch;prerender"}).status_code == 503
    assert send(landing, "GET", "/spawn", PERSON | {"Sec-Fetch-Mode": "no-cors"}).status_code == 403
    assert send(landing, "GET", "/robots.txt").text.endswith("Disallow: /\n")
    assert not supervisor.slots


def test_a_link_preview_gets_the_page_with_the_button(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    preview = PERSON | {"User-Agent": "Slackbot-LinkExpanding 1.0 (+https://api.slack.com/robots)"}
    response = send(landing, "GET", "/spawn/lab/tree/a.ipynb", preview)
    assert response.status_code == 200 and 'action="/spawn/lab/tree/a.ipynb"' in response.text
    assert not supervisor.slots


def test_only_pages_of_allowed_origins_start_slots(supervisor: FakeSupervisor) -> None:
    landing = client_of(supervisor, landing={"allowed_origins": ["https://allowed.example"]})
    for target in ("/api/spawn", "/spawn"):
        assert send(landing, "POST", target, PROGRAM | {"Origin": "https://evil.example"}).status_code == 403
    assert not supervisor.slots
    response = send(landing, "POST", "/api/spawn", PROGRAM | {"Origin": "https://allowed.example"})
    assert response.status_code == 200 and response.headers["Access-Control-Allow-Origin"] == "https://allowed.example"
    preflight = send(landing, "OPTIONS", "/api/spawn", PROGRAM | {"Origin": "https://allowed.example"})
    assert preflight.status_code == 204 and "POST" in preflight.headers["Access-Control-Allow-Methods"]
    assert send(landing, "POST", "/spawn", PERSON | {"Origin": "http://nb.example.org"}).status_code == 303


@pytest.mark.parametrize("target", ["/", "/api/spawn", "/spawn/lab", "/whatever"])
def test_preflight_of_every_path_gets_204(landing: FlaskClient, target: str) -> None:
    assert send(landing, "OPTIONS", target).status_code == 204


def test_token_access_serves_programs_only(supervisor: FakeSupervisor) -> None:
    landing = client_of(supervisor, landing={"access": "token"})
    for authorization in (None, "token wrong", "Basic eDp5", f"tokens {TOKEN}"):
        headers = PROGRAM | ({"Authorization": authorization} if authorization else {})
        assert send(landing, "POST", "/api/spawn", headers).status_code == 403
    for target in ("/", "/spawn", "/spawn/lab", "/lab", "/info"):
        assert send(landing, "GET", target).status_code == 404, target
    assert not supervisor.slots
    assert send(landing, "POST", "/api/spawn", PROGRAM | {"Authorization": f"token {TOKEN}"}).status_code == 200
    assert send(landing, "GET", "/api/stats").status_code == 200
    ended = send(landing, "GET", "/user/c07-0123456789ab/lab")
    assert ended.status_code == 404 and "<button" not in ended.text


def test_landing_page_that_is_off_serves_nothing(supervisor: FakeSupervisor) -> None:
    landing = client_of(supervisor, landing={"access": "off"})
    assert send(landing, "POST", "/api/spawn").status_code == 404
    for target in ("/", "/spawn", "/api/stats", "/info"):
        assert send(landing, "GET", target).status_code == 404
    assert not supervisor.asked


@pytest.mark.parametrize("target", [
    "/claim", "/slots", "/drain", "/metrics", "/images", "/healthz", "/openapi.json", "/api/pool",
])
def test_routes_of_the_control_api_are_absent(landing: FlaskClient, supervisor: FakeSupervisor, target: str) -> None:
    for method in ("GET", "POST", "DELETE", "PATCH"):
        assert send(landing, method, target, PROGRAM).status_code == 404
    assert not supervisor.asked


def test_pages_are_served_without_figures(supervisor: FakeSupervisor, caplog: pytest.LogCaptureFixture) -> None:
    landing = client_of(supervisor)
    supervisor.close()
    assert send(landing, "GET", "/").status_code == 200
    response = send(landing, "GET", "/spawn")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
    assert "did not start" in response.text


def test_page_of_a_failed_start_has_no_details(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    supervisor.raises = StartFailed("mount of /secret: EIO", step="mount")
    response = send(landing, "GET", "/spawn/lab")
    assert response.status_code == 503 and "secret" not in response.text


@pytest.mark.parametrize("target", ["/", "/info", "/user/c07-0123456789ab/lab", "/nothing"])
def test_pages_load_nothing_from_other_origins_and_run_only_their_own_script(landing: FlaskClient, target: str) -> None:
    response = send(landing, "GET", target)
    policy = response.headers["Content-Security-Policy"]
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)
    assert nonce and "default-src 'none'" in policy
    assert not re.search(r'(?:src|href|action)="(?:https?:)?//', response.text)
    assert re.findall(r"<script[^>]*>", response.text) in ([], [f'<script nonce="{nonce[1]}">'])
    assert response.headers["Cache-Control"] == "no-store" and response.headers["Referrer-Policy"] == "same-origin"


def test_path_of_a_link_is_escaped_on_the_page(landing: FlaskClient) -> None:
    text = send(landing, "GET", '/lab/tree/"><script>alert(1)</script>').text
    assert "<script>" not in text and "alert" in text


def test_malformed_key_is_an_invalid_field(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    response = send(landing, "POST", "/api/spawn", PROGRAM | {"Idempotency-Key": "a b"})
    assert (response.status_code, response.json["type"]) == (400, "urn:nbagent:problem:invalid-field")
    assert not supervisor.slots


def test_wrong_method_is_a_problem_with_allow(landing: FlaskClient) -> None:
    response = send(landing, "PUT", "/api/spawn", PROGRAM)
    assert (response.status_code, response.json["type"]) == (405, "urn:nbagent:problem:method-not-allowed")
    assert "POST" in response.headers["Allow"]


@pytest.mark.parametrize(("headers", "media_type"), [
    (PERSON, "text/html"), (PROGRAM | {"Accept": "application/json"}, "application/problem+json"),
])
def test_unexpected_exception_is_logged_and_shown_without_detail(
    landing: FlaskClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str],
    media_type: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(HostBackend, "claim", fail)
    response = send(landing, "GET", "/spawn", headers)
    assert (response.status_code, response.mimetype) == (500, media_type)
    assert "secret" not in response.text and "a secret detail" in caplog.text


def test_a_slot_of_another_label_has_the_same_links(supervisor: FakeSupervisor) -> None:
    landing = client_of(supervisor, host={"label": "c08"})
    response = send(landing, "GET", "/spawn/tree")
    assert response.headers["Location"].startswith(f"/user/{LABEL}-")
    ended = send(landing, "GET", f"/user/{LABEL}-0123456789ab/lab")
    assert ended.status_code == 404 and 'action="/spawn/lab"' in ended.text


@pytest.mark.parametrize(("share", "expected_ms"), [(0.05, 1.0), (0.5, 10.0), (0.75, 35.0), (0.99, 49.4)])
def test_quantile_is_interpolated_within_its_bucket(share: float, expected_ms: float) -> None:
    histogram = {"count": 10, "buckets": {"0.01": 5, "0.02": 5, "0.05": 10}}
    assert quantile_ms(histogram, share) == pytest.approx(expected_ms)


def test_quantile_of_an_empty_histogram_and_beyond_the_last_bound() -> None:
    assert quantile_ms({"count": 0, "buckets": {"0.01": 0}}, 0.5) is None
    assert quantile_ms({"count": 4, "buckets": {"0.01": 0, "30.0": 1}}, 0.99) == 30000


@pytest.mark.parametrize(("figures", "retry_after_s", "expected_s"), [
    ({}, None, 10), ({"next_end_s": 3.2}, None, 4), ({"next_end_s": 900}, None, 60), ({}, 4.2, 5), ({}, 0.1, 2),
])
def test_retry_delay(figures: dict[str, Any], retry_after_s: float | None, expected_s: int) -> None:
    assert retry_delay_s(figures, retry_after_s) == expected_s


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "a second"), (59, "59 seconds"), (60, "a minute"), (90, "90 seconds"), (3600, "an hour"),
    (5400, "90 minutes"), (43200, "12 hours"), (86400, "a day"), (100000, "28 hours"), (172800, "2 days"),
])
def test_duration_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


ASSETS = "/assets/sha256-" + "0" * 64


@pytest.fixture
def assets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the default image web files."""
    monkeypatch.setattr(Image, "assets_path", ASSETS)


@pytest.mark.usefixtures("assets")
@pytest.mark.parametrize(("router", "address", "connect"), [
    ({}, ASSETS, "'self'"),
    ({"assets_url": "https://cdn.example.net/n"}, f"https://cdn.example.net/n{ASSETS}", "'self' https://cdn.example.net"),
    ({"url_mode": "subdomain", "domain": "nb.test", "public_url": "https://nb.test"},
     f"https://assets.nb.test{ASSETS}", "'self' https://assets.nb.test"),
])
def test_pages_with_a_button_load_the_images_files_ahead(
    supervisor: FakeSupervisor, router: dict[str, Any], address: str, connect: str
) -> None:
    landing = client_of(supervisor, router=router)
    for target in ("/", "/lab/tree/a.ipynb", "/user/c07-0123456789ab/lab"):
        response = send(landing, "GET", target)
        assert f'const ASSETS = "{address}"' in response.text, target
        assert f"connect-src {connect};" in response.headers["Content-Security-Policy"]


@pytest.mark.usefixtures("assets")
def test_nothing_is_loaded_ahead_for_a_browser_that_saves_data_or_a_page_that_starts_at_once(
    supervisor: FakeSupervisor
) -> None:
    response = send(client_of(supervisor), "GET", "/", {**PERSON, "Save-Data": "on"})
    assert "ASSETS" not in response.text and "connect-src 'self';" in response.headers["Content-Security-Policy"]
    assert "ASSETS" not in send(client_of(supervisor, landing={"start": "at once"}), "GET", "/").text


def test_an_image_without_web_files_has_nothing_to_load_ahead(landing: FlaskClient) -> None:
    assert "ASSETS" not in send(landing, "GET", "/").text
    assert send(landing, "GET", "/api/stats").json["assets"] is None


# Lent slots


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[FakeSupervisor]:
    with FakeSupervisor(tmp_path / "control.sock", capacity=30) as running:
        yield running


SCRIPT = {"Accept": "application/json", "X-Real-IP": "192.0.2.7", "Host": "nb.example.org",
          "Origin": "https://nb.example.org"}


def test_a_visitor_keeps_the_slot_that_was_lent(roomy: FakeSupervisor) -> None:
    landing = client_of(roomy)
    lent = send(landing, "POST", "/api/lend", SCRIPT, data={"path": "lab/tree/x%20y.ipynb"})
    slot = lent.get_json()["slot"]
    assert lent.get_json()["url"] == f"/user/{slot}/lab/tree/x%20y.ipynb?token={lent.get_json()['token']}"
    assert lent.headers["Cache-Control"] == "no-store"
    token = {"token": lent.get_json()["token"]}
    assert send(landing, "POST", f"/user/{slot}/nbagent/keep", SCRIPT, data={"token": "x"}).status_code == 404
    assert send(landing, "POST", f"/user/{slot}/nbagent/keep", SCRIPT, data=token).status_code == 204
    assert send(landing, "POST", f"/user/{slot}/nbagent/return", SCRIPT, data=token).status_code == 204
    assert slot in roomy.slots


def test_a_visitor_who_leaves_gives_the_slot_back(roomy: FakeSupervisor) -> None:
    landing = client_of(roomy)
    lent = send(landing, "POST", "/api/lend", SCRIPT).get_json()
    target = f"/user/{lent['slot']}/nbagent/return"
    assert send(landing, "POST", target, SCRIPT, data={"token": lent["token"]}).status_code == 204
    assert lent["slot"] not in roomy.slots
    assert send(landing, "POST", target, SCRIPT, data={"token": lent["token"]}).status_code == 404


@pytest.mark.parametrize("headers", [{"Save-Data": "on"}, {"User-Agent": "Googlebot/2.1"}])
def test_robots_and_browsers_that_save_data_get_no_slot(roomy: FakeSupervisor, headers: dict[str, str]) -> None:
    assert send(client_of(roomy), "POST", "/api/lend", SCRIPT | headers).status_code == 204
    assert not roomy.slots


@pytest.mark.parametrize("tables", [
    {"landing": {"prerender": False}}, {"landing": {"access": "token"}},
    {"router": {"url_mode": "subdomain", "domain": "slots.nb.example.org"}},
    {"router": {"url_mode": "subdomain", "domain": "nb.example.org", "public_url": "https://nb.example.org"}},
])
def test_a_host_that_does_not_lend_says_so_to_its_page(roomy: FakeSupervisor, tables: dict[str, Any]) -> None:
    landing = client_of(roomy, **tables)
    assert send(landing, "POST", "/api/lend", SCRIPT).status_code == 204
    assert not roomy.slots and "speculationrules" not in send(landing, "GET", "/").text


def test_the_page_at_the_parent_domain_of_the_slots_is_lent_one_at_its_own_origin(roomy: FakeSupervisor) -> None:
    landing = client_of(roomy, router={"url_mode": "subdomain", "domain": "nb.example.org"})
    lent = send(landing, "POST", "/api/lend", SCRIPT)
    assert lent.json["url"].startswith(f"http://{lent.json['slot']}.nb.example.org:8000/user/{lent.json['slot']}/")


def test_a_page_of_another_site_gets_no_lent_slot(roomy: FakeSupervisor) -> None:
    response = send(client_of(roomy), "POST", "/api/lend", SCRIPT | {"Origin": "https://evil.example"})
    assert response.status_code == 403 and not roomy.slots


def test_a_script_that_asks_a_thousand_times_gets_few_slots(roomy: FakeSupervisor) -> None:
    landing = client_of(roomy)
    statuses = [send(landing, "POST", "/api/lend", SCRIPT).status_code for _ in range(50)]
    assert 1 <= statuses.count(200) <= lending.CLIENT_MAX and statuses.count(204) == 50 - statuses.count(200)


def test_only_the_front_page_and_an_ended_slots_page_prerender(roomy: FakeSupervisor) -> None:
    landing = client_of(roomy)
    assert "speculationrules" in send(landing, "GET", "/lab/tree/x.ipynb").text
    assert "speculationrules" in send(landing, "GET", "/user/c07-a5xtk71naa24/lab").text
    assert "speculationrules" not in send(landing, "GET", "/", PERSON | {"Save-Data": "on"}).text
    roomy.capacity = 0
    assert "speculationrules" not in send(landing, "GET", "/spawn").text
