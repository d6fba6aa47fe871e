# SPDX-License-Identifier: BSD-3-Clause
"""The slots' resolver: settings of dnsmasq(8). Pure.

It forwards queries to the host's resolvers and does not serve the host's /etc/hosts. When an allow-list of names is
configured, it resolves only those, because a resolver that forwards any query for a slot is a channel to the outside.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from nbagent.core import paths

PATH = paths.DNS_CONFIG
HOSTS_OWN = Path("/etc/resolv.conf")
UNIT = "nbagent-dns.service"


def upstreams(text: str) -> list[str]:
    """The name servers in the text of a resolv.conf(5)."""
    lines = (line.split() for line in text.splitlines())
    return [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]


def render(address: str, names: Collection[str], servers: Collection[str], *, private: bool) -> str:
    """The text of dnsmasq's configuration. `servers` are the host's resolvers.

    `private` means that slots reach private ranges, so that names may resolve to addresses there. Without `names`
    dnsmasq reads the host's resolv.conf itself. With `names` it must not, because it would send queries for every
    name to the servers in that file.
    """
    lines = [
        f"listen-address={address}",
        "bind-dynamic",  # the address can be added after this service has started
        "no-hosts",
        "domain-needed",
        "bogus-priv",
        # A query without an answer is pending for 10 s, so that a slot can have 1,000 (rules.QUESTION_RATE).
        "dns-forward-max=10000",
    ]
    if not private:
        # The firewall refuses packets to private addresses anyway; this also keeps those addresses from the slots.
        lines.append("stop-dns-rebind")
    if names:
        # No cache, because only a response from a server adds its addresses to the sets answers4 and answers6.
        lines += ["cache-size=0", "no-resolv", "address=/#/"]
        for name in sorted(names):
            lines += [f"server=/{name}/{server}" for server in servers]
            lines.append(f"nftset=/{name}/4#inet#nbagent#answers4,6#inet#nbagent#answers6")
    return "\n".join(lines) + "\n"
