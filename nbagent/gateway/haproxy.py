"""HAProxy's configuration, of the settings: a pure function. HAProxy 2.6 (Debian 12) and 3.0 (Debian 13) take it.

How a claim goes. `web` hands it to a way (`by_load`, `by_click`, `by_key`), whose servers are the
stages that it goes through until one has a slot: listeners of this same HAProxy, and at last the
status service, which has no slot but a page that says when there may be one. A stage asks hosts:

    claims   a host at random, by its size and how much of it is free; a no leads to the next
    clicked  as claims, but the same click goes to the same host again
    keyed    the same client's Idempotency-Key goes to the same host again, by every gateway

Every claim carries a key. So a host that is asked again gives the slot that it gave, and what is
tried at another host is only what this one refused (503), never heard, or took with it when it died.

How a user goes. The slot's id says the host. In `users` each host has weight 0: nothing is ever
balanced to it, and who names it is served by it. So what cannot go where it wants, as the host is
dead or there is none of that name, goes to the only server with a weight: the status service, which
says so. No host is given another's user, whatever happens.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from nbagent.config.schema import Network
from nbagent.gateway.settings import FleetHostSettings, GatewaySettings, Listen, ring_number

RUN = "/run/nbagent-gateway"
CERTIFICATES = f"{RUN}/certificates"
# HAProxy's runtime interface: one to change hosts by, root's; one to look, the status service's.
ADMIN_SOCKET = f"{RUN}/admin.sock"
LOOK_SOCKET = f"{RUN}/look.sock"
STATUS_SOCKET = "/run/nbagent-gateway-status.sock"
PAGES = "/usr/share/nbagent/gateway"

# A label has neither "_" nor "-", so none of these is a host's.
STATUS = "_status"
ANY = "_any"
NOBODY = "_nobody"
STAGES = ("claims", "clicked", "keyed")
USERS = "users"
# What the keys begin with that the gateway gives; nobody asks with one of them again.
OWN_KEY = "gateway-"

# A request is held whole, to be sent again, in one buffer of 16 KiB with all its headers.
CLAIM_MAX_BYTES = 8192
RATE_WINDOW_S = 60
_WORDS_A_LINE = 50  # HAProxy takes 64
_CHECK = "check inter 2s fastinter 500ms downinter 1s fall 2 rise 1"


def render(settings: GatewaySettings) -> str:
    """The whole configuration."""
    blocks = [
        _head(settings),
        _web(settings),
        *_ways(),
        *(_stage(name, settings) for name in STAGES),
        _users(settings),
        _services(settings),
    ]
    return "\n".join("\n".join(block) + "\n" for block in map(list, blocks))


def servers_of(label: str, host: FleetHostSettings) -> dict[str, str]:
    """What stands behind `server LABEL` in each backend that has the host, in the configuration and at run time."""
    where = f"{_numbered(host.address)}:{host.port}"
    agent = f"agent-check agent-inter 1s agent-port {host.check_port}"
    users = {USERS: f"{where} weight 0 {_CHECK}"}
    if host.drain:
        # Not `disabled`: the host's own "ready" would lift that.
        return users
    place = f"id {ring_number(label)}"
    return users | {
        "claims": f"{where} weight {host.weight} {_CHECK} {agent} {place}",
        "clicked": f"{where} weight {host.weight} {_CHECK} {agent} {place}",
        "keyed": f"{where} weight 10 {_CHECK} {place}",
    }


def all_hosts(settings: GatewaySettings) -> str:
    """The backend that has all hosts, the drained ones too."""
    return STAGES[0] if settings.fleet.srv else USERS


def _numbered(address: str) -> str:
    return f"ipv6@{address}" if ":" in address else f"ipv4@{address}"


def _head(settings: GatewaySettings) -> Iterator[str]:
    yield f"""\
# Written by nbagent gateway, from /etc/nbagent/gateway.toml and gateway.d. Changes here are lost.

global
    # Nothing above notice: a reload says "stopped" of all that the old process had as a warning.
    log stdout format short local0 info notice
    stats socket {ADMIN_SOCKET} mode 600 level admin expose-fd listeners
    # Who is in its group may look, and change nothing.
    stats socket {LOOK_SOCKET} mode 660 level user
    ssl-default-bind-options ssl-min-ver TLSv1.2 no-tls-tickets
    ssl-default-bind-ciphers ECDHE+AESGCM:ECDHE+CHACHA20
    # Checks of many hosts do not all fall on one moment.
    spread-checks 10"""
    if settings.listen.connections:
        yield f"    maxconn {settings.listen.connections}"
    yield """
