# SPDX-License-Identifier: BSD-3-Clause
"""The internet for slots of a test host, and a claimed slot that tries it.

It is a network namespace inside the test host with a server at public addresses, private addresses and metadata
addresses of clouds. The host reaches all of them, so when a slot does not, the firewall's rules are the cause.
"""

import json

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
RESTORED = "nftables table inet nbagent was changed by another program; restored"
FAILS = "network fails, so this host offers fewer slots"
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


def alias(agent, slot):
    done = agent.host.run(["cat", f"/sys/class/net/nb-{slot.rpartition('-')[2]}/ifalias"], check=False)
    return done.stdout


def remains(agent):
    """The interfaces, routes and set elements of slots on the host."""
    return agent.run("sh", "-c", """
        ip -br link | grep '^nb-'; ip route | grep nb-; ip -6 route | grep nb-
        nft list table inet nbagent 2>/dev/null | grep '"nb-[0-9a-z]'
        true""")


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


def sh(agent, command):
    """Whether a shell command succeeds on the host."""
    return agent.host.run(["sh", "-c", command], check=False).returncode == 0


def attached(shared):
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
