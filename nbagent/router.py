"""What the router has to know of the settings, as the part of nginx's configuration that says it.

Written when the router starts and when it reloads, by packaging/router/start; the rest of the
configuration is a file of the package. Nothing in it is about one slot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from nbagent.config import RouterSettings

# A slot's own login, as nbagent.zygote.notebook names it; \\1 is the slot.
LOGIN_COOKIES = (r"__Host-nbagent-\1", r"nbagent-\1")


def nginx(settings: RouterSettings) -> str:
    """The maps $at_home, $cookie_root and $own_cookies."""
    return "".join([*_at_home(settings.domain), *_own_cookies(settings.cookies)])


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
