# SPDX-License-Identifier: BSD-3-Clause
"""Certificates of a gateway from an ACME server, on test hosts: `make test-dns`.

Debian's certbot on the gateway gets them from Debian's Pebble, which validates by HTTP through the gateway and by DNS
with BIND. Renewals are those of Debian's certbot.service, while a user's requests and websocket go on.
"""

from __future__ import annotations

import base64
import os
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from servers import HOST_KEY, KEY, AcmeServer, DnsProgram, running

import product
from fleet import Fleet, gateway_address
from notebook import Notebook
from product import Api
from testhost_driver import Host

SITE = "nb.test"
# A name of the certificate that leads to the second gateway, on which no ACME client runs.
SECOND = f"gw1.{SITE}"
ACME_KEY = "acme"
SECRET = base64.b64encode(os.urandom(32)).decode()
CLIENT = f"{gateway_address(0)}:8402"
HTTPS_PORT = 443
APPLY = "nbagent gateway apply"
SETTINGS = "[slots]\ncapacity = 4\nmemory = \"512M\"\n[pool]\nwarm = 1\n"
ZONES = {
    SITE: (
        ("$TTL 60\n@ SOA ns hostmaster 1 3600 600 86400 5\n@ NS ns\nns A 10.77.0.254\n"
         f"@ A {gateway_address(0)}\ngw1 A {gateway_address(1)}\n* CNAME @\n_acme-challenge NS ns\n"), "",
    ),
    f"_acme-challenge.{SITE}": (
        f"$TTL 60\n@ SOA ns.{SITE}. hostmaster.{SITE}. 1 3600 600 86400 5\n@ NS ns.{SITE}.\n",
        f"update-policy {{ grant {ACME_KEY} zonesub TXT; }};",
    ),
}
SERVER_CERTIFICATE = """
mkdir -p /root/acme && cd /root/acme
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=acme -addext "subjectAltName=IP:10.77.0.254" \
    -keyout key.pem -out cert.pem
cp cert.pem /usr/local/share/ca-certificates/acme.crt && update-ca-certificates
"""


class TlsHost:
    """Connections to the gateway's port for HTTPS, whose certificate is verified for `name`."""

    def __init__(self, host: Host, root: str, name: str = SITE) -> None:
        self.host, self.name = host, name
        self.context = ssl.create_default_context(cadata=root)

    def connect(self, port: int) -> ssl.SSLSocket:
        return self.context.wrap_socket(self.host.connect(port), server_hostname=self.name)

    def serial(self) -> str:
        """The serial number of the certificate of a new connection."""
        with self.connect(HTTPS_PORT) as connection:
            return str(connection.getpeercert()["serialNumber"])


