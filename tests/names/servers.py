# SPDX-License-Identifier: BSD-3-Clause
"""BIND, Knot and Pebble of Debian on loopback or in the network of test hosts.

The DNS servers have a zone that accepts updates by a TSIG key; Pebble is Let's Encrypt's ACME server for tests.

The packages are unpacked into the cache and not installed, because they would start services.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import dns.message
import dns.query

from testhost_driver import netns, rootfs
from testhost_driver.lan import Lan

PACKAGES = ("bind9", "bind9-utils", "knot", "pebble")
CACHE = rootfs.cache()
ZONE = "hosts.test"
KEY = "hosts"
# May change the records of one host only.
HOST_KEY = "c07"
# Known to the server, without permission.
OTHER_KEY = "other"
ZONE_FILE = """\
$TTL 300
@ SOA ns hostmaster 1 3600 600 86400 5
@ NS ns
ns A 127.0.0.1
static A 192.0.2.99
"""
BIND_CONFIG = """\
options {{
    directory "{directory}"; listen-on port {port} {{ {address}; }}; listen-on-v6 {{ none; }};
    pid-file "{directory}/pid"; recursion no; session-keyfile "{directory}/session"; dnssec-validation no;
}};
controls {{ }};
{keys}
zone "{zone}" {{
    type primary; file "{directory}/zone";
    update-policy {{
        grant {key} zonesub A AAAA TXT SRV;
        grant {host_key} name {host_key}.{zone} A AAAA TXT; grant {host_key} name _nbagent._tcp.{zone} SRV;
    }};
}};
zone "closed.test" {{ type primary; file "{directory}/closed"; }};
"""
BIND_ZONE = 'zone "{name}" {{ type primary; file "{directory}/{name}"; {policy} }};\n'
ACME_PORT, ACME_MANAGEMENT_PORT = 14000, 15000
KNOT_CONFIG = """\
server:
    listen: {address}@{port}
    rundir: {directory}
database:
    storage: {directory}
log:
  - target: stderr
    any: info
{keys}
acl:
  - id: update
    action: update
    key: {key}
    update-type: [A, AAAA, TXT, SRV]
  - id: host
    action: update
    key: {host_key}
    update-owner: name
    update-owner-match: equal
    update-owner-name: [{host_key}, _nbagent._tcp]
    update-type: [A, AAAA, TXT, SRV]
zone:
  - domain: {zone}
    storage: {directory}
    file: zone
    acl: [update, host]
  - domain: closed.test
    storage: {directory}
    file: closed
