# SPDX-License-Identifier: BSD-3-Clause
"""Changes of the host's network by other programs are undone, and cut no slot off."""

import time

from simulated_internet import (
    FAILS,
    OTHER4,
    PUBLIC4,
    PUBLIC6,
    RESTORED,
    connected,
    refused_at_once,
    remains,
    restart,
    sh,
)


def test_no_connection_is_lost_by_restarts_or_a_flushed_ruleset(slot):
    agent = slot.agent
    slot.kernel.run(f"long = socket.create_connection(({PUBLIC4!r}, 80), 8); long.recv(100)")
    echo = "(long.send(b'still'), long.recv(5).decode())[1]"
    restart(agent)
    assert slot.eval(echo) == "still"
    agent.run("systemctl", "restart", "nbagent.service", "nbagent-dns.service")
    agent.wait(lambda: agent.api.get("/healthz").status == 200, "the API")
    assert slot.eval(echo) == "still"
    agent.expect(RESTORED)
    agent.run("nft", "flush", "ruleset")
    agent.wait(lambda: "slots4" in (rules := agent.run("nft", "list", "ruleset")) and slot.interface in rules, "rules")
    assert connected(slot.reach(PUBLIC4, PUBLIC6)) and refused_at_once(slot.reach("10.1.2.3", "5.5.5.1"))
    assert slot.eval(echo) == "still"
    agent.wait(lambda: slot.eval("names('other.example')") == {"other.example": [OTHER4]}, "names")


# Changes of the table by another program; {element} is the element of a slot.
TABLE_CHANGES = (
    "flush chain inet nbagent outward",
    "delete element inet nbagent slots4 {element}",
    "flush set inet nbagent slots4; flush set inet nbagent slots6",
    "flush set inet nbagent refused4",
    "add element inet nbagent named4 {{ 10.0.0.0/8 }}",
    "insert rule inet nbagent outward accept",
    "flush set inet nbagent guarded",
    "flush chain inet nbagent departure; delete chain inet nbagent departure",
    """flush chain inet nbagent fragments; delete chain inet nbagent fragments
    add chain inet nbagent fragments {{ type filter hook prerouting priority 300; policy accept; }}""",
    "add table inet nbagent {{ flags dormant; }}",
    "delete table inet nbagent",
)


def table(agent):
    """The lines of the table, without the elements that packets add, in an order that is always the same."""
    return agent.run("sh", "-c", """
        nft -st list table inet nbagent
        for name in slots4 slots6 refused4 refused6 named4 named6 guarded; do
            nft list set inet nbagent $name | tr -d ' \t\n'; echo
        done 2>&1 | sort""", check=False).splitlines()


def test_changes_of_the_table_are_undone_within_seconds(slot):
    agent = slot.agent
    for pattern in (RESTORED, "slot network restored after a change by another program: element"):
        agent.expect(pattern)
    element = f'{{ "{slot.interface}" . {slot.addresses()[0]} }}'
    wanted = sorted(table(agent))
    for change in TABLE_CHANGES:
        agent.host.run(["nft", "-f", "-"], input=change.format(element=element))
        agent.wait(lambda: sorted(table(agent)) == wanted, f"repair after {change}", timeout=10)
        time.sleep(1.1)  # repairs of one second are done together
    assert connected(slot.reach(PUBLIC4, PUBLIC6)) and refused_at_once(slot.reach("10.1.2.3", "5.5.5.1"))
    assert agent.api.get("/stats").json()["faults"] == {}


def test_interfaces_are_removed_while_the_table_or_its_sets_are_missing(internet):
    """Between a change by another program and its repair; in a network namespace without the service."""
    for table in ("", "nft add table inet nbagent"):
        left = internet.run("unshare", "-n", "sh", "-ec", f"""
            ip link add nb-kept type veth peer name kept; ip link add nb-left type veth peer name left; {table}
            python3 -c 'from nbagent.network.netlink import HostNetwork; HostNetwork().sweep(["nb-kept"])'
            ip -br link""")
        assert "nb-kept" in left and "nb-left" not in left


def test_a_host_whose_rules_cannot_be_restored_says_so_until_they_are(slot):
    """Only the process that made a table with the flag `owner` may change it; the table ends with the process."""
    agent = slot.agent
    for pattern in (RESTORED, FAILS, "failed to set up the slot network: nft: "):
        agent.expect(pattern)
    taken = "delete table inet nbagent\nadd table inet nbagent { flags owner; }"
    agent.run("systemd-run", "-q", "--unit=owner", "sh", "-c", f"(printf '{taken}\\n'; sleep 600) | nft -i")
    try:
        agent.wait(lambda: "network" in agent.api.get("/stats").json()["faults"], "fault", timeout=15)
        assert agent.api.get("/readyz").status == 503 and "nft" in agent.api.get("/readyz").json()["detail"]
        assert int(agent.agent_check().removeprefix("ready ").removesuffix("%\n")) <= 20
    finally:
        agent.run("systemctl", "stop", "owner")
    agent.wait(lambda: agent.api.get("/readyz").status == 200, "repaired network", timeout=15)
    assert connected(slot.reach(PUBLIC4, PUBLIC6)) and refused_at_once(slot.reach("10.1.2.3"))


