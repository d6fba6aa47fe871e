# SPDX-License-Identifier: BSD-3-Clause
"""The parts that every HTTP service shares: problem documents, CORS, idempotency keys."""

from __future__ import annotations

import pytest
from flask import Flask, Response
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Request

from nbagent.core.errors import Full, InvalidField, Unauthenticated
from nbagent.web import keys, problems
from nbagent.web.cors import AllowedOrigins
from nbagent.web.responses import json_response

ORIGIN = "https://example.org"


def request(**headers: str) -> Request:
    return EnvironBuilder(headers=headers).get_request()


def test_json_is_one_line_even_for_values_that_json_has_no_type_for() -> None:
    assert json_response({"path": ORIGIN, "set": frozenset()}).get_data() == (
        b'{"path":"https://example.org","set":"frozenset()"}\n')


def test_details_do_not_replace_the_standard_members_of_a_problem() -> None:
    response = problems.problem("full", "Host is full", 503, "detail", {"status": 200, "reasons": ["memory"]})
    assert response.status_code == 503
    with Flask(__name__).app_context():
        assert response.json == {"type": "urn:nbagent:problem:full", "title": "Host is full", "status": 503,
                                 "detail": "detail", "reasons": ["memory"]}


def test_problems_have_the_headers_of_their_error() -> None:
    assert problems.from_error(Full(retry_after_s=4.2)).headers["Retry-After"] == "5"
    assert problems.from_error(Full(retry_after_s=0)).headers["Retry-After"] == "1"
    assert problems.from_error(Unauthenticated()).headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize(("allowed", "origin", "may"), [
    ([ORIGIN], ORIGIN, True), ([ORIGIN.upper()], ORIGIN, True), ([ORIGIN], ORIGIN.upper(), True),
    ([ORIGIN], "https://example.org.evil.example", False), ([ORIGIN], "null", False), ([ORIGIN], None, False),
    (["*"], "https://any.example", True), (["*"], None, True), ([], ORIGIN, False),
])
def test_allowed_origins(allowed: list[str], origin: str | None, may: bool) -> None:
    assert AllowedOrigins(allowed).allow(origin) is may


def test_cors_headers_of_a_response() -> None:
    origins = AllowedOrigins([ORIGIN])
    allowed, other, none = Response(), Response(), Response()
    origins.add_headers(request(Origin=ORIGIN), allowed)
    origins.add_headers(request(Origin="https://evil.example"), other)
    AllowedOrigins([]).add_headers(request(Origin=ORIGIN), none)
    assert (allowed.headers["Access-Control-Allow-Origin"], allowed.headers["Vary"]) == (ORIGIN, "Origin")
    assert "Access-Control-Allow-Origin" not in other.headers and other.headers["Vary"] == "Origin"
    assert "Vary" not in none.headers


@pytest.mark.parametrize("key", [None, "a", "x" * 255, "!~"])
def test_well_formed_keys(key: str | None) -> None:
    assert keys.check_key(key) == key


@pytest.mark.parametrize("key", ["", " ", "a b", "ä", "a\n", "x" * 256])
def test_malformed_keys(key: str) -> None:
    with pytest.raises(InvalidField, match="Idempotency-Key: expected 1 to 255 visible ASCII characters"):
        keys.check_key(key)
