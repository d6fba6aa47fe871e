# SPDX-License-Identifier: BSD-3-Clause
"""Generates HAProxy's configuration from the settings, for HAProxy 2.6 (Debian 12) and 3.0 (Debian 13).

Routing of a claim: the frontend `web` sends it to a chain, one of the backends `by_load`, `by_click` and `by_key`. The
servers of a chain are stages, which are tried in order until one returns a slot. Stages are listeners of the same
HAProxy. The last server is the status service, whose page shows when a slot may become free. The stages send claims to
hosts:

    claims   to a random host, weighted by its size and its free capacity; after a refusal, to the next one
    clicked  like claims, but a repeated click goes to the same host again
    keyed    a repeated Idempotency-Key of a client goes to the same host again, through any gateway

Every claim has an Idempotency-Key, so a host that gets it twice returns the same slot. A claim is sent to another host
only if the first one refused it (503), did not receive it, or died with its response.

Routing of a user: the slot's id contains the label of its host. In the backend `users` each host has weight 0, so that
requests go to a host only if they name it. If the named host is down or unknown, the request goes to the only server
with a weight, the status service, which responds with an error page. A request never goes to another host.

Routing of an asset, a file of an image: every host that has the image has the same file. The request goes to the host
of the slot whose page has sent it, or to any host; a host without the image responds with 404, and the request goes to
the next one.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from nbagent.config.schema import Network
from nbagent.core import paths
from nbagent.core.robots import PATTERN
from nbagent.gateway.settings import FleetHostSettings, GatewaySettings, Listen, ring_number

RUN = str(paths.GATEWAY_RUN)
CERTIFICATES = f"{RUN}/certificates"
# HAProxy's Runtime API: ADMIN_SOCKET is root's and may change hosts, STATS_SOCKET is read-only for the status service.
ADMIN_SOCKET = f"{RUN}/admin.sock"
STATS_SOCKET = f"{RUN}/look.sock"
STATUS_SOCKET = str(paths.GATEWAY_STATUS_SOCKET)
PAGES = str(paths.GATEWAY_PAGES)

# Labels of hosts contain neither "_" nor "-", so these names are never those of a host.
STATUS = "_status"
ANY = "_any"
NO_HOST = "_no_host"
STAGES = ("claims", "clicked", "keyed")
USERS = "users"
ASSETS = "assets"
# Those with the hosts of the fleet as servers.
BACKENDS = (*STAGES, USERS, ASSETS)
# The id of no slot, for a check: a supervisor responds that no such slot is lent.
ABSENT = "check-000000000000"
# Prefix of the keys that the gateway adds. No client repeats a request with such a key.
OWN_KEY = "gateway-"

# HAProxy keeps all headers of a request in one buffer, and a whole claim, so that it can send it to another host. Other
# services on the domain may have set cookies, so the buffer is twice the default.
BUFFER_BYTES = 32768
CLAIM_MAX_BYTES = 8192
RATE_WINDOW_S = 60
_WORDS_A_LINE = 50  # HAProxy allows 64
# The line of a claim has TRACE-SPAN of the client's traceparent (W3C); HAProxy forwards the header to the host.
_TRACE = (
    "http-request set-var(txn.trace) req.hdr(traceparent),bytes(3,49) "
    "if { req.hdr(traceparent) -m reg ^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?$ }"
)
_CHECK = "check inter 2s fastinter 500ms downinter 1s fall 2 rise 1"
# A restart of the supervisor or the API, for which claims wait, is over before so many checks of a claim's way fail,
# each after 3 s.
_CLAIMS_CHECK = _CHECK.replace("fall 2", "fall 3")


def render(settings: GatewaySettings) -> str:
    """The whole configuration file."""
    blocks = [
        _global(settings),
        _defaults(),
        *([_resolvers(settings)] if settings.fleet.srv else []),
        _web(settings),
        *_chains(),
        *(_stage(name, settings) for name in STAGES),
        _users(settings),
        _assets(settings),
        _services(settings),
    ]
    return "\n".join("\n".join(block) + "\n" for block in map(list, blocks))


def servers_of(label: str, host: FleetHostSettings) -> dict[str, str]:
    """The arguments of `server LABEL` in each backend that has the host, for the configuration and the Runtime API."""
    where = f"{_numbered(host.address)}:{host.port}"
    agent = f"agent-check agent-inter 1s agent-port {host.check_port}"
    users = {USERS: f"{where} weight 0 {_CHECK}", ASSETS: f"{where} weight {host.weight} {_CHECK}"}
    if host.drain:
        # The host is left out instead of `disabled`, because "ready" from its agent check would enable it again.
        return users
    place = f"id {ring_number(label)}"
    return users | {
        "claims": f"{where} weight {host.weight} {_CLAIMS_CHECK} {agent} {place}",
        "clicked": f"{where} weight {host.weight} {_CLAIMS_CHECK} {agent} {place}",
        "keyed": f"{where} weight 10 {_CLAIMS_CHECK} {place}",
    }


def all_hosts(settings: GatewaySettings) -> str:
    """The backend that has all hosts, including drained ones."""
    return STAGES[0] if settings.fleet.srv else USERS


def _numbered(address: str) -> str:
    return f"ipv6@{address}" if ":" in address else f"ipv4@{address}"


def _global(settings: GatewaySettings) -> Iterator[str]:
    yield f"""\
