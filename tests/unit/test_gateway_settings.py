# SPDX-License-Identifier: BSD-3-Clause
"""A gateway's settings, and the HAProxy configuration that is generated from them."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from nbagent.core.errors import ConfigError
from nbagent.gateway import apply, haproxy, settings

TOP = Path(__file__).resolve().parents[2]
HOSTS = {"a": {"address": "10.1.0.1"}, "b": {"address": "2001:db8::2", "port": 8001, "check_port": 9002}}
DRAINED = {**HOSTS, "b": {**HOSTS["b"], "drain": True}}


def rendered(**tables: Any) -> str:
    return haproxy.render(settings.parse(tables))


def block(text: str, head: str) -> str:
    """One section of a configuration."""
    return next(part for part in text.split("\n\n") if part.startswith(head))


@pytest.fixture
def certificate(tmp_path: Path) -> str:
    directory = tmp_path / "live"
    directory.mkdir()
    names = ["-keyout", str(directory / "privkey.pem"), "-out", str(directory / "fullchain.pem")]
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=x", *names]
    subprocess.run(openssl, check=True, capture_output=True)
    return str(directory)


@pytest.mark.parametrize("tables", [
    {},
    {"hosts": HOSTS},
    {"hosts": DRAINED, "fleet": {"domain": "nb.example.org"}, "log": {"requests": "all"}},
    {"hosts": HOSTS, "listen": {"trusted_proxies": ["10.0.0.0/8"], "metrics": "none", "connections": 5000}},
    {"hosts": HOSTS, "landing": {"banned": [f"203.0.113.{n}/32" for n in range(200)] + ["2001:db8:7::/48"]}},
    {"fleet": {"srv": "_nbagent._tcp.hosts.example.org", "srv_hosts": 300}},
    {"fleet": {"srv": "_nbagent._tcp.hosts.example.org", "resolvers": ["10.0.0.53:53"]}},
    {"hosts": HOSTS, "tls": {"certificates": ["live"], "acme": "127.0.0.1:8402"}},
    {"hosts": HOSTS, "tls": {"certificates": ["live"], "hsts": "none"}, "listen": {"http": []}},
], ids=str)
def test_haproxy_accepts_the_configuration_without_a_warning(
    tables: dict[str, Any], certificate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "tls" in tables:
        tables = {**tables, "tls": {**tables["tls"], "certificates": [certificate]}}
    monkeypatch.setattr(haproxy, "PAGES", str(pages(tmp_path)))
    assert apply.try_out(settings.parse(tables)) == ""


def pages(directory: Path) -> Path:
    """The gateway's pages, in the layout of its package."""
    made = directory / "pages"
    made.mkdir()
    for line in (TOP / "packaging/debian/nbagent-gateway.install").read_text().splitlines():
        pattern, where = line.split()
        if where == "usr/share/nbagent/gateway":
            for page in TOP.glob(pattern):
                shutil.copy(page, made)
    return made


def test_a_refusal_by_haproxy_has_its_message(tmp_path: Path) -> None:
    (tmp_path / "x.cfg").write_text("frontend f\n    bind nowhere\n")
    with pytest.raises(ConfigError, match=r"HAProxy refuses the configuration: (.|\n)*'bind'"):
        apply.check(tmp_path / "x.cfg")


def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tls\.certificates: .*/gone: No such file"):
        apply.read_certificate(tmp_path / "gone")


