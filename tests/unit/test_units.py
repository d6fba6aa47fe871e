# SPDX-License-Identifier: BSD-3-Clause
"""Checks of the packaged units, configuration files and pages with systemd, nginx and our own parsers."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest

from nbagent.config import host_config, nginx_check, nginx_settings, reference
from nbagent.gateway.reference import GATEWAY

TOP = Path(__file__).resolve().parents[2]
UNITS = sorted((TOP / "units").iterdir())
PAGES = sorted((TOP / "packaging").glob("*/pages/*"))
SERVICES = [unit for unit in UNITS if unit.suffix == ".service"]
# The most that `systemd-analyze security` may report for each service. A service that is not listed fails.
EXPOSURE_MAX = {
    "nbagent-api.service": 1.1,
    "nbagent-dns-update.service": 1.4,
    "nbagent-dns.service": 1.8,
    "nbagent-drain.service": 1.5,
    "nbagent-gateway-dns.service": 1.4,
    "nbagent-gateway-status.service": 1.4,
    "nbagent-gateway.service": 1.7,
    "nbagent-launch.service": 4.1,
    "nbagent-modules.service": 1.1,
    "nbagent-network.service": 1.5,
    "nbagent-router.service": 1.2,
    "nbagent-sweep.service": 1.1,
    "nbagent-termination@.service": 1.3,
    "nbagent-token.service": 0.8,
    "nbagent-units.service": 1.0,
    "nbagent-zygote@.service": 3.5,
    "nbagent.service": 0.9,
}

SECTION = re.compile(r"^\[(\w+)\]$")
SETTING = re.compile(r"^(\w+)=")


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """The units, with the programs that they start replaced by ones that exist on this machine."""
    for unit in UNITS:
        text = unit.read_text().replace("/usr/lib/nbagent/router", str(TOP / "packaging/router/start"))
        text = re.sub("/usr/sbin/(dnsmasq|haproxy)|/usr/bin/nbagent", "/bin/true", text)
        (tmp_path / unit.name).write_text(text)
    return tmp_path


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_accepts_the_units(staged: Path) -> None:
    units = [str(staged / unit.name) for unit in UNITS]
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{staged}:"}
    # Without manual pages, which are installed by the package and may not be on this machine.
    verify = ["systemd-analyze", "verify", "--man=no", *units]
    done = subprocess.run(verify, capture_output=True, text=True, env=environment, check=False)
    messages = [line for line in done.stderr.splitlines() if "nbagent" in line]
    assert messages == []
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_services_are_hardened(unit: Path) -> None:
    security = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)]
    done = subprocess.run(security, capture_output=True, text=True, check=False)
    verdict = re.search(r"Overall exposure level for \S+: (\d+\.\d+)", done.stdout)
    assert verdict, done.stdout + done.stderr
    assert float(verdict[1]) <= EXPOSURE_MAX[unit.name]


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
        # By convention these two come first.
        ordered = [key for key in keys if key not in ("Description", "Documentation")]
        assert ordered == sorted(ordered), name


def test_the_supervisor_has_no_cap_sys_admin() -> None:
    text = (TOP / "units/nbagent.service").read_text()
    granted = re.findall(r"^CapabilityBoundingSet=(.*)$", text, re.MULTILINE)
    assert "CAP_SYS_ADMIN" not in " ".join(granted).split()


def test_a_removal_stops_the_services_that_the_supervisor_starts_after_it() -> None:
    """A stop that comes first is overtaken by a start of the supervisor, whose last slots end meanwhile."""
    script = (TOP / "packaging/debian/nbagent.prerm").read_text().replace("\\\n", " ")
    steps = [line.split()[2:] for line in script.splitlines() if line.strip().startswith("deb-systemd-invoke stop")]
    step = {name: number for number, names in enumerate(steps) for name in names if name.startswith("nbagent")}
    ours = {unit.name for unit in UNITS if "gateway" not in unit.name and "@" not in unit.name}
    assert not ours - set(step)
    # A drain waits for users as long as it reaches the API.
    assert step["nbagent-api.service"] < step["nbagent-drain.service"]
    used = ("dns", "launch", "network", "sweep", "units")
    assert all(step["nbagent.service"] < step[f"nbagent-{name}.service"] for name in used)
    assert step["nbagent-slots.slice"] < step["nbagent-modules.service"]
    assert step["nbagent-units.service"] < min(step["nbagent-dns.service"], step["nbagent-sweep.service"])
    assert all(step[name] <= step[name.replace("socket", "service")] for name in step if name.endswith(
        ("api.socket", "launch.socket", "network.socket", "router.socket", "units.socket", "nbagent.socket")))


@pytest.mark.parametrize(("kind", "file"), [
    ("toml", "nbagent.toml"), ("man", "man/nbagent.toml.5"),
    ("gateway-toml", "gateway.toml"), ("gateway-man", "man/nbagent-gateway.toml.5"),
])
def test_the_reference_of_the_settings_is_up_to_date(kind: str, file: str) -> None:
    document = GATEWAY if kind.startswith("gateway-") else reference.HOST
    text = reference.man(document) if kind.endswith("man") else reference.toml(document)
    assert (TOP / "packaging" / file).read_text() == text, f"run packaging/settings {kind} > packaging/{file}"


def test_the_command_prints_the_reference() -> None:
    command = [str(TOP / "packaging/settings"), "gateway-toml"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == reference.toml(GATEWAY)


def test_the_configuration_file_changes_no_default() -> None:
    text = (TOP / "packaging/nbagent.toml").read_text()
    assert host_config.parse(tomllib.loads(text)) == host_config.HostConfig()
    uncommented = re.sub(r"^#(\[|\w+ = )", r"\1", text, flags=re.MULTILINE)
    config = host_config.parse(tomllib.loads(uncommented))
    assert config.images == {"minimal": host_config.ImageSettings()}
    without_images = {k: v for k, v in tomllib.loads(uncommented).items() if k != "images"}
    assert host_config.parse(without_images) == host_config.HostConfig()


@pytest.mark.skipif(not Path("/usr/sbin/nginx").exists(), reason="needs nginx")
@pytest.mark.parametrize("settings", [
    {},
    {"router": {"url_mode": "subdomain", "domain": "nb.example.org", "cookies": ["a", "b.c-*"]}},
    {"router": {"cookies": [], "trusted_proxies": ["10.0.0.0/8", "fd00::/8"]}},
    {"landing": {"access": "off", "banned": ["192.0.2.0/24", "2001:db8::/32"]}},
])
def test_nginx_accepts_the_configuration_of_the_router(tmp_path: Path, settings: dict[str, object]) -> None:
    generated = nginx_settings.nginx(host_config.parse(settings))
    assert nginx_check.check(generated, tmp_path, TOP / "packaging/router/nginx.conf") is None


@pytest.mark.skipif(not Path("/usr/sbin/nginx").exists(), reason="needs nginx")
def test_an_error_in_a_file_of_the_operator_is_found_and_named(tmp_path: Path) -> None:
    generated, config = nginx_settings.nginx(host_config.parse({})), TOP / "packaging/router/nginx.conf"
    (tmp_path / "bad.conf").write_text("server {\n  listen 127.0.0.1:1;\n  no_such_directive on;\n}\n")
    error = nginx_check.check(generated, tmp_path, config)
    assert error is not None
    assert 'unknown directive "no_such_directive"' in error and f"{tmp_path}/bad.conf:3" in error
    (tmp_path / "bad.conf").write_text("gzip_comp_level 5;\n")
    assert nginx_check.check(generated, tmp_path, config) is None


@pytest.mark.parametrize("page", [p for p in PAGES if p.suffix == ".json"], ids=lambda page: page.name)
def test_problem_documents_of_the_router_have_the_fields_of_those_of_the_api(page: Path) -> None:
    problem = json.loads(page.read_text())
    assert set(problem) == {"type", "title", "status", "detail"}
    assert problem["type"].startswith("urn:nbagent:problem:")


@pytest.mark.parametrize("page", [p for p in PAGES if p.suffix == ".html"], ids=lambda page: page.name)
def test_pages_of_the_router_load_no_other_file(page: Path) -> None:
    text = page.read_text()
    assert 'name="viewport"' in text
    assert not re.search(r"<script|\bsrc=|\bhref=|url\(|@import", text)


def test_the_installation_applies_each_setting_of_the_kernel() -> None:
    settings = re.findall(r"^([\w.]+) =", (TOP / "packaging/nbagent.sysctl").read_text(), re.M)
    script = (TOP / "packaging/debian/nbagent.postinst").read_text()
    prefixes = tuple(re.findall(r"--prefix=([\w.]+)", script))
    assert len(settings) > 3 and [name for name in settings if not name.startswith(prefixes)] == []


@pytest.mark.parametrize(("jobs", "ended_by"), [
    ("12 nbagent-dns-update.service restart running\n13 nbagent.service start waiting\n", "TERM"),
    ("12 nbagent-dns-update.service stop running\n13 nbagent.service restart running\n", "USR1"),
    ("", "USR1"),
])
def test_the_dns_update_gets_a_signal_for_a_stop_that_is_no_restart(tmp_path: Path, jobs: str, ended_by: str) -> None:
    text = (TOP / "units/nbagent-dns-update.service").read_text()
    (command,) = re.findall(r"^ExecStop=-\+/bin/sh -c '(.*)'$", text, re.MULTILINE)
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"#!/bin/sh\nprintf '{jobs}'\n")
    systemctl.chmod(0o755)
    with subprocess.Popen(["sleep", "60"]) as process:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MAINPID": str(process.pid)}
        subprocess.run(["sh", "-c", command], env=environment, check=True)
        process.terminate()
    assert process.returncode == -getattr(signal, f"SIG{ended_by}")


def imported(name: str, found: dict[str, Path]) -> dict[str, Path]:
    """The modules of nbagent that a module imports, also in functions, with their files."""
    path = TOP.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if name in found or not name.startswith("nbagent") or not path.exists():
        return found
    found[name] = path
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for module in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                imported(module, found)
    return found


def test_services_without_dbus_run_no_program_that_needs_it() -> None:
    wrong = {}
    for unit in SERVICES:
        text = unit.read_text()
        if "InaccessiblePaths=-/run/dbus" in text:
            for module in re.findall(r"^ExecStart=.* -m (nbagent\.\w+)", text, re.MULTILINE):
                sources = imported(f"{module}.__main__", imported(module, {}))
                assert sources, unit
                wrong[unit.name] = [
                    name for name, path in sources.items() if re.search(r'"(systemctl|busctl)"', path.read_text())
                ]
    assert {"nbagent-api.service", "nbagent-dns-update.service"} <= wrong.keys() and not any(wrong.values()), wrong
