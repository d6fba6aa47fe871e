# SPDX-License-Identifier: BSD-3-Clause
"""The landing page as a Flask application: pages for people, and tmpnb's public API for its clients.

    GET  /, /lab/…, /tree/…, /notebooks/…, /files/…    the front page: one button, or a redirect to /spawn
    GET  /spawn, /spawn/PATH?QUERY                     claims a slot and redirects to PATH?QUERY in it; for crawlers and
                                                       link previews, the front page
    POST /spawn, /spawn/PATH?QUERY                     the same for the button, which may be pressed twice
    GET  /spawn/user/SLOT/PATH, /user/SLOT/PATH        "no longer running", with a button for PATH in a new slot
    POST /api/spawn                                    {"url": …}, or 429 {"status": "full"}
    POST /api/lend                                     for the front page's script: {"url": …, "slot": …, "token": …} of
                                                       a slot in which the browser prerenders the notebook, or 204
    POST /user/SLOT/nbagent/keep, …/return             the script claims a lent slot, or gives it back
    GET  /api/stats, /info                             the figures as JSON, and as a page that refreshes itself

Requests arrive through a proxy, which puts the address of the visitor into X-Real-IP. No address is
trusted: a request needs no permission, or the landing page's own token.

A path below /spawn is kept as the browser sent it, with its percent-encoding, because the image may encode
file names differently from this program.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote, unquote

from flask import Flask, Request, Response, redirect, render_template, request
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, PathConverter
from werkzeug.wrappers import Response as AnyResponse

from nbagent.config.host_config import LandingSettings
from nbagent.core.documents import Claim
from nbagent.core.errors import BadRequest, Forbidden, Full, NbagentError, SlotNotFound
from nbagent.core.model import claim_link
from nbagent.core.robots import is_robot
from nbagent.landing.backend import SlotBackend, retry_delay_s
from nbagent.web import keys, problems
from nbagent.web.cors import AllowedOrigins, add_preflight_headers
from nbagent.web.responses import forbid_caching_and_sniffing, json_response
from nbagent.web.tokens import bearer_token
from nbagent.web.trace import trace_of

# A request header of the fleet's gateway. The gateway tries the next host when the status is 503, and its visitors
# need absolute URLs because it has another origin than this host.
GATEWAY_HEADER = "X-Nbagent-Gateway"
# The first segments of tmpnb's links, and JupyterLab's.
LINK_PREFIXES = ("lab", "tree", "notebooks", "files")
# The pages load nothing from other origins, except the image's web files into the cache, and other origins may not
# frame them.
POLICY = (
    "default-src 'none'; base-uri 'none'; connect-src {connect}; frame-ancestors 'self'; script-src 'nonce-{nonce}'; "
    "style-src 'unsafe-inline'"
)
# The address of an image's web files, in the figures of a host.
_ASSETS = re.compile(r"(https?://[A-Za-z0-9.:\[\]-]+)?(?:/[A-Za-z0-9._~-]+)+")
# The characters of a request target in RFC 3986, and the percent sign. Browsers leave some others unencoded.
_TARGET_CHARACTERS = "/%!$&'()*+,;=:@?._~-"
_SLOT_PREFIX = re.compile(r"/+(?:spawn/+)?user/+[^/?]*/*")
NO_FIGURES: Mapping[str, object] = {}
_LOG = logging.getLogger(__name__)


class _Rest(PathConverter):
    """The rest of a path, which may begin with a slash, as in links to /spawn//lab."""

    regex = ".*?"


