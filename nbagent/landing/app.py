"""The landing page as a Flask application: pages for people, and tmpnb's public API for its clients.

    GET  /, /lab/…, /tree/…, /notebooks/…, /files/…    a page with one button, or one that goes on to /spawn
    GET  /spawn, /spawn/PATH?QUERY                      a slot, by a redirect to PATH?QUERY in it
    POST /spawn, /spawn/PATH?QUERY                      the same; the button, which may be pressed twice
    GET  /spawn/user/SLOT/PATH, /user/SLOT/PATH         "no longer running", with a button for PATH in a new one
    POST /api/spawn                                     {"url": …}, or 429 {"status": "full"}
    GET  /api/stats, /info                              the figures, and a live picture of them

Reached through a proxy alone, which says in X-Real-IP whose request it is. No request is trusted for
its address: whoever comes may have what the landing page gives, or has the landing page's own token.

What is asked for below /spawn is kept as the browser wrote it, percent-encoding included: a slot has
other names for its files than this program has.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from flask import Flask, Request, Response, jsonify, redirect, render_template, request
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as AnyResponse

from nbagent.config.host_config import LandingSettings
from nbagent.core.errors import BadRequest, Forbidden, Full, NbagentError, SlotNotFound
from nbagent.core.model import claim_link
from nbagent.landing.backend import SlotBackend, again_s
from nbagent.web.tokens import bearer_token

# Said by the gateway of a fleet: it asks the next host when this one is full, which it does by the status 503,
# and its clients are somewhere else than this host's.
GATEWAY_HEADER = "X-Nbagent-Gateway"
# What the path of a link may begin with, as tmpnb has it; JupyterLab's own besides.
PAGES = ("lab", "tree", "notebooks", "files")
# Nothing of these is for others to load, and a page of ours loads nothing from elsewhere.
POLICY = (
    "default-src 'none'; base-uri 'none'; connect-src 'self'; frame-ancestors 'self'; script-src 'nonce-{nonce}'; "
    "style-src 'unsafe-inline'"
)
PREFLIGHT_MAX_AGE_S = 600
# What an address may hold: RFC 3986's characters and percent signs. Browsers leave a few others as they are.
_KEPT = "/%!$&'()*+,;=:@?._~-"
_OF_A_SLOT = re.compile(r"/+(?:spawn/+)?user/+[^/?]*/*")
_KEY = re.compile(r"[!-~]{1,255}")
_LOG = logging.getLogger(__name__)


def create_app(settings: LandingSettings, backend: SlotBackend, token_matches: Callable[[str], bool]) -> Flask:
    """The landing page of `backend`; `token_matches` checks the token for `access = "token"`."""
    app = Flask(__name__, static_folder=None, template_folder=str(Path(__file__).parent / "pages"))
    app.url_map.merge_slashes = False
    app.url_map.strict_slashes = False
    app.jinja_env.filters.update(duration=duration, decoded=unquote)
    landing = _Landing(settings, backend, token_matches)
    app.register_error_handler(NbagentError, landing.failed)
    app.register_error_handler(HTTPException, landing.refused)
    app.register_error_handler(Exception, landing.surprised)

    def serve(rule: str, view: Callable[..., AnyResponse], *methods: str, below: bool = False) -> None:
        # A view reads the path as it was sent; what Flask decoded of it is of no use.
        for number, path in enumerate((rule, f"{rule}/", f"{rule}/<path:_>") if below else (rule, f"{rule}/")):
            app.add_url_rule(
                path, f"{view.__name__}:{rule}:{number}", lambda _="": view(),
                methods=methods, provide_automatic_options=False,
            )

    app.after_request(landing.finish)
    if settings.access == "off":
        return app

    @app.before_request
    def preflight() -> AnyResponse | None:
        return Response(status=204) if request.method == "OPTIONS" else None

    serve("/api/spawn", landing.spawn_by_api, "POST")
    serve("/api/stats", landing.stats, "GET")
    serve("/stats", landing.old_stats, "GET")
    serve("/user", landing.gone, "GET", below=True)
    serve("/spawn/user", landing.gone, "GET", below=True)
    if settings.access == "public":
        app.add_url_rule("/", "home", landing.home, methods=["GET"], provide_automatic_options=False)
        for page in PAGES:
            serve(f"/{page}", landing.home, "GET", below=True)
        serve("/spawn", landing.spawn_by_link, "GET", below=True)
        serve("/spawn", landing.spawn_by_button, "POST", below=True)
        serve("/info", landing.info, "GET")
        app.add_url_rule("/robots.txt", "robots", landing.robots, methods=["GET"], provide_automatic_options=False)
    for rule in app.url_map.iter_rules():
        # Werkzeug answers HEAD by GET, and what only looks whether a link works shall take no slot.
        if rule.rule.startswith("/spawn") and rule.methods:
            rule.methods.discard("HEAD")
    return app


class _Landing:
    """The views, and what they share."""

    def __init__(self, settings: LandingSettings, backend: SlotBackend, token_matches: Callable[[str], bool]) -> None:
        self.settings, self.backend, self.token_matches = settings, backend, token_matches

    # Pages

    def home(self) -> AnyResponse:
        """A page that starts a notebook, at the path that was asked for."""
        wanted = _wanted(request)
        return self._page("home.html", 200, wanted=wanted, at_once=self.settings.start == "at once", **self._figures())

    def gone(self) -> AnyResponse:
        """The page of a slot that has ended; programs get a problem."""
        wanted = _OF_A_SLOT.sub("", _target(request), count=1)
        if _is_program(request):
            raise SlotNotFound("no slot of this id runs here; it has ended, or never was")
        # Its token was the ended slot's.
        return self._page("gone.html", 404, wanted=_without_token(wanted))

    def info(self) -> AnyResponse:
        """A live picture of the backend."""
        return self._page("info.html", 200)

    def robots(self) -> AnyResponse:
        """What follows every link shall start nothing."""
        return Response("User-agent: *\nAllow: /$\nDisallow: /\n", content_type="text/plain; charset=utf-8")

    # Slots

    def spawn_by_link(self) -> AnyResponse:
        """A slot for whoever follows a link."""
        purpose = request.headers.get("Sec-Purpose", request.headers.get("Purpose", ""))
        if "prefetch" in purpose or "prerender" in purpose:
            # 503 makes a browser ask again when somebody really follows the link.
            return Response(status=503)
        if request.headers.get("Sec-Fetch-Mode", "navigate") != "navigate":
            raise Forbidden("a notebook is started by following a link, not as a part of another page")
        return self._spawn(302, _key(request.headers.get("Idempotency-Key")))

    def spawn_by_button(self) -> AnyResponse:
        """A slot for whoever presses a button of ours; the same one when it is pressed twice."""
        self._refuse_foreign()
        key = request.headers.get("Idempotency-Key")
        return self._spawn(303, _key(key if key is not None else request.form.get("key")))

    def spawn_by_api(self) -> AnyResponse:
        """tmpnb's way for programs."""
        if self.settings.access == "token" and not self._has_token():
            # As tmpnb answers, with or without a token.
            raise Forbidden("send the landing page's token as 'Authorization: token TOKEN'")
        self._refuse_foreign()
        try:
            claim = self.backend.claim({}, _key(request.headers.get("Idempotency-Key")), _client(request))
        except Full as error:
            if GATEWAY_HEADER in request.headers:
                raise
            answer = jsonify(status="full")
            answer.status_code = 429
            answer.headers["Retry-After"] = str(again_s({}, error.details.get("retry_after_s")))
            return answer
        # Not the image's start page: what tmpnb's clients add to it is the path of an API.
        base = f"/user/{claim['slot']}/"
        return jsonify(url=self._link(claim, claim_link({**claim, "path": base})))

    def stats(self) -> AnyResponse:
        """The figures; of no use to anybody who would have to be kept from them."""
        answer = jsonify(self.backend.stats())
        answer.headers["Access-Control-Allow-Origin"] = "*"
        return answer

    def old_stats(self) -> AnyResponse:
        """Where tmpnb had the figures first: on one host it leads on, in front of a fleet it still answers itself."""
        return self.stats() if "hosts" in self.backend.stats() else redirect("/api/stats", 301)

    def _spawn(self, status: int, key: str | None) -> AnyResponse:
        wanted = _wanted(request)
        options = {"path": wanted} if wanted else {}
        claim = self.backend.claim(options, key, _client(request))
        return redirect(self._link(claim, claim_link(claim)), status)

    def _link(self, claim: Mapping[str, Any], path: str) -> str:
        """A link into a slot: relative where the browser is at the right place already."""
        if GATEWAY_HEADER not in request.headers and not self.backend.has_origins():
            return path
        scheme = request.headers.get("X-Forwarded-Proto", "http")
        origin = self.backend.origin(claim["slot"], request.headers.get("Host", ""), scheme)
        return origin + path

    def _has_token(self) -> bool:
        given = bearer_token(request.headers.get("Authorization", ""))
        return given is not None and self.token_matches(given)

    def _refuse_foreign(self) -> None:
        """Refuses what the page of another site sends, unless it is a friend's. Raises Forbidden."""
        origin = request.headers.get("Origin")
        if origin is None or self._is_friend(origin):
            return
        if origin.partition("://")[2].lower() != request.headers.get("Host", "").lower():
            raise Forbidden("this web origin is not in landing.allowed_origins", origin=origin[:200])

    def _is_friend(self, origin: str) -> bool:
        allowed = self.settings.allowed_origins
        return "*" in allowed or origin.lower() in (friend.lower() for friend in allowed)

    # Answers that are none

    def failed(self, error: NbagentError) -> AnyResponse:
        """What people see when no slot is to be had, and the problem that programs get."""
        if _is_program(request) or not request.path.startswith(("/spawn", "/user")):
            answer = self._problem(error.code, error.title, error.http_status, str(error))
        elif isinstance(error, Full):
            figures = self._figures()
            wait_s = again_s(figures["figures"], error.details.get("retry_after_s"))
            answer = self._page("full.html", error.http_status, wanted=_wanted(request), again_s=wait_s, **figures)
        else:
            kind = "refused" if isinstance(error, (BadRequest, Forbidden)) else "failed"
            answer = self._page("failed.html", error.http_status, wanted=_wanted(request), kind=kind, why=str(error))
        if error.http_status == 503:
            answer.headers["Retry-After"] = str(again_s({}, error.details.get("retry_after_s")))
        return answer

    def refused(self, error: HTTPException) -> AnyResponse:
        """No such address, or method."""
        status = error.code or 500
        if _is_program(request):
            return self._problem("not-found" if status == 404 else "bad-request", error.name, status,
                                 error.description or error.name)
        if status == 404:
            return self._page("nowhere.html", 404)
        return Response(f"{error.name}\n", status, content_type="text/plain; charset=utf-8", headers=[
            header for header in error.get_headers() if header[0] == "Allow"])

    def surprised(self, error: Exception) -> AnyResponse:
        """A bug."""
        _LOG.error("a request met a bug", exc_info=error)
        return self._page("failed.html", 500, wanted=_wanted(request), kind="failed", why="")

    def finish(self, response: Response) -> Response:
        """What every answer has."""
        response.headers["Cache-Control"] = "no-store"
        # With no-referrer a browser would not say either that our own button was pressed on a page of ours.
        response.headers["Referrer-Policy"] = "same-origin"
        response.headers["X-Content-Type-Options"] = "nosniff"
        origin = request.headers.get("Origin")
        if self.settings.allowed_origins:
            response.headers.add("Vary", "Origin")
        if origin is not None and self._is_friend(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "Retry-After"
            if request.method == "OPTIONS":
                response.headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
                response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, Idempotency-Key"
                response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_MAX_AGE_S)
        return response

    def _figures(self) -> dict[str, Any]:
        """The figures for a page, which is worth showing without them."""
        try:
            return {"figures": self.backend.stats()}
        except NbagentError as error:
            _LOG.warning("no figures for a page: %s", error)
            return {"figures": {}}

    def _page(self, template: str, status: int, **values: Any) -> Response:
        nonce = secrets.token_urlsafe(16)
        page = render_template(
            template, nonce=nonce, key=secrets.token_urlsafe(24), title=self.settings.title, text=self.settings.text,
            is_public=self.settings.access == "public", **values,
        )
        return Response(page, status, headers={
            "Content-Security-Policy": POLICY.format(nonce=nonce), "Content-Type": "text/html; charset=utf-8"})

    @staticmethod
    def _problem(code: str, title: str, status: int, detail: str) -> Response:
        answer = jsonify(type=f"urn:nbagent:problem:{code}", title=title, status=status, detail=detail)
        answer.status_code = status
        answer.content_type = "application/problem+json"
        return answer


