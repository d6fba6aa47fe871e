# SPDX-License-Identifier: BSD-3-Clause
"""A slot with the network `internet` reaches public addresses only; a slot with `none` has loopback only."""

import json
import time

from simulated_internet import (
    HOST,
    OTHER4,
    PORTS,
    PUBLIC4,
    PUBLIC6,
    RATE,
    REFUSED,
    SETTINGS,
    SITE,
    TOOLS,
    Slot,
    alias,
    configure,
    connected,
    freeze,
    from_host,
    reconfigure,
    refused_at_once,
    remains,
    restart,
)

from notebook import Notebook


def test_a_claim_for_a_network_that_is_not_allowed_names_the_allowed_ones(agent):
    response = agent.api.post("/claim", {"network": "internet"})
    assert response.status == 400 and response.json()["field"] == "network"
    assert '"none", from network.allow' in response.json()["expected"]
    assert agent.api.get("/claim?network=internet").status == 400
    # No slot has a network, so the network service was never started.
    assert agent.run("systemctl", "show", "-P", "ExecMainStartTimestampMonotonic", "nbagent-network").strip() == "0"
    assert remains(agent) == "" and "nbagent" not in agent.run("nft", "list", "tables")


def test_public_addresses_are_reached_and_names_resolved(slot):
    assert connected(slot.reach(PUBLIC4, PUBLIC6, OTHER4))
    assert slot.eval(f"udp_echo({PUBLIC4!r})") == "hello"
    assert slot.eval("names('public.example')") == {"public.example": [PUBLIC6, PUBLIC4]}
    # The servers see the host's address, because of masquerading.
    assert slot.eval(f"socket.create_connection(({PUBLIC4!r}, 80)).recv(100).decode()") == "5.5.5.1\n"
    assert slot.eval(f"socket.create_connection(({PUBLIC6!r}, 80)).recv(100).decode()") == "2a00:1::1\n"
    shown = slot.agent.api.get(f"/slots/{slot.id}").json()
    assert shown["network"] == "internet"


def test_private_reserved_and_metadata_addresses_are_refused(slot):
    assert connected(from_host(slot.agent, *REFUSED))  # the servers exist
    results = slot.reach(*REFUSED)
    assert refused_at_once(results), results
    assert slot.eval("[udp_echo(a) for a in ('10.1.2.3', '169.254.169.254')]") != ["hello", "hello"]
    # A private address of the operator's network is not resolved either.
    assert slot.eval("names('inside.example')") == {"inside.example": []}


def test_a_slot_reaches_only_the_resolver_of_the_host(slot):
    for port in PORTS:
        results = slot.reach(*HOST, "fd6e:6261:6765:6e74::1", port=port)
        assert refused_at_once(results), (port, results)
    assert connected(from_host(slot.agent, *HOST, port=7777))
    assert connected(slot.reach("198.18.0.1", port=53))
    assert refused_at_once(slot.reach("5.5.5.1", port=53))


def test_a_slot_is_not_reached_by_slots_the_host_or_the_internet(internet, slot):
    other = Slot(internet, network="internet")
    addresses = other.addresses()
    assert len(addresses) == 2
    server = "server = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True)"
    assert other.kernel.run(server).status == "ok"
    assert connected(other.reach(*addresses, port=8080))  # from the slot itself
    assert refused_at_once(slot.reach(*addresses, port=8080))
    code = f"{TOOLS}\nprint(json.dumps([reach(a, 8080, 1)[0] for a in {addresses!r}]))"
    assert "connected" not in internet.run("python3", "-c", code)
    assert "connected" not in internet.run("ip", "netns", "exec", "internet", "python3", "-c", code)
    resolver = f"{TOOLS}\nprint(reach('198.18.0.1', 53, 1)[0])"
    assert "connected" not in internet.run("ip", "netns", "exec", "internet", "python3", "-c", resolver)
    other.release()


