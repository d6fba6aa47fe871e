# SPDX-License-Identifier: BSD-3-Clause
"""A slot with the network `internet` reaches public addresses only; a slot with `none` has loopback only.

The internet is a network namespace inside the test host with a server at public addresses, private addresses and
metadata addresses of clouds. The host reaches all of them, so when a slot does not, the firewall's rules are the cause.
"""

import json
import time

import pytest

import product
from notebook import Notebook

PUBLIC4, PUBLIC6 = "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"
OTHER4 = "151.101.0.223"
# Private, shared, link-local, documentation, reserved; the metadata services of AWS and most clouds, Alibaba, Azure.
REFUSED = (
    "10.1.2.3", "172.16.5.4", "192.168.7.7", "100.64.1.1", "169.254.7.7", "192.0.2.1", "198.51.100.1", "203.0.113.5",
    "198.19.1.1", "192.88.99.1", "169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192",
    "fd00:ec2::254", "fd12:3456::1", "2001:db8::1", "64:ff9b::a01:203", "2002:a01:203::1", "fec0::1",
)
# The host's addresses: its uplink, the slots' gateway, its IPv6 uplink.
HOST = ("5.5.5.1", "198.18.0.1", "2a00:1::1")
PORTS = (22, 8000, 9000, 9001, 7777)
SETTINGS = """
[network]
allow = ["none", "internet"]
up = "8Mbit"
down = "8Mbit"
connections = 40
connection_rate = 100
"""
DATAGRAMS = (PUBLIC4, "10.1.2.3", "169.254.169.254")
RATE = 1_000_000  # bytes a second
# Port 80 sends the peer's address and then echoes; 81 sends without end; 82 counts received bytes; 9 is a UDP echo.
SERVER = """
import asyncio
async def echo(reader, writer):
    writer.write((writer.get_extra_info("peername")[0] + "\\n").encode())
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
async def source(reader, writer):
    try:
        while True:
            writer.write(bytes(65536))
            await writer.drain()
    except OSError:
        writer.close()
async def sink(reader, writer):
    total = 0
    while data := await reader.read(1 << 20):
        total += len(data)
    writer.write(str(total).encode())
    writer.close()
seen = []
class Datagrams(asyncio.DatagramProtocol):
    def connection_made(self, transport): self.transport = transport
    def datagram_received(self, data, peer):
        if data == b"who":
            data = " ".join(seen).encode()
        else:
            seen.append(peer[0])
        self.transport.sendto(data, peer)
async def main():
    loop = asyncio.get_running_loop()
    for port, serve in ((80, echo), (81, source), (82, sink)):
        await asyncio.start_server(serve, ["0.0.0.0", "::"], port, backlog=1000)
    for address in DATAGRAMS:  # a socket for each, so that the response has the right source address
        await loop.create_datagram_endpoint(Datagrams, (address, 9))
    await asyncio.Event().wait()
asyncio.run(main())
"""
INTERNET = f"""
set -e
ip netns add internet
ip link add uplink0 type veth peer name wire netns internet
ip address add 5.5.5.1/24 dev uplink0; ip address add 2a00:1::1/64 dev uplink0 nodad; ip link set uplink0 up
ip -n internet address add 5.5.5.2/24 dev wire; ip -n internet address add 2a00:1::2/64 dev wire nodad
ip -n internet link set wire up; ip -n internet link set lo up
for address in {PUBLIC4} {PUBLIC6} {OTHER4} {" ".join(REFUSED)}; do
    case $address in *:*) bits=128 nodad=nodad ;; *) bits=32 nodad= ;; esac
    ip -n internet address add $address/$bits dev lo $nodad
done
ip route replace default via 5.5.5.2; ip -6 route replace default via 2a00:1::2
ip -n internet route add 198.18.0.0/16 via 5.5.5.1
ip -n internet -6 route add fd6e:6261:6765:6e74::/64 via 2a00:1::1
sysctl -qw net.ipv6.conf.all.forwarding=1
echo nameserver 5.5.5.2 > /etc/resolv.conf
systemd-run -q --unit=internet-dns ip netns exec internet dnsmasq -k --no-resolv --no-hosts --listen-address=5.5.5.2 \\
    --bind-interfaces --pid-file= --address=/public.example/{PUBLIC4} --address=/public.example/{PUBLIC6} \\
    --address=/other.example/{OTHER4} --address=/inside.example/10.1.2.3 --address=/meta.example/169.254.169.254 \\
    --address=/meta.example/fd00:ec2::254 --address=/mapped.example/::ffff:10.1.2.3
systemd-run -q --unit=internet-server ip netns exec internet python3 -c "$1"
systemd-run -q --unit=host-server python3 -m http.server 7777 --bind ::
"""
NO_INTERNET = """
systemctl stop internet-dns internet-server host-server
sysctl -qw net.ipv6.conf.all.forwarding=0
rm -f /etc/resolv.conf
ip link delete uplink0; ip netns delete internet
"""
# A web server with an archive, at every address of the internet.
SITE = """
mkdir -p /root/site/course; echo brought > /root/site/course/one.txt
tar -C /root/site -czf /root/site/course.tar.gz course
systemd-run -q --unit=internet-site ip netns exec internet python3 -um http.server 8080 --bind :: --directory /root/site
"""
# Functions that are defined in a slot's kernel.
TOOLS = """
import json, socket, time
def reach(address, port=80, timeout=8):
    began = time.monotonic()
    try:
        with socket.create_connection((address, port), timeout):
            result = "connected"
    except OSError as error:
        result = type(error).__name__ + " " + str(error)
    return result, time.monotonic() - began
def udp_echo(address, port=9, data=b"hello", source=None, timeout=4):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(timeout)
        try:
            if source:
                udp.bind((source, 0))
            udp.connect((address, port))
            udp.send(data)
            return udp.recv(65536).decode()
        except OSError as error:
            return type(error).__name__
def names(*given):
    found = {}
    for name in given:
        try:
            found[name] = sorted({info[4][0] for info in socket.getaddrinfo(name, 80)})
        except OSError as error:
            found[name] = []
    return found
"""


