"""The slots' resolver: settings of dnsmasq(8). Pure.

It asks whom the host asks and tells nothing of the host itself. Where only some names may be
reached, it knows no others: a resolver that asks the world on a slot's behalf is a way out, too.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from nbagent.core import paths

PATH = paths.DNS_CONFIG
HOSTS_OWN = Path("/etc/resolv.conf")
UNIT = "nbagent-dns.service"


def upstreams(text: str) -> list[str]:
    """The resolvers in the text of a resolv.conf(5)."""
    lines = (line.split() for line in text.splitlines())
    return [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]


def render(address: str, names: Collection[str], asked: Collection[str], *, private: bool) -> str:
    """The file. `asked` are the host's resolvers; `private`: private ranges are reached, so names may lead there.

    Without `names` dnsmasq follows the host's resolv.conf itself, with them it cannot: servers from there would be
    asked for every name.
    """
    lines = [
        f"listen-address={address}",
        "bind-dynamic",  # the address may come later than this service
        "no-hosts",
        "domain-needed",
        "bogus-priv",
        "dns-forward-max=1000",
    ]
    if not private:
        # A name that leads to a private address is refused at the packet, too; here its address is not even told.
        lines.append("stop-dns-rebind")
    if names:
        # Each answer that a slot gets also opens the way there, so none is given from memory.
        lines += ["cache-size=0", "no-resolv", "address=/#/"]
        for name in sorted(names):
            lines += [f"server=/{name}/{server}" for server in asked]
            lines.append(f"nftset=/{name}/4#inet#nbagent#answers4,6#inet#nbagent#answers6")
    return "\n".join(lines) + "\n"