defaults
    mode http
    log global
    option dontlognull
    option splice-auto
    # A host that vanished without a word, seen by its silence. A websocket of an idle notebook is silent, too, but
    # its host's kernel answers.
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
    for status in (500, 502, 503, 504):
        # Nobody else answered, not even the status service.
        yield (
            f'    http-error status {status} content-type "text/html; charset=utf-8" file {PAGES}/closed.html '
            "hdr Cache-Control no-store hdr Retry-After 5"
        )
    if settings.fleet.srv:
        yield "\nresolvers dns"
        if settings.fleet.resolvers is None:
            yield "    parse-resolv-conf"
        for place, server in enumerate(settings.fleet.resolvers or ()):
            yield f"    nameserver dns{place} {server}"
        yield "    accepted_payload_size 8192"
        yield "    resolve_retries 2"
        yield "    timeout resolve 1s"
        yield "    timeout retry 1s"
        yield "    hold valid 5s"
        # A name server that fails takes no host away that it named before.
        yield "    hold obsolete 30s"
        yield "    hold nx 5s"


def _web(settings: GatewaySettings) -> Iterator[str]:
    """What browsers come to: who they are, what they want, and what they may not."""
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
    yield from _who(settings, tls)
    yield ""
    yield from _refusals(settings)
    yield ""
    yield from _wants(settings)


def _who(settings: GatewaySettings, tls: bool) -> Iterator[str]:
    if settings.listen.trusted_proxies:
        yield from _list("trusted", "src", settings.listen.trusted_proxies)
        yield "    http-request set-var(txn.proxied) bool(true) if trusted"
        yield "    http-request set-src req.hdr_ip(X-Forwarded-For,-1) if trusted { req.hdr(X-Forwarded-For) -m found }"
    yield """\
    acl proxied var(txn.proxied) -m bool
    # Nobody else says who somebody is, or speaks for a gateway.
    http-request set-var(txn.proto) str(http)
    http-request set-var(txn.proto) str(https) if { ssl_fc }
    http-request set-var(txn.proto) str(https) if proxied { req.hdr(X-Forwarded-Proto) -m str https }
    http-request set-header X-Forwarded-Host %[req.hdr(Host)] unless proxied { req.hdr(X-Forwarded-Host) -m found }
    http-request set-header X-Forwarded-Proto %[var(txn.proto)]
    http-request set-header X-Forwarded-For %[src]
    http-request del-header Forwarded
    http-request del-header X-Real-IP
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
    # Programs get JSON, people a page.
    acl wants_json path_beg /api/
    acl wants_json path_reg ^/user/[^/]+/api(/|$)
    acl wants_json req.hdr(Accept) -m sub json
    acl wants_page req.hdr(Accept) -m sub text/html
    # The host is the part of the slot's id before its "-".
    acl slot path_reg ^/user/[a-z0-9]{1,16}-[a-z0-9]+(/|$)
    http-request set-var(txn.label) path,field(3,/),field(1,-) if slot"""
    if settings.fleet.domain:
        escaped = settings.fleet.domain.replace(".", r"\.")
        yield f"    acl slot_host req.hdr(Host),lower -m reg ^[a-z0-9]{{1,16}}-[a-z0-9]+\\.{escaped}(:[0-9]+)?$"
        yield "    http-request set-var(txn.label) req.hdr(Host),lower,field(1,-) if slot_host !slot"
    yield """\
    acl at_slot var(txn.label) -m found
    # What takes a slot: the button on the front page, tmpnb's links, tmpnb's API. A HEAD takes none, nor does a browser
    # that only looks what may be wanted next.
    acl spawn path /spawn
    acl spawn path_beg /spawn/
    acl gone path_beg /spawn/user/
    acl api_spawn path /api/spawn /api/spawn/
    acl claim_method method GET POST
    acl ahead req.hdr(Sec-Purpose),lower -m sub prefetch prerender
    acl ahead req.hdr(Purpose),lower -m sub prefetch
    acl has_token req.hdr(Authorization) -m found
    acl claim var(txn.claim) -m bool"""
    if settings.landing.access == "public":
        yield "    http-request set-var(txn.claim) bool(true) if spawn !gone claim_method !ahead !at_slot"
    if settings.landing.access != "off":
        # Which token is right, the hosts know.
        token = " has_token" if settings.landing.access == "token" else ""
        yield f"    http-request set-var(txn.claim) bool(true) if api_spawn METH_POST !at_slot{token}"
    if settings.landing.banned:
        yield from _list("banned", "src", settings.landing.banned)
        yield from _answer(403, "banned", "banned")
    yield f"""\
    # One address is one client, and with IPv6 one /64. Only a claim that is let through counts.
    http-request track-sc0 src,ipmask(32,64) table rates if claim
    acl too_often sc0_gpc0_rate(rates) ge {settings.landing.rate}"""
    yield from _answer(429, "busy", "claim too_often", "hdr Retry-After 60")
    yield f"""\
    http-request sc-inc-gpc0(0) if claim
    # A host that says no is not the last: the whole request has to fit into a buffer, to be sent again.
    http-request wait-for-body time 5s at-least {CLAIM_MAX_BYTES} if claim METH_POST
    http-request return status 413 content-type text/plain string "a claim is smaller" \
if claim {{ req.body_len gt {CLAIM_MAX_BYTES} }}"""