class Slot:
    """A claimed slot with one kernel, which tests the network from inside."""

    def __init__(self, agent, **options):
        self.agent, self.notebook = agent, agent.open(**options)
        self.id = self.notebook.slot
        self.kernel = self.notebook.kernel()
        assert self.kernel.run(TOOLS, timeout=120).status == "ok"

    @property
    def interface(self):
        return "nb-" + self.id.rpartition("-")[2]

    def addresses(self):
        return json.loads(self.agent.run("cat", f"/run/nbagent/slots/{self.id}/slot.json"))["addresses"]

    def eval(self, expression, timeout=180):
        result = self.kernel.run(f"print(json.dumps({expression}))", timeout)
        assert result.status == "ok", result
        return json.loads(result.stream)

    def reach(self, *addresses, port=80):
        """{address: (result, seconds)} of a connection to each."""
        return self.eval(f"{{a: reach(a, {port}) for a in {addresses!r}}}")

    def release(self):
        self.kernel.close()
        self.agent.release(self.id)


def configure(agent, settings):
    """Writes this module's settings, or removes them when empty, and reloads the agent."""
    path = "/etc/nbagent/conf.d/80-network.toml"
    if settings:
        agent.host.run(["tee", path], input=settings)
    else:
        agent.run("rm", "-f", path)
    agent.run("systemctl", "reload", "nbagent.service")


def reconfigure(slot, settings, name, expected):
    """Adds settings that change the resolver, and waits until a new one listens and a name resolves to `expected`."""
    before = resolver(slot.agent)
    configure(slot.agent, SETTINGS + settings)
    slot.agent.wait(lambda: resolver(slot.agent) not in ("", before), "a new resolver")
    slot.agent.wait(lambda: slot.eval(f"names({name!r})") == {name: expected}, f"{name} to be {expected}")