# Generated by nbagent gateway from /etc/nbagent/gateway.toml and gateway.d. Changes here are overwritten.

global
    # More urgent messages get the level notice, because a reload logs a warning for each stopped proxy.
    log stdout format short local0 info notice
    stats socket {ADMIN_SOCKET} mode 600 level admin expose-fd listeners
    # Read-only, for members of its group.
    stats socket {STATS_SOCKET} mode 660 level user
    tune.bufsize {BUFFER_BYTES}
    ssl-default-bind-options ssl-min-ver TLSv1.2 no-tls-tickets
    ssl-default-bind-ciphers ECDHE+AESGCM:ECDHE+CHACHA20
    # Health checks of many hosts are spread over time.
    spread-checks 10"""
    if settings.listen.connections:
        yield f"    maxconn {settings.listen.connections}"


def _defaults() -> Iterator[str]:
    yield """\
defaults
    mode http
    log global
    option dontlognull
    option splice-auto
    # TCP keepalives detect a host that vanished without closing its connections. The websocket of an idle notebook
    # stays open, because the kernel of its host responds to them.
    option clitcpka
    option srvtcpka
    srvtcpka-idle 10s
    srvtcpka-intvl 2s
    srvtcpka-cnt 3
    timeout http-request 10s
    timeout http-keep-alive 75s
    timeout client 5m
    timeout client-fin 10s
    timeout connect 2s
    timeout check 3s
    timeout queue 5s
    # A cell of a notebook may compute for a day before a download begins.
    timeout server 24h
    timeout tunnel 25h"""
    # Sent for headers that are longer than the buffer, or malformed.
    yield (
        f'    http-error status 400 content-type "text/html; charset=utf-8" file {PAGES}/headers.html '
        "hdr Cache-Control no-store"
    )
    for status in (500, 502, 503, 504):
        # Sent if no server responded, not even the status service.
        yield (
            f'    http-error status {status} content-type "text/html; charset=utf-8" file {PAGES}/closed.html '
            "hdr Cache-Control no-store hdr Retry-After 5"
        )


def _resolvers(settings: GatewaySettings) -> Iterator[str]:
    """The name servers for the hosts from the DNS."""
    yield "resolvers dns"
    if settings.fleet.resolvers is None:
        yield "    parse-resolv-conf"
    for place, server in enumerate(settings.fleet.resolvers or ()):
        yield f"    nameserver dns{place} {server}"
    yield """\
    accepted_payload_size 8192
    resolve_retries 2
    timeout resolve 1s
    timeout retry 1s
    hold valid 5s"""
    # Hosts are kept for a while if a name server fails.
    yield "    hold obsolete 30s"
    yield "    hold nx 5s"


def _web(settings: GatewaySettings) -> Iterator[str]:
    """The frontend for browsers: client addresses, refusals and routing."""
    tls = bool(settings.tls.certificates)
    yield "frontend web"
    yield from (f"    bind {_bound(listen)}" for listen in settings.listen.http)
    if tls:
        for listen in settings.listen.https:
            yield f"    bind {_bound(listen)} ssl crt {CERTIFICATES} alpn h2,http/1.1"
    yield f"    log-format \"{_log_format('web')}\""
    if settings.log.requests == "trouble":
        yield "    option dontlog-normal"
    yield ""
    yield from _connections(settings)
    yield from _client_headers(settings, tls)
    yield ""
    yield from _refusals(settings)
    yield ""
    yield from _routes(settings)


def _connections(settings: GatewaySettings) -> Iterator[str]:
    """The bound of a client's connections, applied before anything is read."""
    not_trusted = ""
    if settings.listen.trusted_proxies:
        yield from _list("trusted", "src", settings.listen.trusted_proxies)
        not_trusted = " unless trusted"
    yield f"    tcp-request connection track-sc1 src,ipmask(32,64) table clients{not_trusted}"
    yield f"    tcp-request connection reject if {{ sc1_conn_cur(clients) gt {settings.listen.client_connections} }}"


