# SPDX-License-Identifier: BSD-3-Clause
"""The part of the router's nginx configuration that depends on nbagent.toml.

It belongs inside http{}: maps, the limits of an address, the landing page's upstream, and the proxies whose
X-Forwarded-For is trusted. packaging/router/start writes it when the router starts or reloads; the rest of
the configuration is packaging/router/nginx.conf. It depends neither on slots nor on host.label.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from nbagent.config.host_config import ApiSettings, HostConfig, LandingSettings, RouterSettings
from nbagent.config.schema import Network
from nbagent.core import paths

# A worker takes 7 MiB for its 16,384 connections. A page of JupyterLab has about three, and the router as many to its
# slot, so that eight workers have room for 20,000 pages, whose slots take 300 GiB at rest.
WORKERS_MAX = 8

# The login cookies of a slot, named in nbagent.zygote.notebook_server; \\1 is the slot.
LOGIN_COOKIES = (r"__Host-nbagent-\1", r"nbagent-\1")


def nginx(config: HostConfig) -> str:
    """The directives that packaging/router/nginx.conf includes, from [router], [landing] and [api]."""
    return "".join([
        *_trusted_peers(config.router),
        *_slot_hosts(config.router.domain),
        *_slot_cookies(config.router.cookies),
        _geo("$banned_address", config.landing.banned),
        *_landing(config.landing, config.router.domain, config.api),
    ])


def workers(processors: int) -> str:
    """The number of nginx's processes on a host: one for each processor, at most WORKERS_MAX."""
    return f"worker_processes {min(processors, WORKERS_MAX)};\n"


def _trusted_peers(router: RouterSettings) -> Iterator[str]:
    yield _geo("$peer $trusted_peer", router.trusted_proxies)
    # A connection of a proxy that names no client, such as a health check, is not counted.
    yield _geo("$client $is_proxy", router.trusted_proxies)
    yield f"limit_conn_zone $counted_client zone=clients:8m;\nlimit_conn clients {router.client_connections};\n"
    if router.trusted_proxies:
        yield from (f"set_real_ip_from {network};\n" for network in router.trusted_proxies)
        # The client is the last address that is not a trusted proxy, because a client can forge those before it.
        yield "real_ip_header X-Forwarded-For;\nreal_ip_recursive on;\n"


def _geo(variables: str, networks: tuple[Network, ...]) -> str:
    """A geo block whose variable is 1 for addresses in `networks` and 0 for all others."""
    return f"geo {variables} {{ default 0; " + "".join(f"{network} 1; " for network in networks) + "}\n"


def _landing(landing: LandingSettings, domain: str | None, api: ApiSettings) -> Iterator[str]:
    if landing.access == "off":
        yield "map $host $serves_landing { default 0; }\n"
    elif domain is None:
        yield "map $host $serves_landing { default 1; }\n"
    else:
        # Not at the host name of a slot, because the origin belongs to the slot's program.
        yield f'map $host $serves_landing {{ default 1; "~\\.{re.escape(domain)}$" 0; }}\n'
    # nginx refuses to reload a zone whose key has changed, so that a new key needs a new name of the zone.
    # The burst is the rate of a minute, because a class starts its notebooks at the same moment from one address.
    yield f"limit_req_zone $claim_key zone=claim_rate:8m rate={landing.rate}r/m;\n"
    yield f"limit_req zone=claim_rate burst={landing.rate} nodelay;\nlimit_req_status 429;\n"
    yield f"limit_req_zone $lend_key zone=lend_rate:8m rate={landing.rate}r/m;\n"
    yield f"limit_req zone=lend_rate burst={landing.rate} nodelay;\n"
    # The landing page has as many threads of its own.
    connections = api.workers * api.threads
    yield f"upstream landing {{ zone landing 64k; server unix:{paths.LANDING_SOCKET} max_conns={connections}; }}\n"


def _slot_hosts(domain: str | None) -> Iterator[str]:
    if domain is None:
        yield "map $host $host_matches { default 1; }\n"
        yield "map $slot $cookie_path { default /user/$slot/; }\n"
        yield 'map $host $loading_mode { default ""; }\n'
    else:
        yield f'map "$requested_slot $host" $host_matches {{ default 0; "~^(\\S+) \\1\\.{re.escape(domain)}$" 1; }}\n'
        yield "map $slot $cookie_path { default /; }\n"
        # The landing page at the parent domain has the browser prerender a page of a slot that is lent.
        yield 'map $http_sec_purpose $loading_mode { default ""; ~prerender credentialed-prerender; }\n'


def _slot_cookies(names: tuple[str, ...]) -> Iterator[str]:
    patterns = [*LOGIN_COOKIES, *(re.escape(name).replace(r"\*", "[^;=]*") for name in names)]
    for number, pattern in enumerate(patterns):
        cookie = rf"~^([^;]+);(?:.*;)? *({pattern}=[^;]*)"
        yield f'map "$slot;$http_cookie" $kept_cookie_{number} {{ default ""; "{cookie}" "; $2"; }}\n'
    kept_cookies = "".join(f"$kept_cookie_{number}" for number in range(len(patterns)))
    # A request of another origin's page is forwarded without cookies.
    yield f'map "$cross_origin{kept_cookies}" $slot_cookies {{ default ""; "~^; (.*)$" $1; }}\n'