class Site:
    """Two gateways with one host, and the servers for ACME and DNS in their network."""

    def __init__(self, fleet: Fleet, dns: DnsProgram, acme: AcmeServer) -> None:
        self.fleet, self.dns, self.acme = fleet, dns, acme
        self.gateway = fleet.gateways[0]
        # Pebble makes a root certificate at its start.
        self.root = self.gateway.run(["curl", "-sS", acme.root_url]).stdout

    def tls(self, name: str = SITE) -> TlsHost:
        return TlsHost(self.gateway, self.root, name)

    def certbot(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs certbot for a new certificate."""
        return self.gateway.run(
            ["certbot", "certonly", "-n", "--agree-tos", "--register-unsafely-without-email",
             "--server", self.acme.url, "--deploy-hook", APPLY, *arguments], check=check, timeout=180,
        )

    def settings(self, text: str) -> None:
        self.gateway.run(["tee", "/etc/nbagent/gateway.d/60-tls.toml"], input=text)
        self.gateway.run(["nbagent", "gateway", "apply"])

    def use(self, name: str) -> None:
        self.settings(f'[tls]\nacme = "{CLIENT}"\ncertificates = ["/etc/letsencrypt/live/{name}"]\n')

    def due(self, name: str) -> None:
        """Makes the certificate due for a renewal, which certbot decides by the time that is left."""
        conf = f"/etc/letsencrypt/renewal/{name}.conf"
        edits = ("1i renew_before_expiry = 20 years", "/^renew_before_expiry/d")
        self.gateway.run(["sed", "-i", *(word for edit in edits for word in ("-e", edit)), conf])

    def spawn(self) -> Notebook:
        tls = self.tls()
        answer = Api(tls, HTTPS_PORT).post("/api/spawn")
        assert answer.status == 200, answer.body
        found = re.search(r"/user/([^/]+)/.*token=([^&]+)", answer.json()["url"])
        return Notebook(tls, {"slot": found[1], "token": found[2]}, HTTPS_PORT)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("acme")
    fleet = Fleet(f"c{os.getpid() % 100000}", ("a",), gateways=2)
    acme = None
    try:
        fleet.up(product.say, SETTINGS, "[landing]\nrate = 1000\n")
        gateway = fleet.gateways[0]
        debs = product.debian_packages(gateway, ("certbot", "python3-certbot-dns-rfc2136"), directory)
        gateway.copy_in(debs, "/root/")
        gateway.run(["dpkg", "-i", *(f"/root/{deb.name}" for deb in debs)], timeout=300)
        gateway.run(["sh", "-c", SERVER_CERTIFICATE])
        for name in ("key.pem", "cert.pem"):
            gateway.copy_out(f"/root/acme/{name}", directory / name)
        with running("bind", {KEY: SECRET, HOST_KEY: SECRET, ACME_KEY: SECRET}, fleet.lan, ZONES) as dns:
            acme = AcmeServer(fleet.lan, f"{dns.address}:{dns.port}", directory / "cert.pem", directory / "key.pem",
                              directory)
            acme.start()
            found = Site(fleet, dns, acme)
            for each in fleet.gateways:
                each.run(["tee", "/etc/nbagent/gateway.d/60-tls.toml"], input=f'[tls]\nacme = "{CLIENT}"\n')
                each.run(["nbagent", "gateway", "apply"])
            yield found
    finally:
        if acme is not None:
            acme.stop()
        fleet.down()


def credentials(site: Site, secret: str = SECRET) -> str:
    """The file for certbot's plugin for RFC 2136."""
    path = "/etc/letsencrypt/rfc2136.ini"
    site.gateway.run(["install", "-m", "0600", "/dev/stdin", path], input=(
        f"dns_rfc2136_server = {site.dns.address}\ndns_rfc2136_name = {ACME_KEY}\n"
        f"dns_rfc2136_secret = {secret}\ndns_rfc2136_algorithm = HMAC-SHA256\n"))
    return path


class User:
    """A user with requests, each by a connection of its own, and a cell whose output goes on."""

    ENDLESS = "import os, time\nn = 0\nwhile not os.path.exists('stop'):\n    print(n); n += 1; time.sleep(0.05)"

    def __init__(self, site: Site) -> None:
        self.site, self.notebook = site, site.spawn()
        self.kernel = self.notebook.kernel()
        self.failures: list[object] = []
        self.requests = 0
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self._request, daemon=True) for _ in range(2)]

    def _request(self) -> None:
        while not self.stopped.wait(0.02):
            self.requests += 1
            try:
                self.notebook.get("api/status")
            except (OSError, AssertionError) as error:
                self.failures.append(error)

    def during(self, act: Callable[[], object]) -> None:
        """Carries out `act` while requests and the cell's output go on, and checks that none is lost."""
        cell = self.kernel.send(self.ENDLESS)
        for thread in self.threads:
            thread.start()
        try:
            act()
            count = self.requests
            deadline_s = time.monotonic() + 60
            # Some more requests, to what serves now.
            while self.requests < count + 20 and time.monotonic() < deadline_s:
                time.sleep(0.05)
        finally:
            self.stopped.set()
            for thread in self.threads:
                thread.join(60)
        answer = self.notebook.router.call(
            "PUT", f"{self.notebook.base}api/contents/stop", {"type": "file", "format": "text", "content": ""},
            self.notebook.headers)
        assert answer.status == 201, answer.body
        numbers = [int(line) for line in self.kernel.result(cell).stream.split()]
        assert numbers == list(range(len(numbers))) and len(numbers) > 20
        assert not self.failures and self.requests > 20, (self.requests, self.failures)

    def end(self) -> None:
        self.kernel.close()
        self.site.fleet.hosts["a"].run(["nbagent", "release", self.notebook.slot])