def resolver(agent):
    """The pid of the slots' resolver; "" while it does not listen."""
    return agent.run("sh", "-c", """
        pid=$(systemctl show -P MainPID nbagent-dns); ss -Hulnp "sport = :53" | grep -qF "pid=$pid," && echo "$pid"
        true""").strip()


def from_host(agent, *addresses, port=80):
    """As Slot.reach, from the host."""
    code = f"{TOOLS}\nprint(json.dumps({{a: reach(a, {port}) for a in {addresses!r}}}))"
    return json.loads(agent.run("python3", "-c", code))


def refused_at_once(results):
    """Whether every connection was refused, and none by a timeout."""
    return {a: what for a, (what, took_s) in results.items() if what.startswith("connected") or took_s > 4} == {}


def connected(results):
    return {what for what, _ in results.values()} == {"connected"}


@pytest.fixture(scope="module")
def internet(shared):
    """The host with the internet attached, and slots that may reach it."""
    shared.run("sh", "-c", INTERNET, "sh", SERVER.replace("DATAGRAMS", repr(DATAGRAMS)))
    configure(shared, SETTINGS)
    shared.wait(lambda: [s for s in shared.slots("warm") if "closed" in alias(shared, s["slot"])], "a slot with a link")
    shared.wait(lambda: connected(from_host(shared, PUBLIC4, PUBLIC6)), "the internet")
    yield shared
    for slot in shared.slots():
        shared.release(slot["slot"])
    shared.run("sh", "-c", NO_INTERNET)
    configure(shared, "")
    for slot in shared.slots():
        shared.release(slot["slot"])
    assert remains(shared) == ""


@pytest.fixture(scope="module")
def slot(internet):
    """A slot that reaches the internet; shared by the module, because a kernel takes seconds to start."""
    found = Slot(internet, network="internet")
    yield found
    found.release()


def alias(agent, slot):
    done = agent.host.run(["cat", f"/sys/class/net/nb-{slot.rpartition('-')[2]}/ifalias"], check=False)
    return done.stdout


def remains(agent):
    """The interfaces, routes and set elements of slots on the host."""
    return agent.run("sh", "-c", """
        ip -br link | grep '^nb-'; ip route | grep nb-; ip -6 route | grep nb-
        nft list table inet nbagent 2>/dev/null | grep '"nb-[0-9a-z]'
        true""")


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