def create_app(settings: LandingSettings, backend: SlotBackend, token_matches: Callable[[str], bool]) -> Flask:
    """The landing page of `backend`; `token_matches` checks the token for `access = "token"`."""
    app = Flask(__name__, static_folder=None, template_folder=str(Path(__file__).parent / "pages"))
    # Not by its attribute merge_slashes, which Werkzeug 2.2 does not read after the map is made.
    app.url_map = Map(merge_slashes=False, strict_slashes=False, converters={"rest": _Rest})
    app.jinja_env.filters.update(duration=duration, decoded=unquote)
    views = _Views(settings, backend, token_matches)
    app.register_error_handler(NbagentError, views.handle_error)
    app.register_error_handler(HTTPException, views.handle_http_exception)
    app.register_error_handler(Exception, views.handle_unexpected)

    def serve(rule: str, view: Callable[..., AnyResponse], *methods: str, below: bool = False) -> None:
        # Views ignore Flask's path, which is decoded, and read the request target.
        for number, path in enumerate((rule, f"{rule}/", f"{rule}/<rest:_>") if below else (rule, f"{rule}/")):
            app.add_url_rule(
                path, f"{view.__name__}:{rule}:{number}", lambda _="": view(),
                methods=methods, provide_automatic_options=False,
            )

    app.after_request(views.add_headers)
    if settings.access == "off":
        return app

    @app.before_request
    def preflight() -> AnyResponse | None:
        return Response(status=204) if request.method == "OPTIONS" else None

    serve("/api/spawn", views.spawn_by_api, "POST")
    serve("/api/lend", views.lend, "POST")
    for name, view in (("keep", views.keep), ("return", views.give_back)):
        app.add_url_rule(f"/user/<slot>/nbagent/{name}", name, view, methods=["POST"], provide_automatic_options=False)
    serve("/api/stats", views.stats, "GET")
    serve("/stats", views.legacy_stats, "GET")
    serve("/user", views.ended_slot_page, "GET", below=True)
    serve("/spawn/user", views.ended_slot_page, "GET", below=True)
    if settings.access == "public":
        app.add_url_rule("/", "home", views.front_page, methods=["GET"], provide_automatic_options=False)
        for prefix in LINK_PREFIXES:
            serve(f"/{prefix}", views.front_page, "GET", below=True)
        serve("/spawn", views.spawn_by_link, "GET", below=True)
        serve("/spawn", views.spawn_by_button, "POST", below=True)
        serve("/info", views.status_page, "GET")
        app.add_url_rule("/robots.txt", "robots", views.robots_txt, methods=["GET"], provide_automatic_options=False)
    for rule in app.url_map.iter_rules():
        # Werkzeug serves HEAD by the view of GET, and a program that checks links by HEAD must not claim a slot.
        if rule.rule.startswith("/spawn") and rule.methods:
            rule.methods.discard("HEAD")
    return app