def test_elements_whose_deletion_fails_are_deleted_later(internet):
    internet.wait_warm()
    claim = internet.claim(network="internet")
    name = "nb-" + claim["slot"].rpartition("-")[2]
    internet.expect("slot network restored after a change by another program: element")
    pid = internet.run("systemctl", "show", "-P", "MainPID", "nbagent-network").strip()
    # The first requests of the removal to nftables fail.
    internet.run("systemd-run", "-q", "--unit=inject", "strace", "-qq", "-p", pid, "-o", "/dev/null",
                 "-e", "trace=sendmsg", "-e", "inject=sendmsg:error=ENOBUFS:when=1..4")
    try:
        internet.wait(lambda: "TracerPid:\t0\n" not in internet.run("cat", f"/proc/{pid}/status"), "strace")
        internet.release(claim["slot"])
    finally:
        internet.run("systemctl", "stop", "inject")
    internet.wait(lambda: name not in remains(internet), "deletion", timeout=10)


# For each change of the host by another program: the command, and a command that succeeds after the repair.
FORWARDING = "test $(cat /proc/sys/net/ipv4/conf/{nb}/forwarding)$(cat /proc/sys/net/ipv4/conf/uplink0/forwarding) = 11"
ROUTES = "ip route | grep -q 'dev {nb}' && ip -6 route | grep -q 'dev {nb}'"
CHANGES = {
    "a router for a time": ("sysctl -qw net.ipv4.ip_forward=1; sysctl -qw net.ipv4.ip_forward=0", FORWARDING),
    "forwarding of a slot": ("sysctl -qw net.ipv4.conf.{nb}.forwarding=0", FORWARDING),
    "forwarding of the uplink": ("sysctl -qw net.ipv4.conf.uplink0.forwarding=0", FORWARDING),
    "a router for IPv6": (
        "sysctl -qw net.ipv6.conf.all.forwarding=0; sysctl -qw net.ipv6.conf.all.forwarding=1", ROUTES,
    ),
    "no IPv6 for a time": (
        "sysctl -qw net.ipv6.conf.{nb}.disable_ipv6=1; sleep 1; sysctl -qw net.ipv6.conf.{nb}.disable_ipv6=0", ROUTES,
    ),
    "flags": ("ip link set {nb} down arp on", "ip link show {nb} | grep -q 'NOARP,UP'"),
    "routes": ("ip route flush dev {nb}; ip -6 route flush dev {nb}", ROUTES),
    "address": ("ip address delete 198.18.0.1/32 dev lo", "ip address show lo | grep -q 198.18.0.1"),
    "uplink": (
        "ip route delete default; sysctl -qw net.ipv4.conf.uplink0.forwarding=0; ip route add default via 5.5.5.2",
        FORWARDING,
    ),
}


def test_changes_of_the_hosts_settings_do_not_cut_a_slot_off(slot):
    agent = slot.agent
    agent.expect("slot network restored after a change by another program")
    for what, (change, repaired) in CHANGES.items():
        agent.run("sh", "-c", change.format(nb=slot.interface))
        agent.run("sh", "-c", f"until {repaired}; do sleep 0.2; done".format(nb=slot.interface), timeout=30)
        results = slot.reach(PUBLIC4, PUBLIC6)
        assert connected(results) and slot.eval("names('public.example')")["public.example"], (what, results)
        assert refused_at_once(slot.reach("10.1.2.3")), what
    # The same while the network service does not run.
    agent.run("sh", "-c", f"systemctl stop nbagent-network; {CHANGES['flags'][0]}".format(nb=slot.interface))
    agent.run("sh", "-c", f"{CHANGES['a router for a time'][0]}; systemctl start nbagent-network")
    assert connected(slot.reach(PUBLIC4, PUBLIC6))


def test_a_host_that_becomes_a_router_forwards_for_others_too(slot):
    """Docker sets net.ipv4.ip_forward=1; the packets of its containers must pass then, and only then."""
    guarded = "nft list set inet nbagent guarded | grep -q uplink0"
    assert sh(slot.agent, guarded)
    slot.agent.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    try:
        slot.agent.wait(lambda: not sh(slot.agent, guarded), "the end of the guard")
        assert connected(slot.reach(PUBLIC4))
    finally:
        slot.agent.expect("slot network restored after a change by another program")
        slot.agent.run("sysctl", "-qw", "net.ipv4.ip_forward=0")
    slot.agent.wait(lambda: sh(slot.agent, f"{guarded} && {FORWARDING.format(nb=slot.interface)}"), "the guard")