def test_a_claim_without_a_network_removes_the_warm_slots_interface(internet):
    internet.wait_warm()
    plain = Slot(internet)
    assert plain.addresses()  # a warm slot has an interface until it is claimed
    names = "[line.partition(':')[0].strip() for line in open('/proc/net/dev').readlines()[2:]]"
    internet.wait(lambda: plain.eval(names) == ["lo"], "its removal")
    assert alias(internet, plain.id) == ""
    results = plain.reach(PUBLIC4, "198.18.0.1", "10.1.2.3")
    assert {what for what, _ in results.values()} == {"OSError [Errno 101] Network is unreachable"}
    plain.release()


def test_an_archive_of_a_claim_is_downloaded_by_the_slots_network(internet):
    internet.run("sh", "-c", SITE)
    sites = "http://public.example:8080/", "http://inside.example:8080/", "http://10.1.2.3:8080/"
    configure(internet, f"{SETTINGS}\n[claims]\narchives = {json.dumps(sites)}\n")
    public, inside, private = (f"/claim?archive={site}course.tar.gz&network=" for site in sites)
    try:
        internet.wait(lambda: connected(from_host(internet, PUBLIC4, "10.1.2.3", port=8080)), "the site")
        refused = internet.api.get(public + "none")
        assert refused.status == 400 and refused.json()["field"] == "network"
        assert refused.json()["expected"].startswith('"internet"')
        internet.wait_warm()
        claim = internet.api.get(public + "internet")
        assert claim.status == 200, claim.body
        notebook = Notebook(internet.host, claim.json())
        assert notebook.get("api/contents/course/one.txt")["content"] == "brought\n"
        # One request only: the slot made it, and the host none.
        def requests():
            return internet.run("journalctl", "-u", "internet-site", "-o", "cat").count("GET /course.tar.gz")

        internet.wait(requests, "the site's log")
        assert requests() == 1
        internet.release(notebook.slot)
        for url in (inside, private):
            internet.wait_warm()
            failed = internet.api.get(url + "internet")
            assert failed.status == 502 and failed.json()["type"] == "urn:nbagent:problem:archive-failed", failed.body
        assert internet.run("journalctl", "-u", "internet-site", "-o", "cat").count("GET /course.tar.gz") == 1
    finally:
        internet.run("sh", "-c", "systemctl stop internet-site; rm -r /root/site")
        configure(internet, SETTINGS)


def test_a_packet_with_a_forged_source_address_is_dropped(slot):
    # Needs root of the slot's namespaces, because a process of the slot cannot add an address.
    pid = slot.agent.processes(slot.id)[0]
    inside = ["nsenter", f"--target={pid}", "--net"]
    spoof = f"{TOOLS}\nprint(udp_echo({PUBLIC4!r}, source='198.18.255.9', timeout=1))"
    who = f"{TOOLS}\nprint(udp_echo({PUBLIC4!r}, data=b'who'))"
    slot.agent.run(*inside, "ip", "address", "add", "198.18.255.9/32", "dev", "net0")
    try:
        assert slot.agent.run(*inside, "python3", "-c", spoof).strip() == "TimeoutError"
        # Without the chain `arrival` the packet arrives, so that chain is what drops it.
        before = slot.agent.run("python3", "-c", who)
        freeze(slot.agent)
        slot.agent.run("nft", "flush", "chain", "inet", "nbagent", "arrival")
        slot.agent.run(*inside, "python3", "-c", spoof)
        assert len(slot.agent.run("python3", "-c", who).split()) == len(before.split()) + 1
    finally:
        slot.agent.run(*inside, "ip", "address", "delete", "198.18.255.9/32", "dev", "net0")
        restart(slot.agent)