@pytest.fixture
def user(site: Site) -> Iterator[User]:
    found = User(site)
    try:
        yield found
    finally:
        found.stopped.set()
        found.end()


def renew(site: Site, name: str) -> None:
    """As certbot.timer does."""
    before = site.tls().serial()
    site.due(name)
    site.gateway.run(["systemctl", "start", "certbot.service"], timeout=180)
    deadline_s = time.monotonic() + 20
    while site.tls().serial() == before:
        assert time.monotonic() < deadline_s, "the gateway still has the former certificate"
        time.sleep(0.1)


def test_a_certificate_by_http_through_each_gateway_and_a_cell_over_it(site: Site) -> None:
    """The name of the second gateway is validated through it, although certbot runs on the first."""
    address, port = CLIENT.split(":")
    site.certbot("--standalone", "--http-01-address", address, "--http-01-port", port, "-d", SITE, "-d", SECOND)
    site.use(SITE)
    notebook = site.spawn()
    assert notebook.run("print(6 * 7)").stream == "42\n"
    site.fleet.hosts["a"].run(["nbagent", "release", notebook.slot])


def test_a_renewal_by_http_loses_no_request_and_no_websocket(site: Site, user: User) -> None:
    """Port 80 redirects everything but the challenge by now."""
    user.during(lambda: renew(site, SITE))


def test_a_wrong_key_of_the_dns_changes_nothing(site: Site) -> None:
    before = site.tls().serial()
    wrong = credentials(site, base64.b64encode(bytes(32)).decode())
    done = site.certbot("--dns-rfc2136", "--dns-rfc2136-credentials", wrong, "-d", f"*.{SITE}", check=False)
    assert done.returncode != 0 and "signature" in done.stderr, done.stdout + done.stderr
    assert site.tls().serial() == before


def test_a_wildcard_by_dns_in_a_zone_of_the_challenge(site: Site) -> None:
    site.certbot("--dns-rfc2136", "--dns-rfc2136-credentials", credentials(site),
                 "--dns-rfc2136-propagation-seconds", "1", "--cert-name", "wild", "-d", SITE, "-d", f"*.{SITE}")
    with pytest.raises(ssl.SSLCertVerificationError):
        site.tls(f"assets.{SITE}").connect(HTTPS_PORT)
    site.use("wild")
    assert Api(site.tls(f"assets.{SITE}"), HTTPS_PORT).get("/").status == 200
    # The answers of the challenge are removed.
    assert site.dns.records("", "TXT", f"_acme-challenge.{SITE}") == set()


def test_a_renewal_of_the_wildcard_loses_no_request_and_no_websocket(site: Site, user: User) -> None:
    site.gateway.run(["certbot", "delete", "-n", "--cert-name", SITE])
    user.during(lambda: renew(site, "wild"))


def test_a_renewal_that_fails_leaves_the_certificate_and_the_gateway_as_they_are(site: Site, user: User) -> None:
    before = site.tls().serial()
    site.acme.stop()

    def fail() -> None:
        site.due("wild")
        done = site.gateway.run(["systemctl", "start", "certbot.service"], check=False, timeout=300)
        assert done.returncode != 0

    user.during(fail)
    assert site.tls().serial() == before