def _answer(status: int, page: str, condition: str, headers: str = "") -> Iterator[str]:
    more = f" {headers}" if headers else ""
    fixed = f'{more} hdr Cache-Control no-store hdr Vary Accept'
    html = f"content-type \"text/html; charset=utf-8\" file {PAGES}/{page}.html"
    json = f"content-type application/problem+json file {PAGES}/{page}.json"
    yield f"    http-request return status {status} {json}{fixed} if {condition} wants_json !wants_page"
    yield f"    http-request return status {status} {html}{fixed} if {condition}"


def _wants(settings: GatewaySettings) -> Iterator[str]:
    yield f"""\
    # Two gateways agree about a key that a client chose. A click on the button has a key of its page.
    acl has_key req.hdr(Idempotency-Key) -m found
    acl has_click req.body_param(key) -m reg ^[A-Za-z0-9_.:-]{{1,128}}$
    http-request set-var(txn.way) str(load) if claim
    http-request set-var(txn.way) str(click) if claim has_click
    http-request set-var(txn.way) str(key) if claim has_key
    http-request set-header Idempotency-Key {OWN_KEY}%[uuid()] if {{ var(txn.way) -m str load }}"""
    if settings.tls.acme:
        yield "    use_backend acme if { path_beg /.well-known/acme-challenge/ }"
    yield "    use_backend users if at_slot"
    yield "    use_backend by_%[var(txn.way)] if claim"
    yield "    default_backend status"


def _ways() -> Iterator[Iterator[str]]:
    """From stage to stage: the first with a 200 is the last. `balance first` goes by the servers' numbers."""
    yield _way("by_load", [])
    yield _way("by_click", ["clicked"])
    yield _way("by_key", ["keyed"])


def _way(name: str, before: list[str]) -> Iterator[str]:
    yield f"""\
backend {name}
    balance first
    option http-buffer-request
    option redispatch 1
    http-reuse never
    # 503: every host that was asked said no. 501: there was none to ask.
    retry-on 501 503 conn-failure
    retries {len(before) + 1}"""
    for stage in before:
        # Of weight 0: it is named for the first try, and is nobody's second choice.
        yield f"    use-server {stage} if TRUE"
        yield f"    server {stage} unix@{RUN}/{stage}.sock id 3 weight 0 send-proxy-v2"
    yield f"    server claims unix@{RUN}/claims.sock id 1 send-proxy-v2"
    yield f"    server {STATUS} unix@{STATUS_SOCKET} id 2"