def _client_headers(settings: GatewaySettings, tls: bool) -> Iterator[str]:
    if settings.listen.trusted_proxies:
        yield "    http-request set-var(txn.proxied) bool(true) if trusted"
        yield "    http-request set-src req.hdr_ip(X-Forwarded-For,-1) if trusted { req.hdr(X-Forwarded-For) -m found }"
    yield """\
    acl proxied var(txn.proxied) -m bool
    # Clients must not set headers that hosts trust from a gateway.
    http-request set-var(txn.proto) str(http)
    http-request set-var(txn.proto) str(https) if { ssl_fc }
    http-request set-var(txn.proto) str(https) if proxied { req.hdr(X-Forwarded-Proto,1) -m str -i https }
    http-request set-header X-Forwarded-Host %[req.hdr(Host)] unless proxied { req.hdr(X-Forwarded-Host) -m found }
    http-request set-header X-Forwarded-Proto %[var(txn.proto)]
    http-request set-header X-Forwarded-For %[src]
    http-request del-header Forwarded
    http-request del-header X-Real-IP
    http-request del-header X-Scheme
    http-request del-header X-Nbagent-Gateway"""
    if tls and settings.tls.hsts:
        yield (
            f'    http-after-response set-header Strict-Transport-Security "max-age={settings.tls.hsts:.0f}" '
            "if { var(txn.proto) -m str https }"
        )
    if tls:
        acme = " !{ path_beg /.well-known/acme-challenge/ }" if settings.tls.acme else ""
        yield f"    http-request redirect scheme https code 308 if {{ var(txn.proto) -m str http }}{acme}"