class _Views:
    """The views, the error handlers, and what they share."""

    def __init__(self, settings: LandingSettings, backend: SlotBackend, token_matches: Callable[[str], bool]) -> None:
        self.settings, self.backend, self.token_matches = settings, backend, token_matches
        self.allowed_origins = AllowedOrigins(settings.allowed_origins)

    # Pages

    def front_page(self) -> AnyResponse:
        """A page with a button that starts a notebook at the path of the request."""
        # A crawler may run the script that presses the button.
        at_once = self.settings.start == "at once" and not _from_robot(request)
        return self._page(
            "home.html", 200, self._figures(), ahead=not at_once, slot_path=_slot_path(request), at_once=at_once
        )

    def ended_slot_page(self) -> AnyResponse:
        """A page for the address of a slot that has ended. Raises SlotNotFound for programs."""
        slot_path = _SLOT_PREFIX.sub("", _request_target(request), count=1)
        if _wants_json(request):
            raise SlotNotFound("no slot of this id runs here; it has ended or never existed")
        is_public = self.settings.access == "public"
        # The token of the ended slot is of no use for a new one.
        return self._page(
            "ended.html", 404, self._figures() if is_public else {}, ahead=is_public,
            slot_path=_without_token(slot_path),
        )

    def status_page(self) -> AnyResponse:
        """A page that draws the figures and refreshes them."""
        return self._page("info.html", 200)

    def robots_txt(self) -> AnyResponse:
        """Keeps crawlers from following links that start notebooks."""
        return Response("User-agent: *\nAllow: /$\nDisallow: /\n", content_type="text/plain; charset=utf-8")

    # Claims

    def spawn_by_link(self) -> AnyResponse:
        """Claims a slot for a visitor who follows a link; the front page for a program that follows every link."""
        if _from_robot(request):
            return self.front_page()
        purpose = request.headers.get("Sec-Purpose", request.headers.get("Purpose", ""))
        if "prefetch" in purpose or "prerender" in purpose:
            # 503, because a browser then sends the request again when the visitor follows the link.
            return Response(status=503)
        if request.headers.get("Sec-Fetch-Mode", "navigate") != "navigate":
            raise Forbidden("a notebook starts when a visitor follows its link, not as a part of another page")
        return self._spawn(302, keys.check_key(request.headers.get(keys.HEADER)))

    def spawn_by_button(self) -> AnyResponse:
        """Claims a slot for a visitor who presses the button; a second press gets the same slot."""
        self._check_origin()
        key = request.headers.get(keys.HEADER)
        return self._spawn(303, keys.check_key(key if key is not None else request.form.get("key")))

    def spawn_by_api(self) -> AnyResponse:
        """Claims a slot for a client of tmpnb's API."""
        if self.settings.access == "token" and not self._has_token():
            # 403 also without any token, because tmpnb never sends 401.
            raise Forbidden("send the landing page's token as 'Authorization: token TOKEN'")
        self._check_origin()
        try:
            key = keys.check_key(request.headers.get(keys.HEADER))
            claim = self.backend.claim({}, key, _client_address(request), trace_of(request.headers))
        except Full as error:
            if GATEWAY_HEADER in request.headers:
                raise
            response = json_response({"status": "full"}, 429)
            response.headers["Retry-After"] = str(retry_delay_s({}, error.details.get("retry_after_s")))
            return response
        # The base path and not the image's start page, because tmpnb's clients append paths of Jupyter's API.
        base = f"/user/{claim['slot']}/"
        return json_response({"url": self._slot_url(claim, claim_link({**claim, "path": base}))})

    # Lent slots

    def _lends(self) -> bool:
        scheme = request.headers.get("X-Forwarded-Proto", "http")
        return (
            self.settings.prerender and self.settings.access == "public"
            and self.backend.can_prerender(request.headers.get("Host", ""), scheme)
        )

    def lend(self) -> AnyResponse:
        """Lends a slot to a visitor's browser; 204 if none is lent now, and to a browser that saves data."""
        self._check_origin()
        claim = None
        if self._lends() and not _from_robot(request) and not _saves_data(request):
            path = request.form.get("path", "")
            claim = self.backend.lend({"path": path} if path else {}, _client_address(request))
        if claim is None:
            return Response(status=204)
        url = self._slot_url(claim, claim_link(claim))
        return json_response({"url": url, "slot": claim["slot"], "token": claim["token"]})

    def keep(self, slot: str) -> AnyResponse:
        """Claims a lent slot for the visitor who has pressed the button; 404 if it has ended."""
        self.backend.keep(slot, request.form.get("token", ""), _client_address(request))
        return Response(status=204)

    def give_back(self, slot: str) -> AnyResponse:
        """Ends a lent slot, because the visitor has left the page."""
        self.backend.give_back(slot, request.form.get("token", ""), _client_address(request))
        return Response(status=204)

    def _spawn(self, status: int, key: str | None) -> AnyResponse:
        slot_path = _slot_path(request)
        options = {"path": slot_path} if slot_path else {}
        claim = self.backend.claim(options, key, _client_address(request), trace_of(request.headers))
        return redirect(self._slot_url(claim, claim_link(claim)), status)

    def _slot_url(self, claim: Claim, path: str) -> str:
        """The URL of a path in a slot, relative when the slot has the origin of this page."""
        if GATEWAY_HEADER not in request.headers and not self.backend.has_origins():
            return path
        scheme = request.headers.get("X-Forwarded-Proto", "http")
        origin = self.backend.origin(claim["slot"], request.headers.get("Host", ""), scheme)
        return origin + path

    def _has_token(self) -> bool:
        token = bearer_token(request.headers.get("Authorization", ""))
        return token is not None and self.token_matches(token)

    def _check_origin(self) -> None:
        """Raises Forbidden for a request of a web page whose origin is neither this one nor an allowed one."""
        origin = request.headers.get("Origin")
        if origin is None or self.allowed_origins.allow(origin):
            return
        if origin.partition("://")[2].lower() != request.headers.get("Host", "").lower():
            raise Forbidden("the Origin of this web page is not in landing.allowed_origins", origin=origin[:200])

    # Figures

    def stats(self) -> AnyResponse:
        """The figures. Pages of every origin may read them, because they are public."""
        response = json_response(self.backend.stats())
        response.headers["Access-Control-Allow-Origin"] = "*"
        return response

    def legacy_stats(self) -> AnyResponse:
        """tmpnb's first path of the figures: a redirect on one host, the figures themselves in front of a fleet."""
        return self.stats() if "hosts" in self.backend.stats() else redirect("/api/stats", 301)

    def _figures(self) -> Mapping[str, object]:
        """The figures for a page, empty when they are unavailable, because the page is useful without them."""
        try:
            return self.backend.stats()
        except NbagentError as error:
            _LOG.warning("page sent without figures: %s", error)
            return {}

    # Errors

    def handle_error(self, error: NbagentError) -> AnyResponse:
        """A page when a visitor gets no slot, else a problem document.

        The document has none of the error's details, because they name parts of the host.
        """
        retry_after_s = error.details.get("retry_after_s")
        if _wants_json(request) or not request.path.startswith(("/spawn", "/user")):
            response = problems.problem(error.code, error.title, error.http_status, str(error))
        elif isinstance(error, Full):
            figures = self._figures()
            response = self._page("full.html", error.http_status, figures, ahead=True, slot_path=_slot_path(request),
                                  retry_s=retry_delay_s(figures, retry_after_s))
        else:
            kind = "refused" if isinstance(error, (BadRequest, Forbidden)) else "failed"
            response = self._page("failed.html", error.http_status, slot_path=_slot_path(request), kind=kind,
                                  reason=str(error))
        if error.http_status == 503:
            response.headers["Retry-After"] = str(retry_delay_s({}, retry_after_s))
        return response

    def handle_http_exception(self, error: HTTPException) -> AnyResponse:
        """A problem document or a page for an unknown path, a wrong method, or a malformed request."""
        if _wants_json(request):
            return problems.from_http_exception(error)
        status = error.code or 500
        if status == 404:
            return self._page("not_found.html", 404)
        return Response(f"{error.name}\n", status, content_type="text/plain; charset=utf-8", headers=[
            header for header in error.get_headers() if header[0] == "Allow"])

    def handle_unexpected(self, error: Exception) -> AnyResponse:
        """A problem document or a page for an exception that no other handler expects."""
        if _wants_json(request):
            return problems.from_unexpected(error)
        problems.log_unexpected(error)
        return self._page("failed.html", 500, slot_path=_slot_path(request), kind="failed", reason="")

    # Responses

    def add_headers(self, response: Response) -> Response:
        """Adds the headers that every response has."""
        forbid_caching_and_sniffing(response)
        # Not no-referrer, because browsers then send "Origin: null" with the form of the button.
        response.headers["Referrer-Policy"] = "same-origin"
        self.allowed_origins.add_headers(request, response)
        if request.method == "OPTIONS" and self.allowed_origins.of_request(request):
            add_preflight_headers(response, "GET, POST, OPTIONS")
        return response

    def _page(
        self, template: str, status: int, figures: Mapping[str, object] = NO_FIGURES, ahead: bool = False,
        **values: object,
    ) -> Response:
        """A page. With `ahead` its browser loads the notebook, or the image's web files, while the visitor reads; not a
        browser that saves data.
        """
        nonce = secrets.token_urlsafe(16)
        ahead = ahead and not _saves_data(request)
        assets, origin = _assets(figures) if ahead else ("", "")
        page = render_template(
            template, nonce=nonce, key=secrets.token_urlsafe(24), title=self.settings.title, text=self.settings.text,
            is_public=self.settings.access == "public", figures=figures, assets=assets,
            lends=ahead and status != 503 and self._lends(), **values,
        )
        policy = POLICY.format(nonce=nonce, connect=f"'self' {origin}".strip())
        return Response(page, status, headers={
            "Content-Security-Policy": policy, "Content-Type": "text/html; charset=utf-8"})


