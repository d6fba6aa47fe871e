"""What systemd, nginx and the configuration's readers say about the files of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from nbagent.config import host_config, nginx_settings

TOP = Path(__file__).resolve().parents[2]
UNITS = sorted((TOP / "units").iterdir())
PAGES = sorted((TOP / "packaging").glob("*/pages/*"))
SERVICES = [unit for unit in UNITS if unit.suffix == ".service"]
# Those of which slots are made, and all others.
EXPOSURE_MAX = {"nbagent.service": 5.0, "nbagent-zygote@.service": 3.5}
EXPOSURE_MAX_UNPRIVILEGED = 2.0

SECTION = re.compile(r"^\[(\w+)\]$")
SETTING = re.compile(r"^(\w+)=")


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """The units with every program they start at a path that exists on this machine."""
    for unit in UNITS:
        text = unit.read_text().replace("/usr/lib/nbagent/router", str(TOP / "packaging/router/start"))
        text = re.sub("/usr/sbin/(dnsmasq|haproxy)|/usr/bin/nbagent", "/bin/true", text)
        (tmp_path / unit.name).write_text(text)
    return tmp_path


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_understands_every_line(staged: Path) -> None:
    units = [str(staged / unit.name) for unit in UNITS]
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{staged}:"}
    # Without manual pages: they are in the package and need not be on this machine.
    verify = ["systemd-analyze", "verify", "--man=no", *units]
    done = subprocess.run(verify, capture_output=True, text=True, env=environment, check=False)
    about_ours = [line for line in done.stderr.splitlines() if "nbagent" in line]
    assert about_ours == []
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_no_service_is_more_exposed_than_it_needs_to_be(unit: Path) -> None:
    security = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)]
    done = subprocess.run(security, capture_output=True, text=True, check=False)
    verdict = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", done.stdout)
    assert verdict, done.stdout + done.stderr
    assert float(verdict[1]) <= EXPOSURE_MAX.get(unit.name, EXPOSURE_MAX_UNPRIVILEGED)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_directives_are_in_alphabetical_order(unit: Path) -> None:
    sections: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if match := SECTION.match(line):
            sections[match[1]] = []
        elif match := SETTING.match(line):
            sections[list(sections)[-1]].append(match[1])
    assert next(iter(sections)) == "Unit"
    for name, keys in sections.items():
        # What it is and where to read on come first, as everywhere.
        ordered = [key for key in keys if key not in ("Description", "Documentation")]
        assert ordered == sorted(ordered), name


def test_the_supervisor_may_not_mount_on_the_host() -> None:
    text = (TOP / "units/nbagent.service").read_text()
    granted = re.findall(r"^CapabilityBoundingSet=(.*)$", text, re.MULTILINE)
    assert "CAP_SYS_ADMIN" not in " ".join(granted).split()


@pytest.mark.parametrize(("kind", "file"), [
    ("toml", "nbagent.toml"), ("man", "man/nbagent.toml.5"),
    ("gateway-toml", "gateway.toml"), ("gateway-man", "man/nbagent-gateway.toml.5"),
])
def test_what_is_written_about_the_settings_is_what_they_say(kind: str, file: str) -> None:
    written = (TOP / "packaging" / file).read_text()
    assert written == _settings(kind), f"run packaging/settings {kind} > packaging/{file}"


def test_the_configuration_file_changes_no_default() -> None:
    text = (TOP / "packaging/nbagent.toml").read_text()
    assert host_config.parse(tomllib.loads(text)) == host_config.HostConfig()
    told = re.sub(r"^#(\[|\w+ = )", r"\1", text, flags=re.MULTILINE)
    with_all_told = host_config.parse(tomllib.loads(told))
    assert with_all_told.images == {"minimal": host_config.ImageSettings()}
    without_images = {k: v for k, v in tomllib.loads(told).items() if k != "images"}
    assert host_config.parse(without_images) == host_config.HostConfig()


@pytest.mark.skipif(not Path("/usr/sbin/nginx").exists(), reason="needs nginx")
@pytest.mark.parametrize("settings", [
    {},
    {"router": {"url_mode": "subdomain", "domain": "nb.example.org", "cookies": ["a", "b.c-*"]}},
    {"router": {"cookies": [], "trusted_proxies": ["10.0.0.0/8", "fd00::/8"]}},
    {"landing": {"access": "off", "banned": ["192.0.2.0/24", "2001:db8::/32"]}},
])
def test_nginx_understands_the_router(tmp_path: Path, settings: dict[str, object]) -> None:
    (tmp_path / "settings.conf").write_text(nginx_settings.nginx(host_config.parse(settings)))
    # -t binds for a moment; the name of a socket is free for sure, a port is not.
    (tmp_path / "listen.conf").write_text(f"listen unix:{tmp_path}/http;\n")
    text = (TOP / "packaging/router/nginx.conf").read_text()
    text = text.replace("/run/nbagent-router", str(tmp_path)).replace("/etc/nbagent/router.d", str(tmp_path))
    text = text.replace(f"include {tmp_path}/*.conf;", "")
    conf = tmp_path / "router.conf"
    conf.write_text(text)
    nginx = ["/usr/sbin/nginx", "-t", "-e", "stderr", "-c", str(conf)]
    done = subprocess.run(nginx, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr


@pytest.mark.parametrize("page", [p for p in PAGES if p.suffix == ".json"], ids=lambda page: page.name)
def test_problems_of_the_router_look_like_those_of_the_api(page: Path) -> None:
    problem = json.loads(page.read_text())
    assert set(problem) == {"type", "title", "status", "detail"}
    assert problem["type"].startswith("urn:nbagent:problem:")


@pytest.mark.parametrize("page", [p for p in PAGES if p.suffix == ".html"], ids=lambda page: page.name)
def test_pages_of_the_router_load_nothing(page: Path) -> None:
    text = page.read_text()
    assert 'name="viewport"' in text
    assert not re.search(r"<script|\bsrc=|\bhref=|url\(|@import", text)


def _settings(kind: str) -> str:
    command = [str(TOP / "packaging/settings"), kind]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