def _refusals(settings: GatewaySettings) -> Iterator[str]:
    yield """\
    # API clients get JSON, browsers get a page.
    acl wants_json path_beg /api/
    acl wants_json path_reg ^/user/[^/]+/api(/|$)
    acl wants_json req.hdr(Accept) -m sub json
    acl wants_page req.hdr(Accept) -m sub text/html
    # The label of the host is the part of the slot's id before "-".
    acl slot path_reg ^/user/[a-z0-9]{1,16}-[a-z0-9]+(/|$)
    http-request set-var(txn.label) path,field(3,/),field(1,-) if slot"""
    if settings.fleet.domain:
        escaped = settings.fleet.domain.replace(".", r"\.")
        yield f"    acl slot_host req.hdr(Host),lower -m reg ^[a-z0-9]{{1,16}}-[a-z0-9]+\\.{escaped}(:[0-9]+)?$"
        yield "    http-request set-var(txn.label) req.hdr(Host),lower,field(1,-) if slot_host !slot"
    yield f"""\
    acl at_slot var(txn.label) -m found
    # These claim a slot: the button on the front page, tmpnb's links and tmpnb's API. HEAD, prefetching,
    # crawlers and link previews do not.
    acl spawn path /spawn
    acl spawn path_beg /spawn/
    acl gone path_beg /spawn/user/
    acl api_spawn path /api/spawn /api/spawn/
    acl claim_method method GET POST
    acl ahead req.hdr(Sec-Purpose),lower -m sub prefetch prerender
    acl ahead req.hdr(Purpose),lower -m sub prefetch
    acl robot req.fhdr(User-Agent) -m reg -i '{PATTERN}'
    acl has_token req.hdr(Authorization) -m found
    acl claim var(txn.claim) -m bool
    acl lend var(txn.lend) -m bool"""
    if settings.landing.access == "public":
        yield "    http-request set-var(txn.claim) bool(true) if spawn !gone claim_method !ahead !robot !at_slot"
        yield "    http-request set-var(txn.lend) bool(true) if { path /api/lend } METH_POST !robot"
    if settings.landing.access != "off":
        # The hosts check the token.
        token = " has_token" if settings.landing.access == "token" else ""
        yield f"    http-request set-var(txn.claim) bool(true) if api_spawn METH_POST !at_slot{token}"
    if settings.landing.banned:
        yield from _list("banned", "src", settings.landing.banned)
        yield from _answer(403, "banned", "banned")
    yield f"""\
    # A client is one IPv4 address or one IPv6 /64 network. Refused claims do not count. Lent slots are counted apart,
    # so that a visitor who gets several can still claim one.
    http-request track-sc0 src,ipmask(32,64) table rates if claim or lend
    acl too_often sc0_gpc0_rate(rates) ge {settings.landing.rate}
    acl lends_too_often sc0_gpc1_rate(rates) ge {settings.landing.rate}"""
    yield from _answer(429, "busy", "claim too_often", "hdr Retry-After 60")
    yield from _answer(429, "busy", "lend lends_too_often", "hdr Retry-After 60")
    yield f"""\
    http-request sc-inc-gpc0(0) if claim
    http-request sc-inc-gpc1(0) if lend
    # The whole request must fit into a buffer, so that it can be sent to the next host after a refusal.
    http-request wait-for-body time 5s at-least {CLAIM_MAX_BYTES} if claim METH_POST
    http-request return status 413 content-type text/plain string "the body of a claim is too large" \
if claim {{ req.body_len gt {CLAIM_MAX_BYTES} }}"""


def _answer(status: int, page: str, condition: str, headers: str = "") -> Iterator[str]:
    more = f" {headers}" if headers else ""
    fixed = f'{more} hdr Cache-Control no-store hdr Vary Accept'
    html = f"content-type \"text/html; charset=utf-8\" file {PAGES}/{page}.html"
    json = f"content-type application/problem+json file {PAGES}/{page}.json"
    yield f"    http-request return status {status} {json}{fixed} if {condition} wants_json !wants_page"
    yield f"    http-request return status {status} {html}{fixed} if {condition}"


def _routes(settings: GatewaySettings) -> Iterator[str]:
    yield f"""\
    # A key chosen by the client goes to the same host through every gateway. A click on the button has the page's key.
    acl has_key req.hdr(Idempotency-Key) -m found
    acl has_click req.body_param(key) -m reg ^[A-Za-z0-9_.:-]{{1,128}}$
    http-request set-var(txn.way) str(load) if claim
    http-request set-var(txn.way) str(click) if claim has_click
    http-request set-var(txn.way) str(key) if claim has_key
    http-request set-header Idempotency-Key {OWN_KEY}%[uuid()] if {{ var(txn.way) -m str load }}"""
    if settings.tls.acme:
        yield "    use_backend acme if { path_beg /.well-known/acme-challenge/ }"
    yield "    use_backend assets if { path_beg /assets/ }"
    yield "    use_backend users if at_slot"
    # A host lends a slot or sends 204; another one is not tried.
    yield "    use_backend claims if lend"
    yield "    use_backend by_%[var(txn.way)] if claim"
    yield "    default_backend status"