def test_connections_succeed_without_the_rules(slot):
    """The rules are what refuses connections, so the tests above cannot pass by accident."""
    nft = ("nft", "flush", "chain", "inet", "nbagent")
    freeze(slot.agent)
    try:
        slot.agent.run(*nft, "outward")
        assert connected(slot.reach("10.1.2.3", "169.254.169.254", "fd00:ec2::254"))
        slot.agent.run(*nft, "input")
        assert connected(slot.reach(*HOST, port=7777))
    finally:
        restart(slot.agent)
    assert refused_at_once(slot.reach("10.1.2.3", "169.254.169.254", "fd00:ec2::254"))
    assert refused_at_once(slot.reach(*HOST, port=7777))


def test_the_number_and_rate_of_connections_are_limited(slot):
    opened = """
        held = []
        for _ in range(80):
            try:
                held.append(socket.create_connection(({!r}, 80), 8))
            except ConnectionRefusedError:
                break
        print(len(held))
        for one in held:
            one.close()
    """.replace("\n        ", "\n").format(PUBLIC4)
    assert 20 <= int(slot.kernel.run(opened, timeout=120).stream) <= 41
    slot.agent.wait(lambda: connected(slot.reach(PUBLIC4)), "a free connection")
    time.sleep(2)  # the token bucket fills: 200 connections at 100 a second
    hasty = """
        results = [reach({!r})[0] for _ in range(1500)]
        print(results.count("connected"), sum("refused" in one for one in results))
    """.replace("\n        ", "\n").format(PUBLIC4)
    good, refused = map(int, slot.kernel.run(hasty, timeout=120).stream.split())
    assert good >= 30 and refused > 0 and good + refused == 1500
    slot.agent.wait(lambda: connected(slot.reach(PUBLIC4)), "a token for a connection")
    time.sleep(2)  # one connection succeeds with a single token; later tests need a full bucket


def test_bandwidth_is_limited_in_both_directions(slot):
    down = f"""
began, total = time.monotonic(), 0
with socket.create_connection(({PUBLIC4!r}, 81), 8) as source:
    while total < 3 * {RATE}:
        total += len(source.recv(65536))
print(time.monotonic() - began)
"""
    up = f"""
began = time.monotonic()
with socket.create_connection(({PUBLIC4!r}, 82), 60) as sink:
    sink.sendall(bytes(3 * {RATE}))
    sink.shutdown(socket.SHUT_WR)
    assert int(sink.recv(100)) == 3 * {RATE}
print(time.monotonic() - began)
"""
    for code in (down, up):
        result = slot.kernel.run(code, timeout=120)
        assert result.status == "ok", result
        took_s = float(result.stream)
        # At most the rate plus the bucket; slower only when the machine is.
        assert 2.4 < took_s < 30, took_s


def test_only_and_also_settings_define_the_reachable_addresses(slot):
    reconfigure(slot, 'only = ["public.example", "203.0.113.0/24"]\n', "other.example", [])
    # The addresses of a name are reachable after it was resolved, and not before.
    assert refused_at_once(slot.reach(PUBLIC4, PUBLIC6, OTHER4))
    assert slot.eval("names('public.example', 'other.example', 'www.other.example')") == {
        "public.example": [PUBLIC6, PUBLIC4], "other.example": [], "www.other.example": [],
    }
    assert connected(slot.reach(PUBLIC4, PUBLIC6, "203.0.113.5"))
    assert refused_at_once(slot.reach(OTHER4, "10.1.2.3", "192.0.2.1"))
    reconfigure(slot, 'also = ["10.1.2.0/24"]\n', "inside.example", ["10.1.2.3"])
    assert connected(slot.reach(PUBLIC4, OTHER4, "10.1.2.3"))
    assert refused_at_once(slot.reach("203.0.113.5", "172.16.5.4"))
    reconfigure(slot, "", "inside.example", [])
    assert refused_at_once(slot.reach("10.1.2.3"))