# A host without a default route; PROXY, an address that no slot reaches otherwise, is routed.
PROXY, PROXY_PORT = "10.1.2.3", 3128
ONLY_BY_PROXY = f"""
set -e
mkdir /root/proxy; cd /root/proxy
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=public.example -addext subjectAltName=DNS:public.example \\
    -keyout key.pem -out cert.pem 2> /dev/null
cp cert.pem /usr/local/share/ca-certificates/test-site.crt; update-ca-certificates > /dev/null
mkdir -p site/course; echo brought > site/course/one.txt; tar -C site -czf site/course.tar.gz course
printf '%s\n' 'Listen {PROXY}' 'Port {PROXY_PORT}' 'LogLevel Connect' > tinyproxy.conf
ip route replace {PROXY}/32 via 5.5.5.2; ip route del default; ip -6 route del default
systemd-run -q --unit=internet-proxy ip netns exec internet tinyproxy -d -c /root/proxy/tinyproxy.conf
systemd-run -q --unit=internet-https ip netns exec internet python3 -uc "$1"
"""
# A web server with TLS on port 443 and one without on port 8080.
SECURE_SITE = """
import functools, http.server, ssl, threading
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="/root/proxy/site")
plain = http.server.ThreadingHTTPServer(("93.184.216.34", 8080), handler)
threading.Thread(target=plain.serve_forever).start()
server = http.server.ThreadingHTTPServer(("93.184.216.34", 443), handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/root/proxy/cert.pem", "/root/proxy/key.pem")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""
NOT_ONLY_BY_PROXY = f"""
systemctl stop internet-proxy internet-https
ip route del {PROXY}/32; ip route replace default via 5.5.5.2; ip -6 route replace default via 2a00:1::2
rm -rf /root/proxy /usr/local/share/ca-certificates/test-site.crt; update-ca-certificates --fresh > /dev/null
"""


def findings(agent):
    """The findings of nbagent doctor by name."""
    return {one["name"]: one for one in json.loads(agent.host.run(["nbagent", "doctor", "--json"], check=False).stdout)}


def test_slots_archives_and_imports_of_a_host_reach_the_internet_by_its_proxy_only(internet, packages, tmp_path):
    internet.expect(r"^nbagent-import-\w+\.service: Failed with result 'exit-code'")
    debs = product.debian_packages(internet.host, ("tinyproxy-bin",), tmp_path)
    internet.host.copy_in(debs, "/root/")
    internet.run("dpkg", "-i", *(f"/root/{deb.name}" for deb in debs))
    site = "https://public.example/"
    try:
        internet.run("sh", "-c", ONLY_BY_PROXY, "sh", SECURE_SITE)
        assert "no default route" in findings(internet)["network"]["found"]
        proxy = f'proxy = "{PROXY}:{PROXY_PORT}"\n[claims]\narchives = ["{site}", "http://public.example:8080/"]\n'
        configure(internet, SETTINGS + proxy)
        internet.wait(lambda: findings(internet)["proxy"]["status"] == "ok", "the proxy")
        found = findings(internet)
        assert found["network"]["found"] == f"slots may reach the internet by the proxy {PROXY}:{PROXY_PORT} only"
        assert f"status 200 for {site}" in found["proxy"]["found"], found["proxy"]
        # A warm slot has the variables of the time at which it started.
        for slot in internet.slots("warm"):
            internet.release(slot["slot"])
        internet.wait_warm()
        slot = Slot(internet, network="internet", archive=f"{site}course.tar.gz")
        assert slot.notebook.get("api/contents/course/one.txt")["content"] == "brought\n"
        # Only the proxy's port of its address, and nothing without it.
        assert connected(slot.reach(PROXY, port=PROXY_PORT))
        assert refused_at_once(slot.reach(PROXY)) and not connected(slot.reach(PUBLIC4))
        opened = "urllib.request.urlopen('http://public.example:8080/course/one.txt', timeout=20).read().decode()"
        secure = f"urllib.request.urlopen('{site}course/one.txt', timeout=20, context=unverified).read().decode()"
        imported = "import ssl, urllib.request; unverified = ssl._create_unverified_context()"
        assert slot.kernel.run(imported).status == "ok"
        assert slot.eval(opened) == slot.eval(secure) == "brought\n"
        slot.release()
        internet.wait_warm()
        plain = internet.open(network="internet", archive="http://public.example:8080/course.tar.gz")
        assert plain.get("api/contents/course/one.txt")["content"] == "brought\n"
        internet.release(plain.slot)
        registry = internet.host.run(
            ["nbagent", "image", "import", "--name", "far", "docker://public.example/team/far:1"], check=False
        )
        assert registry.returncode != 0

        def log():
            return internet.run("journalctl", "-u", "internet-proxy", "-o", "cat")

        # Of the doctor, of the first archive, of the kernel, and of the import.
        internet.wait(lambda: log().count("CONNECT public.example:443") >= 5, "the proxy's log")
        assert "GET http://public.example:8080/course.tar.gz" in log(), log()
        internet.run("systemctl", "stop", "internet-proxy")
        assert findings(internet)["proxy"]["status"] == "fail"
        internet.wait_warm()
        failed = internet.api.get(f"/claim?network=internet&archive={site}course.tar.gz")
        assert failed.status == 502 and f"by the proxy {PROXY}:{PROXY_PORT}" in failed.json()["detail"], failed.body
    finally:
        internet.run("sh", "-c", NOT_ONLY_BY_PROXY)
        configure(internet, SETTINGS)
        for slot in internet.slots("warm"):
            internet.release(slot["slot"])
        internet.run("dpkg", "--purge", *(deb.name.split("_")[0] for deb in debs))


ONLY_IPV6 = """
set -e
ip address del 5.5.5.1/24 dev uplink0
systemd-run -q --unit=internet-dns6 ip netns exec internet dnsmasq -k --no-resolv --no-hosts --bind-interfaces \\
    --listen-address=2a00:1::2 --pid-file= --address=/public.example/$1 --address=/public.example/$2