def _chains() -> Iterator[Iterator[str]]:
    """Backends that try their stages in order, by the servers' ids (`balance first`), until one succeeds."""
    yield _chain("by_load", [])
    yield _chain("by_click", ["clicked"])
    yield _chain("by_key", ["keyed"])


def _chain(name: str, before: list[str]) -> Iterator[str]:
    yield f"""\
backend {name}
    balance first
    option http-buffer-request
    option redispatch 1
    http-reuse never
    # 503: every host that got the claim refused it. 501: no host was up.
    retry-on 501 503 conn-failure
    retries {len(before) + 1}"""
    for stage in before:
        # With weight 0, use-server selects it for the first attempt, and a retry never does.
        yield f"    use-server {stage} if TRUE"
        yield f"    server {stage} unix@{RUN}/{stage}.sock id 3 weight 0 send-proxy-v2"
    yield f"    server claims unix@{RUN}/claims.sock id 1 send-proxy-v2"
    yield f"    server {STATUS} unix@{STATUS_SOCKET} id 2"


def _stage(name: str, settings: GatewaySettings) -> Iterator[str]:
    # By the way of a claim over router, API and supervisor, without an effect. /healthz is that of the router alone,
    # and the figures of a host at /api/stats are kept for a second, so that checks would make those of pages older.
    checked = "GET /healthz" if settings.landing.access == "off" else f"POST /user/{ABSENT}/nbagent/return"
    yield f"""\
listen {name}
    bind unix@{RUN}/{name}.sock mode 600 accept-proxy
    log-format \"{_log_format('claim')}\"
    option httpchk {checked}
    http-check expect ! rstatus ^5
    option http-buffer-request
    # A new connection for each claim, so that a host to which the connection fails has not received the claim.
    http-reuse never
    srvtcpka-idle 2s
    srvtcpka-intvl 1s
    timeout connect 1s
    timeout server {settings.fleet.claim_timeout:.0f}s
    # Without response-timeout, because a slow host may have started a slot. A host that closes the connection without a
    # response has died.
    retry-on 503 conn-failure empty-response
    retries {settings.fleet.retries}
    option redispatch 1
    http-request set-header X-Nbagent-Gateway 1
    {_TRACE}"""
    keys = {"clicked": "req.body_param(key)", "keyed": "req.hdr(Idempotency-Key)"}
    if name in keys:
        yield f"    balance hash {keys[name]}"
        yield "    hash-type consistent"
        # The table keeps the host that returned a slot, because another one that was full before may have capacity now.
        yield "    stick-table type string len 128 size 100k expire 1h"
        yield f"    stick on {keys[name]}"
    else:
        yield "    balance random(2)"
        yield f"    acl own_key req.hdr(Idempotency-Key) -m beg {OWN_KEY}"
        for stage, key in keys.items():
            yield f"    stick store-request {key} table {stage} unless own_key"
    yield from _servers(name, settings)
    # HAProxy 2.6 may close the connection without a response if the last server goes down between two attempts, so this
    # server is always up. Its 501 makes the chain, but not the stage, try again.
    yield f"    server {NO_HOST} unix@{RUN}/no-host.sock backup"


def _users(settings: GatewaySettings) -> Iterator[str]:
    yield f"""\
backend {USERS}
    balance roundrobin
    option httpchk GET /healthz
    # If the connection to the host fails, the status service responds at once. A request that was sent is not repeated.
    retry-on conn-failure
    retries 1
    option redispatch 1"""
    if settings.fleet.srv:
        domain = settings.fleet.srv.split(".", 2)[2]
        yield f"""\
    # The host's DNS name is derived from the label.
    http-request do-resolve(txn.host,dns) var(txn.label),concat(.{domain})
    http-request set-dst var(txn.host) if {{ var(txn.host) -m found }}
    use-server {ANY} if {{ var(txn.host) -m found }}
    server {ANY} 0.0.0.0:{FleetHostSettings().port} weight 0"""
    else:
        yield "    use-server %[var(txn.label)] if TRUE"
        yield from _servers(USERS, settings)
    # Listed twice, because HAProxy waits a second before a retry in a backend with one server.
    yield f"    server {STATUS} unix@{STATUS_SOCKET} weight 1"
    yield f"    server {STATUS}_again unix@{STATUS_SOCKET} weight 1"