def test_changes_of_the_hosts_resolvers_reach_the_slots(slot):
    """dnsmasq does not read resolv.conf itself if network.only has names."""
    agent = slot.agent
    reconfigure(slot, 'only = ["public.example"]\n', "public.example", [PUBLIC6, PUBLIC4])
    names = "names('public.example')['public.example']"
    try:
        agent.run("sh", "-c", "echo nameserver 5.5.5.9 > /etc/resolv.conf")
        agent.wait(lambda: "5.5.5.9" in agent.run("cat", "/run/nbagent/dns.conf"), "the new resolver")
    finally:
        agent.run("sh", "-c", "echo nameserver 5.5.5.2 > /etc/resolv.conf")
    agent.wait(lambda: slot.eval(names), "names again")
    reconfigure(slot, "", "other.example", [OTHER4])


def test_a_name_of_the_allow_list_opens_no_private_address(slot):
    """DNS rebinding: an allowed name resolves to a private address or a metadata service."""
    names = ("inside.example", "meta.example", "mapped.example")
    only = f"only = {json.dumps(['other.example', *names])}\n"
    reconfigure(slot, only, "other.example", [OTHER4])
    try:
        assert slot.eval(f"names(*{names!r})") == {name: [] for name in names}
        # An answer that the resolver did not drop would open no private address either.
        slot.agent.run("nft", "add", "element", "inet", "nbagent", "answers4", "{ 10.1.2.3, 169.254.169.254 }")
        slot.agent.run("nft", "add", "element", "inet", "nbagent", "answers6", "{ fd00:ec2::254 }")
        results = slot.reach("10.1.2.3", "169.254.169.254", "fd00:ec2::254")
        assert refused_at_once(results), results
        # The address of a name is reachable for a time after it was resolved.
        assert slot.eval("names('other.example')") == {"other.example": [OTHER4]}
        assert connected(slot.reach(OTHER4))
    finally:
        reconfigure(slot, "", "public.example", [PUBLIC6, PUBLIC4])


# Sends a datagram to each of 200 addresses in ranges that are on-link or multicast, by destination and by interface.
SCATTER = """
import struct
def scatter():
    ranges = ((10, "fe80::{:x}"), (10, "ff02::1:{:x}"), (10, "2606::{:x}"), (2, "224.1.2.{}"), (2, "239.0.0.{}"),
              (2, "169.254.3.{}"), (2, "198.18.7.{}"), (2, "8.8.4.{}"))
    index = {name: number for number, name in enumerate(("lo", "net0"), 1)}["net0"]
    for line in open("/proc/net/if_inet6"):
        if line.split()[-1] == "net0":
            index = int(line.split()[1], 16)
    for family, form in ranges:
        with socket.socket(family, socket.SOCK_DGRAM) as udp:
            for number in range(1, 201):
                to = form.format(number)
                for send in ((lambda: udp.sendto(b"x", (to, 9))),
                             (lambda: udp.sendto(b"x", (to, 9, 0, index)) if family == 10 else udp.sendmsg(
                                 [b"x"], [(0, 8, struct.pack("=i8x", index))], 0, (to, 9)))):
                    try:
                        send()
                    except OSError:
                        pass
    return index
"""


def neighbours(agent, slot):
    """The number of entries that a slot has in the kernel's neighbour tables."""
    inside = ["nsenter", f"--target={agent.processes(slot)[0]}", "--net", "ip"]
    return sum(len(agent.run(*inside, family, "neigh", "show", "nud", "all").splitlines()) for family in ("-4", "-6"))


def test_a_slot_does_not_fill_the_hosts_neighbour_tables(internet, slot):
    internet.wait_warm()
    plain = Slot(internet, network="none")
    for one in (slot, plain):
        assert one.kernel.run(SCATTER).status == "ok"
        before = neighbours(internet, one.id)
        one.eval("scatter()")
        # The gateways, the loopback addresses, and one for all link-local and multicast addresses.
        assert neighbours(internet, one.id) <= before + 6
    plain.release()
    # Without the routes to link-local and multicast addresses there is an entry for each address.
    inside = ["nsenter", f"--target={internet.processes(slot.id)[0]}", "--net", "ip"]
    for route in ("-4 route del 224.0.0.0/4", "-6 route del fe80::/10 table local",
                  "-6 route del ff00::/8 table local metric 1"):
        internet.run(*inside, *route.split())
    slot.eval("scatter()")
    assert neighbours(internet, slot.id) > 500


