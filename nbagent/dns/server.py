# SPDX-License-Identifier: BSD-3-Clause
"""The DNS server: reads the records of a host, and sends changes as DNS UPDATE messages (RFC 2136) with TSIG.

Every failure is a DnsFailed, whose text names the server, the cause and the remedy.
"""

from __future__ import annotations

import socket
from typing import NoReturn

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.rdatatype
import dns.tsig
import dns.update

from nbagent.config.schema import DnsServer
from nbagent.core.errors import NbagentError
from nbagent.dns.key import Key
from nbagent.dns.records import Change, Place, Seen

TIMEOUT_S = 4.0
_CHANGED = (dns.rcode.YXDOMAIN, dns.rcode.YXRRSET, dns.rcode.NXDOMAIN, dns.rcode.NXRRSET)


class DnsFailed(NbagentError):
    """The DNS server does not respond, or refuses a message."""

    code = "dns-failed"
    title = "DNS server failed"
    exit_status = 69  # EX_UNAVAILABLE of sysexits.h


class RecordsChanged(DnsFailed):
    """The records are not those that the change was decided on, so the server has changed nothing."""

    code = "dns-records-changed"
    title = "Records have changed"


class Server:
    """The server of a zone, and the key for its updates. Calls raise DnsFailed."""

    def __init__(self, server: DnsServer, zone: str, key: Key) -> None:
        self.server, self.zone, self.key = server, zone, key

    def local_address(self) -> str:
        """The address of this host from which it reaches the server."""
        family, address = self._address()
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, self.server.port))  # sends nothing
                return str(probe.getsockname()[0])
        except OSError as error:
            raise DnsFailed(f"DNS server {self.server}: {error.strerror}; check dns.server and the routes") from None

    def check_zone(self) -> None:
        """Raises DnsFailed unless the server is authoritative for the zone."""
        answer = self._query(self.zone, "SOA")
        if not answer.flags & dns.flags.AA or not answer.answer:
            raise DnsFailed(
                f"DNS server {self.server} is not authoritative for zone {self.zone}: dns.zone has to be the name of "
                "the zone itself, and dns.server its primary"
            )

    def seen(self, place: Place) -> Seen:
        """The records of a host."""
        addresses: set[str] = set()
        ttls: set[int] = set()
        for kind in ("A", "AAAA"):
            for rrset in self._rrsets(place.host, kind):
                addresses |= {rdata.to_text() for rdata in rrset}
                ttls.add(rrset.ttl)
        owners = {
            b"".join(rdata.strings).decode(errors="replace")
            for rrset in self._rrsets(place.host, "TXT") for rdata in rrset
        }
        offer = dns.rdata.from_text("IN", "SRV", place.offer)
        offered = any(rdata == offer for rrset in self._rrsets(place.service, "SRV") for rdata in rrset)
        ttl = ttls.pop() if len(ttls) == 1 else None
        return Seen(frozenset(addresses), frozenset(owners), offered, ttl)

    def apply(self, change: Change) -> None:
        """Send the change as one message. Raises RecordsChanged if a prerequisite is not met."""
        update = dns.update.UpdateMessage(self.zone)
        name, algorithm = dns.name.from_text(self.key.name), dns.name.from_text(self.key.algorithm)
        update.use_tsig({name: self.key.secret}, name, algorithm=algorithm)
        for step in change:
            owner = dns.name.from_text(step.name)
            data = [_rdata(step.kind, text) for text in step.data]
            if step.verb == "absent":
                update.absent(owner, step.kind)
            elif step.verb == "present":
                update.present(owner, *data)
            elif step.verb == "delete":
                update.delete(owner, *data) if data else update.delete(owner, step.kind)
            else:
                update.add(owner, step.ttl, *data)
        response = self._send(update)
        code = response.rcode()
        if code in _CHANGED:
            raise RecordsChanged(f"records at {change[0].name} have changed meanwhile, so nothing was changed")
        if code != dns.rcode.NOERROR:
            self._refused(code)

    def _rrsets(self, name: str, kind: str) -> list[dns.rrset.RRset]:
        wanted, owner = dns.rdatatype.from_text(kind), dns.name.from_text(name)
        return [rrset for rrset in self._query(name, kind).answer if rrset.rdtype == wanted and rrset.name == owner]

    def _query(self, name: str, kind: str) -> dns.message.Message:
        query = dns.message.make_query(name, kind)
        query.flags &= ~dns.flags.RD
        response = self._send(query)
        if response.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            code = dns.rcode.to_text(response.rcode())
            raise DnsFailed(
                f"DNS server {self.server} refuses queries for {name} ({code}): check dns.zone, and that the server "
                "responds to this host"
            )
        return response

    def _send(self, message: dns.message.Message) -> dns.message.Message:
        """TCP, so that a lost packet does not repeat an update whose prerequisites the first one has changed."""
        _, address = self._address()
        at = f"DNS server {self.server}"
        key = f"TSIG key {self.key.name}"
        try:
            return dns.query.tcp(message, address, TIMEOUT_S, self.server.port)
        except dns.tsig.PeerBadKey:
            raise DnsFailed(
                f"{at} has no {key} with {self.key.algorithm} for zone {self.zone}: add it to the server's keys and to "
                "the permissions of the zone, or correct /etc/nbagent/dns-key"
            ) from None
        except (dns.tsig.PeerBadSignature, dns.tsig.BadSignature):
            raise DnsFailed(
                f"{at} has another secret for {key}: correct /etc/nbagent/dns-key"
            ) from None
        except (dns.tsig.PeerBadTime, dns.tsig.BadTime):
            raise DnsFailed(
                f"the clocks of this host and of {at} differ by more than 5 minutes, so that {key} is refused: "
                "timedatectl set-ntp true, on both"
            ) from None
        except dns.tsig.PeerError as error:
            raise DnsFailed(f"{at} refuses {key}: {error}") from None
        except dns.exception.Timeout:
            raise DnsFailed(f"{at} has not responded within {TIMEOUT_S:g} s: check dns.server and firewalls") from None
        except (OSError, EOFError) as error:
            text = getattr(error, "strerror", None) or str(error) or "the connection was closed"
            raise DnsFailed(f"{at}: {text}; check that it runs and listens on TCP") from None
        except (dns.exception.DNSException, ValueError) as error:
            raise DnsFailed(f"{at} has sent a response that is not valid: {error}") from None

    def _refused(self, code: dns.rcode.Rcode) -> NoReturn:
        at, key = f"DNS server {self.server}", f"TSIG key {self.key.name}"
        texts = {
            dns.rcode.REFUSED: f"refuses the update: its policy for zone {self.zone} does not allow {key} to change "
            "A, AAAA, TXT and SRV records of these names",
            dns.rcode.NOTAUTH: f"is not the primary of zone {self.zone}, or does not accept {key}: check dns.server "
            "and dns.zone",
            dns.rcode.NOTZONE: f"has zone {self.zone}, but the names are outside of it: check dns.zone and dns.domain",
            dns.rcode.SERVFAIL: f"failed to change zone {self.zone}: see its log; it needs write access to the zone's "
            "files",
            dns.rcode.NOTIMP: "does not support updates (RFC 2136): check dns.server",
        }
        raise DnsFailed(f"{at} {texts.get(code, f'refuses the update with {dns.rcode.to_text(code)}')}")

    def _address(self) -> tuple[int, str]:
        try:
            found = socket.getaddrinfo(self.server.host, self.server.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise DnsFailed(f"DNS server {self.server} does not resolve: {error.strerror}; check dns.server") from None
        family, _, _, _, address = found[0]
        return family, str(address[0])


def _rdata(kind: str, text: str) -> dns.rdata.Rdata:
    return dns.rdata.from_text("IN", kind, f'"{text}"' if kind == "TXT" else text)