@pytest.mark.parametrize(("text", "message"), [
    ("[listn]", 'unknown setting listn; did you mean "listen"'),
    ('[hosts.a]\naddress = "10.1.0.1"\nwaight = 3', 'unknown setting hosts.a.waight; did you mean "weight"'),
    ('[hosts.a]\naddress = "a.example.org"', "hosts.a.address: expected an IP address"),
    ('[hosts.a]\naddress = "10.1.0.1"\nweight = 257', "hosts.a.weight: expected a whole number from 1 to 256"),
    ("[hosts.a]\ndrain = true", "hosts.a: expected an `address`"),
    ('[hosts.A-1]\naddress = "10.1.0.1"', "hosts.A-1: expected 1 to 16 characters"),
    ('[hosts.a]\naddress = "10.1.0.1"\n[fleet]\nsrv = "_n._tcp.example.org"', "hosts: expected no hosts, because"),
    ('[listen]\nhttp = ["80"]', "listen.http: expected a list of addresses with ports"),
    ('[listen]\nhttp = ["10.0.0.300:80"]', "listen.http: expected a list of addresses with ports"),
    ("[listen]\nhttp = []", "listen.http: expected an address, because"),
    ('[tls]\ncertificates = ["live"]', "tls.certificates: expected a list of files or directories"),
    ('[fleet]\nsrv = "example"', "fleet.srv: expected .none. or a name with SRV records"),
])
def test_a_wrong_setting_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.parse(tomllib.loads(text))


def test_a_later_file_adds_hosts_and_changes_settings_of_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text('[hosts.a]\naddress = "10.1.0.1"\n')
    (tmp_path / "gateway.d").mkdir()
    (tmp_path / "gateway.d/host-a.toml").write_text("[hosts.a]\ndrain = true\n")
    (tmp_path / "gateway.d/host-b.toml").write_text('[hosts.b]\naddress = "10.1.0.2"\n')
    hosts = settings.load(tmp_path / "gateway.toml").hosts
    assert (hosts["a"].address, hosts["a"].drain, hosts["b"].drain) == ("10.1.0.1", True, False)


def test_labels_with_the_same_crc_are_refused() -> None:
    labels: dict[int, str] = {}
    clash = None
    for number in range(300_000):
        # Hashed, because the CRCs of texts that differ in few bits are always different.
        label = hashlib.sha256(str(number).encode()).hexdigest()[:12]
        if other := labels.get(settings.ring_number(label)):
            clash = (other, label)
            break
        labels[settings.ring_number(label)] = label
    assert clash, "no clash among so many labels"
    with pytest.raises(ConfigError, match=r"another label, because .* have the same CRC-32"):
        settings.parse({"hosts": {label: {"address": "10.1.0.1"} for label in clash}})


def test_the_ring_number_depends_on_the_label_only() -> None:
    one, two = rendered(hosts=HOSTS), rendered(hosts={"b": HOSTS["b"]})
    place = re.search(r"server b .* id (\d+)", block(one, "listen keyed"))
    assert place and f"id {place[1]}" in block(two, "listen keyed")


def test_a_drained_host_serves_users_and_gets_no_claims() -> None:
    text = rendered(hosts=DRAINED)
    assert "server b " in block(text, "backend users")
    for stage in haproxy.STAGES:
        assert "server a " in block(text, f"listen {stage}") and "server b " not in block(text, f"listen {stage}")


def test_hosts_have_weight_0_in_the_backend_users() -> None:
    servers = re.findall(r"server (\S+) .*?weight (\d+)", block(rendered(hosts=HOSTS), "backend users"))
    assert servers == [("a", "0"), ("b", "0"), (haproxy.STATUS, "1"), (f"{haproxy.STATUS}_again", "1")]


def test_log_formats_have_no_query_and_no_header() -> None:
    formats = re.findall(r'log-format "(.*)"', rendered(hosts=HOSTS))
    assert len(formats) == 4
    for written in formats:
        # The variable has hexadecimal digits of a well-formed traceparent.
        shown = written.replace("trace=%[var(txn.trace)]", "")
        assert not re.search(r"%(r|HU|HQ|HP|hr|hs)(?![A-Za-z])|%\[", shown)


def test_the_configuration_file_changes_no_default() -> None:
    text = (TOP / "packaging/gateway.toml").read_text()
    assert settings.parse(tomllib.loads(text)) == settings.GatewaySettings()
    uncommented = re.sub(r"^#(\[|\w+ = )", r"\1", text, flags=re.MULTILINE)
    document = tomllib.loads(uncommented)
    assert settings.parse(document).hosts == {"c07": settings.FleetHostSettings()}
    assert settings.parse({**document, "hosts": {}}) == settings.GatewaySettings()