"""


def programs() -> Path:
    """The directory with the unpacked packages and the libraries that this machine lacks."""
    listed = subprocess.run(["apt-cache", "show", "--no-all-versions", *PACKAGES], check=True, stdout=subprocess.PIPE)
    kept = CACHE / f"dns-{hashlib.sha256(listed.stdout).hexdigest()[:16]}"
    if not kept.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".dns-", dir=CACHE) as made:
            directory = Path(made)
            (directory / "debs/partial").mkdir(parents=True)
            subprocess.run(
                ["apt-get", "-q", "-y", "--no-install-recommends", "--download-only", "--reinstall",
                 f"-oDir::Cache::archives={directory}/debs", "install", *PACKAGES],
                check=True, capture_output=True,
            )
            for package in (directory / "debs").glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", package, directory / "tree"], check=True)
            # Another run may have been faster.
            with contextlib.suppress(OSError):
                (directory / "tree").rename(kept)
    return kept


class DnsProgram:
    """A DNS server with ZONE, and with closed.test, which accepts no update; in the network `lan`, or on loopback.

    BIND has also `zones`: by its name, the records and the update policy of each.
    """

    def __init__(
        self, kind: str, tree: Path, directory: Path, keys: dict[str, str], lan: Lan | None,
        zones: Mapping[str, tuple[str, str]],
    ) -> None:
        self.kind, self.tree, self.directory, self.keys, self.lan = kind, tree, directory, keys, lan
        self.address, self.port = (lan.address, 53) if lan else ("127.0.0.1", _free_port())
        self.process: subprocess.Popen[bytes] | None = None
        (directory / "zone").write_text(ZONE_FILE)
        (directory / "closed").write_text(ZONE_FILE)
        shown = {"directory": directory, "address": self.address, "port": self.port, "zone": ZONE, "key": KEY,
                 "host_key": HOST_KEY}
        self.config = directory / "config"
        text = (BIND_CONFIG if kind == "bind" else KNOT_CONFIG).format(**shown, keys=self._keys())
        for name, (records, policy) in zones.items():
            (directory / name).write_text(records)
            text += BIND_ZONE.format(directory=directory, name=name, policy=policy)
        self.config.write_text(text)

    def _keys(self) -> str:
        if self.kind == "bind":
            return "\n".join(
                f'key "{name}" {{ algorithm hmac-sha256; secret "{secret}"; }};' for name, secret in self.keys.items()
            )
        return "key:\n" + "\n".join(
            f"  - id: {name}\n    algorithm: hmac-sha256\n    secret: {secret}" for name, secret in self.keys.items()
        )

    def start(self) -> None:
        library = str(self.tree / "usr/lib" / _triplet())
        inside = _inside(self.lan) if self.lan else []
        command, ready = (
            ([self.tree / "usr/sbin/named", "-f", "-g", "-c", self.config], "running\n") if self.kind == "bind"
            else ([self.tree / "usr/sbin/knotd", "-c", self.config], "server started")
        )
        log = self.directory / "log"
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*inside, *command], env={**os.environ, "LD_LIBRARY_PATH": library}, stdout=output, stderr=output,
                cwd=self.directory,
            )
        deadline_s = time.monotonic() + 30
        while ready not in log.read_text():
            assert time.monotonic() < deadline_s and self.process.poll() is None, log.read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)
            self.process = None

    def query(self, name: str, kind: str, zone: str = ZONE) -> dns.message.Message:
        """The response to a query for a name in a zone."""
        query = dns.message.make_query(f"{name}.{zone}" if name else zone, kind)
        if self.lan is None:
            return dns.query.tcp(query, self.address, 5, self.port)
        with self.lan.connect(self.address, self.port) as connection:
            connection.setblocking(False)
            return dns.query.tcp(query, self.address, 5, self.port, sock=connection)

    def records(self, name: str, kind: str, zone: str = ZONE) -> set[str]:
        """The data of the records of a name in a zone."""
        return {rdata.to_text() for rrset in self.query(name, kind, zone).answer for rdata in rrset}

    def serial(self) -> str:
        """The serial number of the zone, which changes with each update that changes a record."""
        return self.records("", "SOA").pop().split()[2]


@contextlib.contextmanager
def running(
    kind: str, keys: dict[str, str], lan: Lan | None = None, zones: Mapping[str, tuple[str, str]] | None = None,
) -> Iterator[DnsProgram]:
    """A running server, whose files are removed afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="dns-"))
    made = DnsProgram(kind, programs(), directory, keys, lan, zones or {})
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(directory)


class AcmeServer:
    """Pebble in the network of test hosts, with an HTTPS certificate of its own that is made by `certificate`.

    It resolves names by `dns_server`, validates HTTP challenges on port 80, and reuses no authorization, so that each
    order is validated.
    """

    def __init__(self, lan: Lan, dns_server: str, certificate: Path, key: Path, directory: Path) -> None:
        self.lan, self.dns_server, self.directory = lan, dns_server, directory
        self.url = f"https://{lan.address}:{ACME_PORT}/dir"
        self.root_url = f"https://{lan.address}:{ACME_MANAGEMENT_PORT}/roots/0"
        self.log = directory / "pebble.log"
        self.process: subprocess.Popen[bytes] | None = None
        (directory / "pebble.json").write_text(json.dumps({"pebble": {
            "listenAddress": f"{lan.address}:{ACME_PORT}",
            "managementListenAddress": f"{lan.address}:{ACME_MANAGEMENT_PORT}",
            "certificate": str(certificate), "privateKey": str(key), "httpPort": 80, "tlsPort": 443,
            "ocspResponderURL": "", "externalAccountBindingRequired": False,
        }}))

    def start(self) -> None:
        command = [programs() / "usr/bin/pebble", "-config", self.directory / "pebble.json",
                   "-dnsserver", self.dns_server]
        settings = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_AUTHZREUSE": "0"}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen([*_inside(self.lan), *command], env=os.environ | settings,
                                            stdout=output, stderr=output, cwd=self.directory)
        deadline_s = time.monotonic() + 30
        while True:
            try:
                self.lan.connect(self.lan.address, ACME_PORT, timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline_s and self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)
            self.process = None


def _inside(lan: Lan) -> list[str]:
    return ["ip", "netns", "exec", netns.name_of(lan.name)]


def _free_port() -> int:
    """A port of loopback that is free for UDP and TCP."""
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            try:
                udp.bind(tcp.getsockname())
            except OSError:
                continue
            return int(tcp.getsockname()[1])


def _triplet() -> str:
    return subprocess.run(["dpkg-architecture", "-qDEB_HOST_MULTIARCH"], check=True, stdout=subprocess.PIPE,
                          text=True).stdout.strip()
