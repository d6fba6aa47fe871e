# SPDX-License-Identifier: BSD-3-Clause
"""Hosts whose way out is an HTTP proxy, or IPv6 only."""

import json

from simulated_internet import (
    PUBLIC4,
    PUBLIC6,
    SETTINGS,
    Slot,
    configure,
    connected,
    refused_at_once,
)

import product

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
OWN_SERVER = """
import http.server, threading
class Mine(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"mine")
    def log_message(self, *_):
        pass
threading.Thread(target=http.server.HTTPServer(("", 9999), Mine).serve_forever, daemon=True).start()
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
        # Programs of the slot reach each other without the proxy, also by the slot's name and address.
        assert slot.kernel.run(OWN_SERVER).status == "ok"
        own = f"['localhost', socket.gethostname(), {slot.addresses()[0]!r}]"
        got = f"[urllib.request.urlopen(f'http://{{host}}:9999/', timeout=20).read().decode() for host in {own}]"
        assert slot.eval(got) == ["mine"] * 3
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