def _stage(name: str, settings: GatewaySettings) -> Iterator[str]:
    yield f"""\
listen {name}
    bind unix@{RUN}/{name}.sock mode 600 accept-proxy
    log-format \"{_log_format('claim')}\"
    option httpchk GET /healthz
    option http-buffer-request
    # A new connection for each: what cannot be connected to has not heard the claim.
    http-reuse never
    srvtcpka-idle 2s
    srvtcpka-intvl 1s
    timeout connect 1s
    timeout server {settings.fleet.claim_timeout:.0f}s
    # Not response-timeout: a host that is slow may have a slot made. One that closes without an answer has died.
    retry-on 503 conn-failure empty-response
    retries {settings.fleet.retries}
    option redispatch 1
    http-request set-header X-Nbagent-Gateway 1"""
    keys = {"clicked": "req.body_param(key)", "keyed": "req.hdr(Idempotency-Key)"}
    if name in keys:
        yield f"    balance hash {keys[name]}"
        yield "    hash-type consistent"
        # Who gave a slot is remembered: a host that was full when a key came first may have room when it comes again.
        yield "    stick-table type string len 128 size 100k expire 1h"
        yield f"    stick on {keys[name]}"
    else:
        yield "    balance random(2)"
        yield f"    acl own_key req.hdr(Idempotency-Key) -m beg {OWN_KEY}"
        for stage, key in keys.items():
            yield f"    stick store-request {key} table {stage} unless own_key"
    yield from _servers(name, settings)
    # HAProxy 2.6 may close without a word when the last server goes between two tries. So there always is one, and
    # what it says is the way's to try again, not the stage's.
    yield f"    server {NOBODY} unix@{RUN}/nobody.sock backup"


def _users(settings: GatewaySettings) -> Iterator[str]:
    yield f"""\
backend {USERS}
    balance roundrobin
    option httpchk GET /healthz
    # At once to the status service when the host cannot be connected to; never a second time what was sent.
    retry-on conn-failure
    retries 1
    option redispatch 1"""
    if settings.fleet.srv:
        domain = settings.fleet.srv.split(".", 2)[2]
        yield f"""\
    # No table: the host's name is made of the label.
    http-request do-resolve(txn.host,dns) var(txn.label),concat(.{domain})
    http-request set-dst var(txn.host) if {{ var(txn.host) -m found }}
    use-server {ANY} if {{ var(txn.host) -m found }}
    server {ANY} 0.0.0.0:{FleetHostSettings().port} weight 0"""
    else:
        yield "    use-server %[var(txn.label)] if TRUE"
        yield from _servers(USERS, settings)
    # Twice, as HAProxy waits a second before it tries again in a backend with one server.
    yield f"    server {STATUS} unix@{STATUS_SOCKET} weight 1"
    yield f"    server {STATUS}_again unix@{STATUS_SOCKET} weight 1"


def _servers(backend: str, settings: GatewaySettings) -> Iterator[str]:
    fleet = settings.fleet
    if fleet.srv:
        agent = "" if backend == "keyed" else f" agent-check agent-inter 1s agent-port {FleetHostSettings().check_port}"
        weight = 10 if backend == "keyed" else 100
        yield (
            f"    server-template h 1-{fleet.srv_hosts} {fleet.srv} weight {weight} {_CHECK}{agent} "
            "resolvers dns resolve-opts ignore-weight init-addr none"
        )
        return
    for label in sorted(settings.hosts):
        if arguments := servers_of(label, settings.hosts[label]).get(backend):
            yield f"    server {label} {arguments}"


def _services(settings: GatewaySettings) -> Iterator[str]:
    yield f"""\
backend status
    # It restarts in a second, and its socket is systemd's: who comes meanwhile waits.
    timeout server 30s
    server {STATUS} unix@{STATUS_SOCKET}

frontend nobody
    bind unix@{RUN}/nobody.sock mode 600
    no log
    http-request return status 501

backend rates
    stick-table type ipv6 size 1m expire {2 * RATE_WINDOW_S}s store gpc0_rate({RATE_WINDOW_S}s)"""
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
    """An ACL of any length: HAProxy limits the words of a line."""
    texts = [str(ipaddress.ip_network(network)) for network in networks]
    for begin in range(0, len(texts), _WORDS_A_LINE):
        yield f"    acl {name} {fetch} {' '.join(texts[begin : begin + _WORDS_A_LINE])}"


def _log_format(kind: str) -> str:
    """Names and values. No query, where tokens are; no header of the client's."""
    host = "host=%s" if kind == "claim" else "backend=%b server=%s"
    return (
        f"{kind} client=%ci method=%HM path=%HPO version=%HV status=%ST bytes=%B {host} retries=%rc "
        "wait_ms=%TR connect_ms=%Tc answer_ms=%Tr total_ms=%Ta end=%tsc"
    )
