"""The landing page without a router: what it says to people, to tmpnb's clients, and to those it does not serve."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import LABEL, FakeSupervisor
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from nbagent.api.backend import HostBackend
from nbagent.config import host_config
from nbagent.core.errors import StartFailed
from nbagent.landing.app import create_app, duration
from nbagent.landing.backend import again_s, quantile_ms
from nbagent.wire.control import ControlClient

PERSON = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8", "X-Real-IP": "192.0.2.7", "Host": "nb.example.org"}
PROGRAM = {"Accept": "*/*", "X-Real-IP": "192.0.2.8", "Host": "nb.example.org"}
TOKEN = "the-token-of-this-landing"


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[FakeSupervisor]:
    with FakeSupervisor(tmp_path / "control.sock", capacity=3) as running:
        yield running


def at(supervisor: FakeSupervisor, **tables: Any) -> FlaskClient:
    """A landing with settings."""
    settings = host_config.parse({"host": {"label": LABEL}, **tables})
    client = ControlClient(supervisor.path, 5)
    backend = HostBackend(settings, client, client)
    return create_app(settings.landing, backend, lambda given: given == TOKEN).test_client()


@pytest.fixture
def landing(supervisor: FakeSupervisor) -> FlaskClient:
    return at(supervisor)


def ask(
    landing: FlaskClient, method: str, target: str, headers: dict[str, str] | None = None, **given: Any
) -> TestResponse:
    """A request whose target arrives as it was sent, as gunicorn hands it on."""
    environ = {"RAW_URI": target}
    return landing.open(target, method=method, headers=headers or PERSON, environ_overrides=environ, **given)


def claims(supervisor: FakeSupervisor) -> list[dict[str, Any]]:
    return [asked["args"] for asked in supervisor.asked if asked["op"] == "claim"]


@pytest.mark.parametrize(("target", "leads"), [
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
def test_a_deep_link_keeps_its_path_and_query_as_they_were_written(
    landing: FlaskClient, supervisor: FakeSupervisor, target: str, leads: str
) -> None:
    answer = landing.get(
        "/spawn/x" if "spawn/" in target else "/spawn", headers=PERSON, environ_overrides={"RAW_URI": target})
    assert answer.status_code == 302
    (slot,) = supervisor.slots.values()
    mark = "&" if "?" in leads else "?"
    assert answer.headers["Location"] == f"/user/{slot.id}/{leads}{mark}token={slot.token}"


def test_a_link_that_leads_out_of_a_slot_starts_none(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    for target in ("/spawn/../slots", "/spawn/%2e%2e/slots", "/spawn/lab/..%2f..%2fx"):
        answer = landing.get("/spawn/x", headers=PERSON, environ_overrides={"RAW_URI": target})
        assert answer.status_code == 400, target
        assert "does not start a notebook" in answer.text
    assert not supervisor.slots


def test_the_button_may_be_pressed_twice(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    page = ask(landing, "GET", "/lab/tree/x%20y.ipynb?a=b").text
    form = re.search(r'<form method="post" action="([^"]+)">\s*<input type="hidden" name="key" value="([^"]+)">', page)
    assert form and html.unescape(form[1]) == "/spawn/lab/tree/x%20y.ipynb?a=b"
    answers = [ask(landing, "POST", html.unescape(form[1]), data={"key": form[2]}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [303, 303]
    assert answers[0].headers["Location"] == answers[1].headers["Location"]
    assert len(supervisor.slots) == 1


def test_a_key_is_worth_nothing_to_another_address(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    for address in ("192.0.2.7", "192.0.2.8", "192.0.2.7"):
        ask(landing, "POST", "/api/spawn", PROGRAM | {"X-Real-IP": address, "Idempotency-Key": "guessed"})
    assert len(supervisor.slots) == 2
    # And to the control API's callers there is no such key.
    assert all(" " in claim["key"] for claim in claims(supervisor))


def test_who_asked_is_told_to_the_supervisor(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    ask(landing, "GET", "/spawn")
    ask(landing, "POST", "/api/spawn", PROGRAM)
    assert [claim["client"] for claim in claims(supervisor)] == ["192.0.2.7", "192.0.2.8"]


def test_every_page_that_starts_something_has_a_key_of_its_own(landing: FlaskClient) -> None:
    keys = {re.findall(r'name="key" value="([^"]+)"', ask(landing, "GET", "/").text)[0] for _ in range(5)}
    assert len(keys) == 5 and min(map(len, keys)) >= 22


def test_the_door_may_go_on_at_once(supervisor: FakeSupervisor) -> None:
    landing = at(supervisor, landing={"start": "at once"})
    page = ask(landing, "GET", "/tree/x%20y?a=1&b=2").text
    refresh = re.search(r'<meta http-equiv="refresh" content="1; url=([^"]+)">', page)
    assert refresh and html.unescape(refresh[1]) == "/spawn/tree/x%20y?a=1&b=2"
    assert not supervisor.slots


def test_the_front_page_says_how_long_a_notebook_lives(supervisor: FakeSupervisor) -> None:
    texts = {"title": "Maths <2>", "text": "For you"}
    landing = at(supervisor, cull={"idle": "90min"}, slots={"ttl": "3h"}, landing=texts)
    text = ask(landing, "GET", "/").text
    assert "at most 3 hours" in text and "90 minutes" in " ".join(text.split())
    assert "Maths &lt;2&gt;" in text and "For you" in text


def test_a_full_house_is_a_page_that_asks_again(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    supervisor.capacity = 0
    answer = ask(landing, "GET", "/spawn/lab/tree/a.ipynb?x=1&y=2")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert 'content="5; url=/spawn/lab/tree/a.ipynb?x=1&amp;y=2"' in answer.text
    assert "in use" in answer.text


def test_a_house_that_drains_is_not_called_full(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    ask(landing, "GET", "/spawn")
    supervisor.draining = True
    answer = at(supervisor).get("/spawn", headers=PERSON, environ_overrides={"RAW_URI": "/spawn"})
    assert answer.status_code == 503 and "No notebooks are started here" in answer.text
    assert "in use" not in answer.text


def test_a_full_house_is_429_to_tmpnbs_clients_and_503_to_a_gateway(
    landing: FlaskClient, supervisor: FakeSupervisor
) -> None:
    supervisor.capacity = 0
    answer = ask(landing, "POST", "/api/spawn", PROGRAM)
    assert (answer.status_code, answer.json) == (429, {"status": "full"})
    assert answer.headers["Retry-After"] == "5"
    answer = ask(landing, "POST", "/api/spawn", PROGRAM | {"X-Nbagent-Gateway": "1"})
    assert answer.status_code == 503 and answer.content_type == "application/problem+json"


@pytest.mark.parametrize("target", ["/api/spawn", "/api/spawn/"])
def test_tmpnbs_api_gives_the_base_url_of_a_slot(landing: FlaskClient, supervisor: FakeSupervisor, target: str) -> None:
    answer = ask(landing, "POST", target, PROGRAM, data=b"\xff whatever", content_type="text/plain")
    (slot,) = supervisor.slots.values()
    assert (answer.status_code, answer.json) == (200, {"url": f"/user/{slot.id}/?token={slot.token}"})


def test_behind_a_gateway_the_url_is_absolute(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    answer = ask(landing, "POST", "/api/spawn", PROGRAM | {"X-Nbagent-Gateway": "1", "X-Forwarded-Proto": "https"})
    (slot,) = supervisor.slots.values()
    assert answer.json == {"url": f"https://nb.example.org/user/{slot.id}/?token={slot.token}"}


def test_a_slot_with_an_origin_of_its_own_is_linked_to_there(supervisor: FakeSupervisor) -> None:
    router = {"url_mode": "subdomain", "domain": "nb.example.org", "public_url": "https://nb.example.org"}
    answer = ask(at(supervisor, router=router), "GET", "/spawn/tree")
    (slot,) = supervisor.slots.values()
    assert answer.headers["Location"] == f"https://{slot.id}.nb.example.org/user/{slot.id}/tree?token={slot.token}"


@pytest.mark.parametrize("target", ["/api/stats", "/api/stats/"])
def test_the_figures_are_tmpnbs_and_everybodys(landing: FlaskClient, target: str) -> None:
    answer = ask(landing, "GET", target, PROGRAM)
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    figures = answer.json
    assert {name: type(figures[name]) for name in ("available", "capacity", "version", "container_image")} == {
        "available": int, "capacity": int, "version": str, "container_image": str}
    assert figures["in_use"] == 0 and figures["claim_ms"].keys() == {"p50", "p99"}
    assert "token" not in answer.text and "memory_available_bytes" not in figures


@pytest.mark.parametrize("target", ["/stats", "/stats/"])
def test_the_old_address_of_the_figures_leads_to_the_new_one(landing: FlaskClient, target: str) -> None:
    answer = ask(landing, "GET", target)
    assert (answer.status_code, answer.headers["Location"]) == (301, "/api/stats")


@pytest.mark.parametrize("target", [
    "/user/c07-0123456789ab/lab/tree/a%20b.ipynb?token=old&x=1",
    "/spawn/user/c07-0123456789ab/lab/tree/a%20b.ipynb?x=1",
])
def test_a_notebook_that_is_gone_has_a_button_for_the_same_path(landing: FlaskClient, target: str) -> None:
    answer = ask(landing, "GET", target)
    assert answer.status_code == 404 and "no longer running" in answer.text
    assert 'action="/spawn/lab/tree/a%20b.ipynb?x=1"' in answer.text and "old" not in answer.text


def test_a_program_learns_of_a_gone_slot_by_a_problem(landing: FlaskClient) -> None:
    for target in ("/user/c07-0123456789ab/api/kernels", "/user/c07-0123456789ab/api/kernels/1/channels"):
        answer = ask(landing, "GET", target, PROGRAM)
        assert (answer.status_code, answer.json["type"]) == (404, "urn:nbagent:problem:slot-not-found")


def test_looking_at_a_link_takes_no_slot(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    assert ask(landing, "HEAD", "/spawn").status_code == 405
    assert ask(landing, "GET", "/spawn", PERSON | {"Sec-Purpose": "prefetch;prerender"}).status_code == 503
    assert ask(landing, "GET", "/spawn", PERSON | {"Sec-Fetch-Mode": "no-cors"}).status_code == 403
    assert ask(landing, "GET", "/robots.txt").text.endswith("Disallow: /\n")
    assert not supervisor.slots


def test_a_foreign_page_starts_nothing_unless_it_is_a_friends(supervisor: FakeSupervisor) -> None:
    landing = at(supervisor, landing={"allowed_origins": ["https://friend.example"]})
    for target in ("/api/spawn", "/spawn"):
        assert ask(landing, "POST", target, PROGRAM | {"Origin": "https://evil.example"}).status_code == 403
    assert not supervisor.slots
    answer = ask(landing, "POST", "/api/spawn", PROGRAM | {"Origin": "https://friend.example"})
    assert answer.status_code == 200 and answer.headers["Access-Control-Allow-Origin"] == "https://friend.example"
    preflight = ask(landing, "OPTIONS", "/api/spawn", PROGRAM | {"Origin": "https://friend.example"})
    assert preflight.status_code == 204 and "POST" in preflight.headers["Access-Control-Allow-Methods"]
    assert ask(landing, "POST", "/spawn", PERSON | {"Origin": "http://nb.example.org"}).status_code == 303


@pytest.mark.parametrize("target", ["/", "/api/spawn", "/spawn/lab", "/whatever"])
def test_options_are_answered_everywhere(landing: FlaskClient, target: str) -> None:
    assert ask(landing, "OPTIONS", target).status_code == 204


def test_with_a_token_the_door_is_for_programs_only(supervisor: FakeSupervisor) -> None:
    landing = at(supervisor, landing={"access": "token"})
    for given in (None, "token wrong", "Basic eDp5", f"tokens {TOKEN}"):
        headers = PROGRAM | ({"Authorization": given} if given else {})
        assert ask(landing, "POST", "/api/spawn", headers).status_code == 403
    for target in ("/", "/spawn", "/spawn/lab", "/lab", "/info"):
        assert ask(landing, "GET", target).status_code == 404, target
    assert not supervisor.slots
    assert ask(landing, "POST", "/api/spawn", PROGRAM | {"Authorization": f"token {TOKEN}"}).status_code == 200
    assert ask(landing, "GET", "/api/stats").status_code == 200
    gone = ask(landing, "GET", "/user/c07-0123456789ab/lab")
    assert gone.status_code == 404 and "<button" not in gone.text


def test_a_door_that_is_off_serves_nothing(supervisor: FakeSupervisor) -> None:
    landing = at(supervisor, landing={"access": "off"})
    assert ask(landing, "POST", "/api/spawn").status_code == 404
    for target in ("/", "/spawn", "/api/stats", "/info"):
        assert ask(landing, "GET", target).status_code == 404
    assert not supervisor.asked


@pytest.mark.parametrize("target", [
    "/claim", "/slots", "/drain", "/metrics", "/images", "/healthz", "/openapi.json", "/api/pool",
])
def test_nothing_of_the_control_api_is_here(landing: FlaskClient, supervisor: FakeSupervisor, target: str) -> None:
    for method in ("GET", "POST", "DELETE", "PATCH"):
        assert ask(landing, method, target, PROGRAM).status_code == 404
    assert not supervisor.asked


def test_no_figures_are_no_reason_for_no_page(supervisor: FakeSupervisor, caplog: pytest.LogCaptureFixture) -> None:
    landing = at(supervisor)
    supervisor.close()
    assert ask(landing, "GET", "/").status_code == 200
    answer = ask(landing, "GET", "/spawn")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert "did not start" in answer.text


def test_a_failed_start_is_told_without_its_reasons(landing: FlaskClient, supervisor: FakeSupervisor) -> None:
    supervisor.raises = StartFailed("mount of /secret: EIO", step="mount")
    answer = ask(landing, "GET", "/spawn/lab")
    assert answer.status_code == 503 and "secret" not in answer.text


@pytest.mark.parametrize("target", ["/", "/info", "/user/c07-0123456789ab/lab", "/nothing"])
def test_a_page_loads_nothing_from_elsewhere_and_runs_no_script_but_its_own(landing: FlaskClient, target: str) -> None:
    answer = ask(landing, "GET", target)
    policy = answer.headers["Content-Security-Policy"]
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)
    assert nonce and "default-src 'none'" in policy
    assert not re.search(r'(?:src|href|action)="(?:https?:)?//', answer.text)
    assert re.findall(r"<script[^>]*>", answer.text) in ([], [f'<script nonce="{nonce[1]}">'])
    assert answer.headers["Cache-Control"] == "no-store" and answer.headers["Referrer-Policy"] == "same-origin"


def test_what_is_asked_for_is_text_on_a_page(landing: FlaskClient) -> None:
    text = ask(landing, "GET", '/lab/tree/"><script>alert(1)</script>').text
    assert "<script>" not in text and "alert" in text


@pytest.mark.parametrize(("share", "wanted"), [(0.05, 1.0), (0.5, 10.0), (0.75, 35.0), (0.99, 49.4)])
def test_a_quantile_lies_within_its_bucket(share: float, wanted: float) -> None:
    histogram = {"count": 10, "buckets": {"0.01": 5, "0.02": 5, "0.05": 10}}
    assert quantile_ms(histogram, share) == pytest.approx(wanted)


def test_of_nothing_there_is_no_quantile_and_beyond_the_last_bound_it_is_the_bound() -> None:
    assert quantile_ms({"count": 0, "buckets": {"0.01": 0}}, 0.5) is None
    assert quantile_ms({"count": 4, "buckets": {"0.01": 0, "30.0": 1}}, 0.99) == 30000


@pytest.mark.parametrize(("figures", "said", "wanted"), [
    ({}, None, 10), ({"next_end_s": 3.2}, None, 4), ({"next_end_s": 900}, None, 60), ({}, 4.2, 5), ({}, 0.1, 2),
])
def test_when_to_ask_again(figures: dict[str, Any], said: float | None, wanted: int) -> None:
    assert again_s(figures, said) == wanted


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "a second"), (59, "59 seconds"), (60, "a minute"), (90, "90 seconds"), (3600, "an hour"),
    (5400, "90 minutes"), (43200, "12 hours"), (86400, "a day"), (100000, "28 hours"), (172800, "2 days"),
])
def test_times_are_told_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