def _assets(settings: GatewaySettings) -> Iterator[str]:
    yield f"""\
backend {ASSETS}
    balance roundrobin
    option httpchk GET /healthz
    retry-on 404 conn-failure empty-response response-timeout
    retries {settings.fleet.retries}
    option redispatch 1"""
    if not settings.fleet.srv:
        yield """\
    acl from_slot req.hdr(Referer) -m reg ^https?://[^/]+/user/[a-z0-9]{1,16}-[a-z0-9]+/
    use-server %[req.hdr(Referer),field(5,/),field(1,-)] if from_slot"""
    yield from _servers(ASSETS, settings)
    yield f"    server {STATUS} unix@{STATUS_SOCKET} backup"


def _servers(backend: str, settings: GatewaySettings) -> Iterator[str]:
    fleet = settings.fleet
    if fleet.srv:
        agent = f" agent-check agent-inter 1s agent-port {FleetHostSettings().check_port}"
        if backend in ("keyed", ASSETS):
            agent = ""
        weight, check = 10 if backend == "keyed" else 100, _CHECK if backend == ASSETS else _CLAIMS_CHECK
        yield (
            f"    server-template h 1-{fleet.srv_hosts} {fleet.srv} weight {weight} {check}{agent} "
            "resolvers dns resolve-opts ignore-weight init-addr none"
        )
        return
    for label in sorted(settings.hosts):
        if arguments := servers_of(label, settings.hosts[label]).get(backend):
            yield f"    server {label} {arguments}"


def _services(settings: GatewaySettings) -> Iterator[str]:
    rates = ",".join(f"{counter}_rate({RATE_WINDOW_S}s)" for counter in ("gpc0", "gpc1"))
    yield f"""\
backend status
    # systemd holds the socket, so requests wait while the service restarts, which takes a second.
    timeout server 30s
    server {STATUS} unix@{STATUS_SOCKET}

frontend no_host
    bind unix@{RUN}/no-host.sock mode 600
    no log
    http-request return status 501

backend rates
    stick-table type ipv6 size 1m expire {2 * RATE_WINDOW_S}s store {rates}

backend clients
    stick-table type ipv6 size 1m expire {2 * RATE_WINDOW_S}s store conn_cur"""
    if settings.tls.acme:
        yield f"\nbackend acme\n    timeout server 30s\n    server {ANY} {settings.tls.acme}"
    if settings.listen.metrics:
        yield f"""
frontend metrics
    bind {_bound(settings.listen.metrics)}
    no log
    http-request use-service prometheus-exporter if {{ path /metrics }}
    stats enable
    stats uri /stats
    stats hide-version"""


def _bound(listen: Listen) -> str:
    return f"{listen.address}:{listen.port} v6only" if ":" in listen.address else f"{listen.address}:{listen.port}"


def _list(name: str, fetch: str, networks: Iterable[Network]) -> Iterator[str]:
    """An ACL on several lines, because HAProxy limits the words of a line."""
    texts = [str(ipaddress.ip_network(network)) for network in networks]
    for begin in range(0, len(texts), _WORDS_A_LINE):
        yield f"    acl {name} {fetch} {' '.join(texts[begin : begin + _WORDS_A_LINE])}"


def _log_format(kind: str) -> str:
    """A log format of names and values, without query strings, which may have tokens, and of the client's headers only
    the ids of a well-formed traceparent."""
    host = "host=%s" if kind == "claim" else "backend=%b server=%s"
    trace = " trace=%[var(txn.trace)]" if kind == "claim" else ""
    return (
        f"{kind} client=%ci method=%HM path=%HPO version=%HV status=%ST bytes=%B {host} retries=%rc "
        f"wait_ms=%TR connect_ms=%Tc answer_ms=%Tr total_ms=%Ta end=%tsc{trace}"
    )