def _assets(figures: Mapping[str, object]) -> tuple[str, str]:
    """The address of the image's web files, "" if there are none, and its origin, "" for that of the page."""
    match = _ASSETS.fullmatch(str(figures.get("assets") or ""))
    return (match[0], match[1] or "") if match else ("", "")


def _saves_data(request: Request) -> bool:
    return request.headers.get("Save-Data", "").lower() == "on"


def duration(seconds: float) -> str:
    """A duration in words, rounded to one unit: "12 hours", "90 minutes", "a minute"."""
    for length, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * length or seconds == length:
            count = round(seconds / length)
            return f"{count} {name}s" if count > 1 else f"{'an' if name == 'hour' else 'a'} {name}"
    return f"{max(1, round(seconds))} seconds" if round(seconds) > 1 else "a second"


def _request_target(request: Request) -> str:
    """The path and query as they were sent; characters that a target may not contain are percent-encoded.

    A client may send an absolute URL, as to a proxy, and paths that begin with several slashes.
    """
    target = str(request.environ.get("RAW_URI") or request.full_path.rstrip("?"))
    target = re.sub(r"^[a-z]+://[^/?]*", "", target).partition("#")[0]
    return quote(target, safe=_TARGET_CHARACTERS)


def _slot_path(request: Request) -> str:
    """The path and query below a slot that the request is for; "" for the image's own start page."""
    return re.sub(r"^/+(?:spawn(?:/+|(?=\?)|$))?", "", _request_target(request)).lstrip("/")


def _without_token(target: str) -> str:
    path, _, query = target.partition("?")
    rest = "&".join(part for part in query.split("&") if part and not part.startswith("token="))
    return f"{path}?{rest}" if rest else path


def _client_address(request: Request) -> str:
    return request.headers.get("X-Real-IP", "unknown")


def _from_robot(request: Request) -> bool:
    return is_robot(request.headers.get("User-Agent", ""))


def _wants_json(request: Request) -> bool:
    """Whether the caller is a program: its Accept header names JSON and not HTML, or the path is one of an API."""
    accept = request.headers.get("Accept", "")
    return bool(re.match(r"/+(?:spawn/+)?(?:user/+[^/]*/+)?api(?:/|$)", request.path)) or (
        "json" in accept and "text/html" not in accept)