def duration(seconds: float) -> str:
    """A time as people say it, rounded to what matters: "12 hours", "90 minutes", "a minute"."""
    for length, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * length or seconds == length:
            count = round(seconds / length)
            return f"{count} {name}s" if count > 1 else f"{'an' if name == 'hour' else 'a'} {name}"
    return f"{max(1, round(seconds))} seconds" if round(seconds) > 1 else "a second"


def _target(given: Request) -> str:
    """The path and query as they were sent, in characters that an address may hold.

    A client may send the whole URL, as to a proxy, and paths that begin with several slashes.
    """
    raw = str(given.environ.get("RAW_URI") or given.full_path.rstrip("?"))
    raw = re.sub(r"^[a-z]+://[^/?]*", "", raw).partition("#")[0]
    return quote(raw, safe=_KEPT)


def _wanted(given: Request) -> str:
    """What is asked for below a slot, with its query; "" for the image's own start page."""
    return re.sub(r"^/+(?:spawn(?:/+|(?=\?)|$))?", "", _target(given)).lstrip("/")


def _without_token(target: str) -> str:
    path, _, query = target.partition("?")
    rest = "&".join(part for part in query.split("&") if part and not part.startswith("token="))
    return f"{path}?{rest}" if rest else path


def _client(given: Request) -> str:
    return given.headers.get("X-Real-IP", "unknown")


def _key(given: str | None) -> str | None:
    """An Idempotency-Key that is one. Raises BadRequest."""
    if given is None or _KEY.fullmatch(given):
        return given
    raise BadRequest("Idempotency-Key: expected 1 to 255 visible ASCII characters")


def _is_program(given: Request) -> bool:
    """Whether the caller wants JSON and no page: it says so, or calls an API."""
    accept = given.headers.get("Accept", "")
    return bool(re.match(r"/+(?:spawn/+)?(?:user/+[^/]*/+)?api(?:/|$)", given.path)) or (
        "json" in accept and "text/html" not in accept)