def reassembled(agent):
    """Fragments that the host began to reassemble, IPv4 and IPv6."""
    lines = agent.run("cat", "/proc/net/snmp", "/proc/net/snmp6").splitlines()
    names, values = (line.split() for line in lines if line.startswith("Ip:"))
    six = next(int(line.split()[1]) for line in lines if line.startswith("Ip6ReasmReqds"))
    return int(values[names.index("ReasmReqds")]) + six


def test_fragments_of_a_slot_are_dropped_before_they_are_reassembled(slot):
    send = f"[udp_echo(a, data=bytes(4000), timeout=1) for a in ({PUBLIC4!r}, {PUBLIC6!r})]"
    before = reassembled(slot.agent)
    assert slot.eval(send) == ["TimeoutError", "TimeoutError"]
    assert reassembled(slot.agent) == before
    try:
        freeze(slot.agent)
        slot.agent.run("nft", "flush", "chain", "inet", "nbagent", "fragments")
        slot.eval(send)
        assert reassembled(slot.agent) > before
    finally:
        restart(slot.agent)


def test_queries_of_a_slot_are_bounded(slot):
    """By rate, also from one source port; by entries in the host's connection tracking; by TCP connections."""
    query = bytes.fromhex("000101000001000000000000067075626c6963076578616d706c650000010001")
    flood = f"""
import select
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.connect(("198.18.0.1", 53))
one.setblocking(False)
began, answered = time.monotonic(), 0
while time.monotonic() < began + 3:
    for _ in range(20):
        try:
            one.send({query!r})
        except OSError:
            pass
    time.sleep(0.01)
    try:
        while one.recv(512):
            answered += 1
    except OSError:
        pass
streams = 0
held = []
for _ in range(6):
    try:
        held.append(socket.create_connection(("198.18.0.1", 53), 5))
        streams += 1
    except OSError:
        pass
for end in held:
    end.close()
print(json.dumps([answered, time.monotonic() - began, streams]))
"""
    time.sleep(2)  # the bucket fills
    answered, took_s, streams = json.loads(slot.kernel.run(flood, timeout=60).stream)
    assert 20 <= answered <= 200 + 100 * took_s + 50
    assert streams == 2
    ports = f"""
began = time.monotonic()
held = []
while time.monotonic() < began + 20:
    held.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    try:
        held[-1].sendto({query!r}, ("198.18.0.1", 53))
    except OSError:
        pass
    time.sleep(0.005)
for end in held:
    end.close()
"""
    assert slot.kernel.run(ports, timeout=60).status == "ok"
    # An entry for each of 1,000 queries and for its copy to the upstream server, and what is left of those above. By
    # the rate alone there would be 2,200 of each.
    assert 1000 <= int(slot.agent.run("cat", "/proc/sys/net/netfilter/nf_conntrack_count")) <= 2800
    slot.agent.wait(lambda: slot.eval("names('public.example')")["public.example"], "names again")


def test_an_image_may_have_a_network_of_its_own(internet):
    configure(internet, SETTINGS + '[images.minimal]\nnetwork = "internet"\n')
    claimed = internet.wait(lambda: (claim := internet.claim())["network"] == "internet" and claim, "the new setting")
    assert "internet" in alias(internet, claimed["slot"])
    assert internet.claim(network="none")["network"] == "none"


def test_a_released_slot_leaves_no_interface_route_or_set_element(internet):
    slot = Slot(internet, network="internet")
    assert connected(slot.reach(PUBLIC4)) and slot.eval("names('public.example')")
    found = remains(internet)
    assert found.count(slot.interface) >= 5
    slot.release()
    assert slot.interface not in remains(internet)
