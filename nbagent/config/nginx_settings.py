"""What the router has to know of the settings, as the part of nginx's configuration that says it.

Inside http{}: maps, the landing page's upstream, and who is believed about whose request it is.

Written when the router starts and when it reloads, by packaging/router/start; the rest of the
configuration is a file of the package. Nothing in it is about one slot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from nbagent.config.host_config import ApiSettings, HostConfig, LandingSettings, RouterSettings
from nbagent.config.schema import Network
from nbagent.core import paths

# A slot's own login, as nbagent.zygote.notebook_server names it; \\1 is the slot.
LOGIN_COOKIES = (r"__Host-nbagent-\1", r"nbagent-\1")


def nginx(config: HostConfig) -> str:
    """The maps $at_home, $cookie_root, $own_cookies, $listed, $trusted, $at_landing, zone and upstream of landing."""
    return "".join([
        *_clients(config.router),
        *_at_home(config.router.domain),
        *_own_cookies(config.router.cookies),
        *_banned(config.landing.banned),
        *_landing(config.landing, config.router.domain, config.api),
    ])


def _clients(router: RouterSettings) -> Iterator[str]:
    yield "geo $peer $trusted { default 0; " + "".join(f"{network} 1; " for network in router.trusted_proxies) + "}\n"
    if router.trusted_proxies:
        yield from (f"set_real_ip_from {network};\n" for network in router.trusted_proxies)
        # From the last that is none of them: what stands before that, the client wrote itself.
        yield "real_ip_header X-Forwarded-For;\nreal_ip_recursive on;\n"


def _banned(networks: tuple[Network, ...]) -> Iterator[str]:
    yield "geo $listed { default 0; " + "".join(f"{network} 1; " for network in networks) + "}\n"


def _landing(landing: LandingSettings, domain: str | None, api: ApiSettings) -> Iterator[str]:
    if landing.access == "off":
        yield "map $host $at_landing { default 0; }\n"
    elif domain is None:
        yield "map $host $at_landing { default 1; }\n"
    else:
        # The name of a slot is an origin of its program's, where a page of ours has nothing to say.
        yield f'map $host $at_landing {{ default 1; "~\\.{re.escape(domain)}$" 0; }}\n'
    # A minute's worth at once: a class comes by one address, and all of it at the same moment.
    yield f"limit_req_zone $claimant zone=claims:8m rate={landing.rate}r/m;\n"
    yield f"limit_req zone=claims burst={landing.rate} nodelay;\nlimit_req_status 429;\n"
    # The rest of the API's threads is for those who call it by its own port.
    connections = max(1, api.workers * api.threads * 3 // 4)
    yield f"upstream landing {{ zone landing 64k; server unix:{paths.LANDING_SOCKET} max_conns={connections}; }}\n"


def _at_home(domain: str | None) -> Iterator[str]:
    if domain is None:
        yield "map $host $at_home { default 1; }\n"
        yield "map $slot $cookie_root { default /user/$slot/; }\n"
    else:
        yield f'map "$asked $host" $at_home {{ default 0; "~^(\\S+) \\1\\.{re.escape(domain)}$" 1; }}\n'
        yield "map $slot $cookie_root { default /; }\n"


def _own_cookies(names: tuple[str, ...]) -> Iterator[str]:
    patterns = [*LOGIN_COOKIES, *(re.escape(name).replace(r"\*", "[^;=]*") for name in names)]
    for number, pattern in enumerate(patterns):
        cookie = rf"~^([^;]+);(?:.*;)? *({pattern}=[^;]*)"
        yield f'map "$slot;$http_cookie" $kept_{number} {{ default ""; "{cookie}" "; $2"; }}\n'
    kept = "".join(f"$kept_{number}" for number in range(len(patterns)))
    # A request that another origin's page made has none.
    yield f'map "$stranger{kept}" $own_cookies {{ default ""; "~^; (.*)$" $1; }}\n'
