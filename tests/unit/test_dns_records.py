# SPDX-License-Identifier: BSD-3-Clause
"""The change that follows from a host's state and the records that exist; tests/names has real DNS servers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbagent.config import host_config
from nbagent.core.errors import ConfigError
from nbagent.dns import key
from nbagent.dns.records import (
    Agent,
    LabelTaken,
    Own,
    Place,
    Presence,
    PresenceRule,
    Seen,
    SilenceRule,
    Step,
    decide,
    is_owner_text,
    owner_text,
    permissions,
    remove,
)
from nbagent.gateway import settings as gateway_settings

PLACE = Place("example.org", "hosts.example.org", "c07")
MINE, OTHER = owner_text("a" * 32), owner_text("b" * 32)
HERE, THERE = frozenset(["10.1.0.7"]), frozenset(["10.1.0.8"])
OWN = Own(PLACE, HERE, MINE, 10)
PUBLISHED = Seen(HERE, frozenset([MINE]), True, 10)
HOST, SERVICE, OFFER = "c07.hosts.example.org", "_nbagent._tcp.hosts.example.org", "0 0 8000 c07.hosts.example.org."
ADD_OFFER = Step("add", SERVICE, "SRV", (OFFER,), 10)
DELETE_OFFER = Step("delete", SERVICE, "SRV", (OFFER,))


def verbs(change) -> list[str]:
    return [" ".join([step.verb, step.kind, *step.data]) for step in change]


def test_the_first_publication_needs_a_name_without_records() -> None:
    both = replace(OWN, addresses=HERE | {"2001:db8::7"})
    assert verbs(decide(both, Seen(), Presence.OFFERED, None)) == [
        "absent A", "absent AAAA", "absent TXT", "delete A", "delete AAAA", "delete TXT",
        "add A 10.1.0.7", "add AAAA 2001:db8::7", f"add TXT {MINE}", f"add SRV {OFFER}",
    ]


def test_nothing_follows_from_records_that_are_as_they_should_be() -> None:
    assert decide(OWN, PUBLISHED, Presence.OFFERED, HERE) == ()
    assert decide(OWN, replace(PUBLISHED, offered=False), Presence.REACHABLE, HERE) == ()
    assert decide(OWN, Seen(), Presence.REACHABLE, HERE) == ()
    assert decide(OWN, Seen(), Presence.GONE, HERE) == ()


def test_a_drain_removes_only_the_srv_record_and_its_end_adds_only_that() -> None:
    assert decide(OWN, PUBLISHED, Presence.REACHABLE, HERE)[-1] == DELETE_OFFER
    assert [s.verb for s in decide(OWN, PUBLISHED, Presence.REACHABLE, HERE)].count("delete") == 1
    back = decide(OWN, replace(PUBLISHED, offered=False), Presence.OFFERED, HERE)
    assert verbs(back) == ["present A 10.1.0.7", "absent AAAA", f"present TXT {MINE}", f"add SRV {OFFER}"]
    assert back[-1] == ADD_OFFER


def test_a_stop_removes_everything_that_the_host_has_published() -> None:
    assert verbs(decide(OWN, PUBLISHED, Presence.GONE, HERE)) == [
        "present A 10.1.0.7", "absent AAAA", f"present TXT {MINE}",
        "delete A", "delete AAAA", "delete TXT", f"delete SRV {OFFER}",
    ]


def test_another_address_or_time_to_live_replaces_the_records() -> None:
    moved = decide(replace(OWN, addresses=THERE), PUBLISHED, Presence.OFFERED, None)
    assert verbs(moved)[0] == "present A 10.1.0.7" and "add A 10.1.0.8" in verbs(moved)
    assert Step("add", HOST, "A", ("10.1.0.7",), 60) in decide(replace(OWN, ttl=60), PUBLISHED, Presence.OFFERED, HERE)


@pytest.mark.parametrize(("seen", "published", "text"), [
    (Seen(THERE, frozenset([OTHER]), True, 10), None, "belongs to another machine: give this host another host.label"),
    (Seen(frozenset(), frozenset([OTHER]), False, None), None, r"c07.hosts.example.org \(no address\) belongs to"),
    (Seen(THERE, frozenset(), False, 300), None, "was not published by nbagent"),
    (Seen(THERE, frozenset([MINE]), True, 10), HERE, "the same /etc/machine-id"),
    (Seen(THERE, frozenset([MINE, OTHER]), True, 10), HERE, "belongs to another machine"),
])
def test_a_label_of_another_machine_is_refused_and_never_withdrawn(
    seen: Seen, published: frozenset[str] | None, text: str
) -> None:
    with pytest.raises(LabelTaken, match=text):
        decide(OWN, seen, Presence.OFFERED, published)
    assert decide(OWN, seen, Presence.GONE, published) == decide(OWN, seen, Presence.REACHABLE, published) == ()


@pytest.mark.parametrize("seen", [
    Seen(HERE, frozenset([OTHER]), True, 10), Seen(HERE, frozenset(), False, 300),
    Seen(THERE, frozenset([MINE]), True, 10), Seen(frozenset(), frozenset([MINE]), True, None),
], ids=["installed again", "by hand", "another address", "a part"])
def test_a_name_with_this_address_or_owner_is_taken_over(seen: Seen) -> None:
    change = decide(OWN, seen, Presence.OFFERED, None)
    assert {"add A 10.1.0.7", f"add TXT {MINE}"} <= set(verbs(change))
    assert [step.verb for step in change[:3]].count("present") >= 1


def test_a_gateway_removes_what_it_has_seen_only() -> None:
    assert tuple(remove(PLACE, Seen())) == ()
    assert verbs(remove(PLACE, PUBLISHED))[:3] == ["present A 10.1.0.7", "absent AAAA", f"present TXT {MINE}"]


def test_the_owner_does_not_show_the_id_of_the_machine() -> None:
    assert owner_text("a" * 32 + "\n") == MINE != OTHER
    assert is_owner_text(MINE) and not is_owner_text("v=spf1 -all") and "aaaa" not in MINE.partition("=")[2]


def test_the_check_of_permissions_deletes_records_that_no_host_has() -> None:
    assert {step.verb for step in permissions(PLACE)} == {"delete"} and all(step.data for step in permissions(PLACE))
    assert {step.kind for step in permissions(PLACE)} == {"A", "AAAA", "TXT", "SRV"}


def test_a_drain_takes_effect_at_once_and_a_failure_after_the_time_of_a_restart() -> None:
    rule = PresenceRule(10)
    assert rule.update(Agent.FAILING, 0) is None  # a boot: the records stay as they are
    assert rule.update(Agent.READY, 5) is Presence.OFFERED
    assert rule.update(Agent.DRAINING, 6) is Presence.REACHABLE
    assert rule.update(Agent.READY, 7) is Presence.OFFERED
    assert rule.update(Agent.FAILING, 8) is rule.update(Agent.FAILING, 17) is Presence.OFFERED
    assert rule.update(Agent.READY, 18) is rule.update(Agent.FAILING, 19) is Presence.OFFERED
    assert rule.update(Agent.FAILING, 29) is Presence.REACHABLE


def test_a_host_is_due_after_a_silence_without_a_break() -> None:
    rule = SilenceRule(300)
    assert rule.due({"a": True, "b": False}, 0) == rule.due({"a": True, "b": False}, 299) == []
    assert rule.due({"a": True, "b": False}, 300) == ["a"]
    rule.removed("a")
    assert rule.due({"a": True, "b": False}, 301) == []
    assert rule.due({"a": False, "b": False}, 500) == rule.due({"a": True, "b": False}, 602) == []
    rule.forget()
    assert rule.due({"a": True, "b": False}, 900) == []


def test_a_gateway_without_network_removes_nothing() -> None:
    rule = SilenceRule(300)
    down = {"a": True, "b": True, "c": False}
    assert rule.due(down, 0) == rule.due(down, 400) == [] and rule.kept == ["a", "b"]
    assert rule.due({"a": True, "b": True, "c": False, "d": False}, 401) == ["a", "b"] and rule.kept == []
    alone = SilenceRule(300)
    assert alone.due({"a": True}, 0) == alone.due({"a": True}, 400) == []


BIND_KEY = 'key "tsig-key" {\n\talgorithm hmac-sha256;\n\tsecret "c2VjcmV0";\n};\n'
KNOT_KEY = "# hmac-sha512:k.example.:c2VjcmV0\nkey:\n  - id: k.example.\n    algorithm: hmac-sha512\n"


@pytest.mark.parametrize(("text", "expected"), [
    (BIND_KEY, ("tsig-key", "hmac-sha256")), (KNOT_KEY, ("k.example", "hmac-sha512")),
    ("hmac-sha256:c07:c2VjcmV0", ("c07", "hmac-sha256")),
])
def test_a_key_has_the_form_of_the_servers_tools(text: str, expected: tuple[str, str]) -> None:
    found = key.parse(text, "dns-key")
    assert (found.name, found.algorithm) == expected and found.secret == b"secret" and "secret" not in repr(found)


@pytest.mark.parametrize(("text", "message"), [
    ("c2VjcmV0", "TSIG key dns-key: expected the output of tsig-keygen"),
    ("hmac-md5:c07:c2VjcmV0", "TSIG key dns-key: algorithm: expected one of hmac-sha224"),
    (BIND_KEY.replace("c2VjcmV0", "c2Vj*"), "TSIG key dns-key: secret: expected base64"),
])
def test_a_key_that_is_not_valid_is_refused_without_its_text(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        key.parse(text, "dns-key")
    assert "c2Vj" not in str(raised.value)


def test_an_absent_key_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="absent-key: No such file"):
        key.read(tmp_path / "absent-key")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="empty or absent; expected the output of tsig-keygen"):
        key.read(tmp_path / "empty")


@pytest.mark.parametrize(("server", "expected"), [
    ("10.1.0.53", "10.1.0.53"), ("[2001:DB8::53]:53", "[2001:db8::53]"), ("ns1.example.org:5353",) * 2,
])
def test_a_server_is_an_address_or_a_name_with_or_without_a_port(server: str, expected: str) -> None:
    found = host_config.parse({"dns": {"server": server, "zone": "example.org"}})
    assert str(found.dns.server) == expected and found.dns.domain is None


@pytest.mark.parametrize(("dns", "message"), [
    ({"server": "10.1.0.300", "zone": "example.org"}, "dns.server: expected .none. or an address or a name"),
    ({"server": "10.1.0.53:0", "zone": "example.org"}, "dns.server: .*with a port from 1 to 65535"),
    ({"server": "10.1.0.53"}, "dns.zone: expected a DNS zone, because dns.server is set"),
    ({"server": "10.1.0.53", "zone": "example.org", "domain": "example.net"}, "dns.domain: expected dns.zone, example"),
    ({"server": "10.1.0.53", "zone": "example.org", "domain": "anexample.org"}, "dns.domain: expected dns.zone"),
    ({"ttl": "2h"}, "dns.ttl: expected a time from 1s to 1h"),
    ({"addresses": ["c07"]}, "dns.addresses: expected .auto. or a list of IP addresses"),
    ({"zonne": "example.org"}, 'unknown setting dns.zonne; did you mean "zone"'),
])
def test_a_wrong_setting_of_a_host_is_named(dns: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        host_config.parse({"dns": dns})


@pytest.mark.parametrize(("document", "message"), [
    ({"dns": {"server": "10.1.0.53", "zone": "example.org"}}, "fleet.srv: expected _nbagent._tcp.DOMAIN"),
    ({"dns": {"server": "10.1.0.53"}, "fleet": {"srv": "_nbagent._tcp.example.org"}}, "dns.zone: expected the zone of"),
    ({"dns": {"server": "10.1.0.53", "zone": "example.net"}, "fleet": {"srv": "_nbagent._tcp.example.org"}},
     "dns.zone: expected the zone of _nbagent._tcp.example.org"),
])
def test_a_wrong_setting_of_a_gateway_is_named(document: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gateway_settings.parse(document)