echo nameserver 2a00:1::2 > /etc/resolv.conf
test -z "$(ip -4 route show default)"
"""
NOT_ONLY_IPV6 = """
systemctl stop internet-dns6
ip address add 5.5.5.1/24 dev uplink0; ip route replace default via 5.5.5.2
echo nameserver 5.5.5.2 > /etc/resolv.conf
"""


def test_a_host_with_ipv6_only_serves_slots_and_doctor_finds_no_fault(internet, slot):
    before = findings(internet)
    try:
        internet.run("sh", "-c", ONLY_IPV6, "sh", PUBLIC4, PUBLIC6)
        found = findings(internet)
        worse = {name for name in found if found[name]["status"] not in ("ok", before[name]["status"])}
        assert worse == set() and found["network"]["status"] == "ok", (found, before)
        assert "over IPv6 only" in found["network"]["found"]
        internet.wait(lambda: slot.eval("names('public.example')")["public.example"], "names by IPv6")
        began = "socket.create_connection(('public.example', 80), 8).recv(100).decode()"
        assert slot.eval(began) == "2a00:1::1\n"
        # A new slot, by a host that has no route of IPv4, is complete as well.
        internet.wait_warm()
        fresh = Slot(internet, network="internet")
        assert connected(fresh.reach(PUBLIC6)) and refused_at_once(fresh.reach(PUBLIC4))
        fresh.release()
        internet.run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=0")
        assert "does not forward IPv6" in findings(internet)["network"]["found"]
    finally:
        internet.run("sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
        internet.run("sh", "-c", NOT_ONLY_IPV6)
    internet.wait(lambda: connected(slot.reach(PUBLIC4, PUBLIC6)), "IPv4 again")


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


RESTORED = "nftables table inet nbagent was changed by another program; restored"
FAILS = "network fails, so this host offers fewer slots"


def freeze(agent):
    """Stops the network service, so that it repairs nothing, until `restart`."""
    agent.expect(FAILS)
    agent.run("systemctl", "kill", "-s", "STOP", "nbagent-network.service")


def restart(agent):
    """Kills the network service and waits for its restart, which writes the rules again."""
    before = agent.run("systemctl", "show", "-P", "InvocationID", "nbagent-network.service")
    agent.expect(r"nbagent-network.service: (Main process exited|Failed with result)")
    agent.run("systemctl", "kill", "-s", "KILL", "nbagent-network.service")
    state = ["systemctl", "show", "-P", "InvocationID,ActiveState", "nbagent-network.service"]
    agent.wait(lambda: (now := agent.run(*state).split()) and "active" in now and before.strip() not in now, "restart")


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
        agent.wait(lambda: sorted(table(agent)) == wanted, f"repair after {change}")
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
        agent.wait(lambda: "network" in agent.api.get("/stats").json()["faults"], "fault")
        assert agent.api.get("/readyz").status == 503 and "nft" in agent.api.get("/readyz").json()["detail"]
        assert int(agent.agent_check().removeprefix("ready ").removesuffix("%\n")) <= 20
    finally:
        agent.run("systemctl", "stop", "owner")
    agent.wait(lambda: agent.api.get("/readyz").status == 200, "repaired network")
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
    internet.wait(lambda: name not in remains(internet), "deletion")


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


def sh(agent, command):
    """Whether a shell command succeeds on the host."""
    return agent.host.run(["sh", "-c", command], check=False).returncode == 0


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
