# SPDX-License-Identifier: BSD-3-Clause
"""The packages on a new host: installation with apt, an upgrade while a notebook is in use, and a purge.

The fixture of the virtual machines installs and purges them on Debian 13 and on cgroup v2.
"""

import json
import os
import re
import subprocess

import pytest
import taken_over
from restrictions import attempts_of

import product
from conftest import SETTINGS, Agent
from testhost_driver import Host

SERVICES = ("nbagent.service", "nbagent-api.service", "nbagent-router.service")
SOCKETS = ("nbagent.socket", "nbagent-check.socket", "nbagent-api.socket", "nbagent-landing.socket",
           "nbagent-router.socket", "nbagent-network.socket", "nbagent-launch.socket",
           "nbagent-units.socket")
ON_DEMAND = ("nbagent-network.service", "nbagent-dns.service", "nbagent-launch.service", "nbagent-sweep.service",
             "nbagent-token.service", "nbagent-units.service")
# The most that `systemd-analyze security` may report for each service as it is loaded on the host, drop-ins included.
EXPOSURE_MAX = {
    "nbagent-api.service": 0.9,
    "nbagent-dns-update.service": 1.2,
    "nbagent-dns.service": 1.6,
    "nbagent-drain.service": 1.5,
    "nbagent-launch.service": 4.1,
    "nbagent-modules.service": 1.0,
    "nbagent-network.service": 1.3,
    "nbagent-router.service": 1.1,
    "nbagent-sweep.service": 0.9,
    "nbagent-termination@x:0.service": 1.2,
    "nbagent-token.service": 0.8,
    "nbagent-units.service": 1.0,
    "nbagent-zygote@x:0.service": 3.5,
    "nbagent.service": 0.9,
}
# Files that other programs of the host changed. Paths of our files contain "nbagent".
OTHER_FILES = re.compile(r"file /(etc|usr|var|run)/(?!.*nbagent)")


def ours(lines):
    return sorted(line for line in lines if "nbagent" in line or not OTHER_FILES.match(line))


def install(host, packages, *options):
    names = [f"/root/{package.name}" for package in packages]
    return host.run(["apt-get", "-q", "install", "-y", *options, *names], timeout=900)


def depends(packages):
    """The names of all packages that these depend on."""
    fields = [subprocess.run(["dpkg-deb", "-f", str(package), "Depends"], check=True, stdout=subprocess.PIPE, text=True)
              for package in packages]
    return {re.match(r"[a-z0-9.+-]+", part.strip())[0] for field in fields for part in field.stdout.split(",")}


@pytest.fixture(scope="module")
def clean():
    """A host on which the packages were never installed."""
    with Host.up(name=f"pk-{os.getpid()}"[:16]) as host:
        yield host


@pytest.fixture(scope="module")
def installed(clean, packages):
    """A host with the packages; `before` is the listing of its files before their installation."""
    # Dependencies are installed before the first listing, so that it differs only by our packages.
    for package in packages:
        clean.copy_in(str(package), "/root/")
    names = depends(packages) - set(product.HOST)
    clean.run(["apt-get", "-q", "update"], timeout=300)
    clean.run(["apt-get", "-q", "install", "-y", *names], timeout=900)
    before = product.listing(clean)
    product.install(clean, packages, SETTINGS)
    agent = Agent(clean)
    agent.before = before
    return agent


def test_lintian_finds_no_error(packages):
    done = subprocess.run(["lintian", "--fail-on", "error", "--no-cfg", "--allow-root", *map(str, packages)],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_units_are_enabled_and_active_after_the_installation(installed):
    for unit in (*SERVICES, *SOCKETS):
        assert installed.run("systemctl", "is-enabled", unit).strip() == "enabled", unit
        assert installed.run("systemctl", "is-active", unit).strip() == "active", unit
    # The router starts it.
    assert installed.run("systemctl", "is-active", "nbagent-router-check.socket").strip() == "active"
    assert installed.run("systemctl", "is-system-running").strip() == "running"
    claim = json.loads(installed.run("curl", "-sS", "localhost:9000/claim"))
    assert claim["url"].startswith("http://localhost:8000/user/")
    installed.release(claim["slot"])


@pytest.mark.parametrize("unit", EXPOSURE_MAX)
def test_services_are_hardened(installed, unit):
    verdict = installed.run("systemd-analyze", "security", "--no-pager", unit).splitlines()[-1]
    assert float(re.search(r"(\d+\.\d+)", verdict)[1]) <= EXPOSURE_MAX[unit], verdict


def test_every_service_of_the_package_has_a_limit_of_its_exposure(installed):
    files = installed.run("systemctl", "list-unit-files", "--no-legend", "--plain", "nbagent*.service").split("\n")
    names = {line.split()[0].replace("@.", "@x:0.") for line in files if line}
    assert names == set(EXPOSURE_MAX)


def test_a_supervisor_that_is_taken_over_reaches_nothing_of_the_host(installed):
    """The attempts of taken_over.py under the restrictions of nbagent.service, and without them."""
    free, log = attempts_of(installed.host, "nbagent.service", "supervisor")
    assert free == [*(f"succeeded: {name}" for name in taken_over.ATTEMPTS), "complete"]
    assert log == ["complete"]


# The attempts that succeed in a service that is taken over, because it has to be able to make them.
OF_API = {"an operation of the supervisor"}
OF_ROUTER = {
    "a network socket", "the server of a slot", "the landing page by an address of choice",
    "the control API as a program of the host",
}


@pytest.mark.parametrize(("unit", "allowed"), [("nbagent-api.service", OF_API), ("nbagent-router.service", OF_ROUTER)])
def test_an_api_or_a_router_that_is_taken_over_reaches_no_slot_but_by_its_service(installed, unit, allowed):
    claim = installed.claim()
    pid = installed.processes(claim["slot"])[-1]
    words = ("service", claim["slot"], claim["token"], str(pid))
    free, log = attempts_of(installed.host, unit, *words)
    names = taken_over.OF_ANY_USER | taken_over.of_services(claim["slot"], claim["token"], pid)
    assert free == [*(f"succeeded: {name}" for name in names), "complete"]
    assert set(log) == {*(f"succeeded: {name}" for name in allowed), "complete"}
    installed.release(claim["slot"])


def test_systemd_accepts_the_units(installed):
    units = (*SERVICES, *ON_DEMAND, *SOCKETS, "nbagent-router-check.socket", "nbagent-slots.slice",
             "nbagent-dns-update.service", "nbagent-modules.service", "nbagent-termination@aws.service")
    done = installed.host.run(["systemd-analyze", "verify", *units], check=False)
    assert done.returncode == 0, done.stderr
    assert "nbagent" not in done.stderr, done.stderr


def test_an_upgrade_keeps_slots_and_websockets(installed, packages):
    kernel = installed.open().kernel()
    kernel.run("x = 21")
    started = installed.run("systemctl", "show", "-P", "InvocationID", "nbagent.service")
    install(installed.host, packages, "--reinstall")
    assert installed.run("systemctl", "show", "-P", "InvocationID", "nbagent.service") != started
    assert kernel.run("2 * x").text == "42"
    kernel.end()
    installed.wait_warm()
    assert installed.open().run("1 + 1").text == "2"


# The names that version 0.2 had for the landing page and for the router's zone of claims.
FORMER = (
    (r"\bnbagent-landing\.socket", "nbagent-door.socket"),
    (r"\blanding\.sock\b", "door.sock"),
    (r"^\[landing\]", "[door]"),
)


def former(package, directory):
    """`package` as version 0.2 named its units and settings."""
    tree = directory / package.name
    subprocess.run(["dpkg-deb", "-R", str(package), str(tree)], check=True)
    version = subprocess.run(["dpkg-deb", "-f", str(package), "Version"], check=True, stdout=subprocess.PIPE, text=True)
    named = ("DEBIAN/*", "usr/lib/systemd/system/*", "etc/**/*.toml", "usr/**/nbagent/core/paths.py")
    for path in (path for pattern in named for path in tree.glob(pattern)):
        text = path.read_text()
        for pattern, name in FORMER:
            text = re.sub(pattern, name, text, flags=re.MULTILINE)
        if path.name == "control":
            text = text.replace(version.stdout.strip(), "0.2.0")
        path.write_text(text)
    for path in tree.glob("usr/lib/systemd/system/nbagent-landing.*"):
        path.rename(path.with_name(path.name.replace("landing", "door")))
    (tree / "DEBIAN/md5sums").unlink()
    made = directory / package.name.replace(version.stdout.strip(), "0.2.0")
    build = ["dpkg-deb", "--root-owner-group", "-b", str(tree), str(made)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    return made


def test_an_upgrade_from_version_0_2_keeps_slots_settings_and_the_landing_page(installed, packages, tmp_path):
    agent = installed
    agent.expect(r"\[door\]")
    old = [former(package, tmp_path) for package in packages if "image" not in package.name]
    for package in old:
        agent.host.copy_in(str(package), "/root/")
    install(agent.host, old, "--allow-downgrades")
    agent.host.run(["tee", "/etc/nbagent/conf.d/50-door.toml"], input='[door]\ntitle = "Welcome to 0.2"\n')
    agent.run("systemctl", "restart", "nbagent.service", "nbagent-api.service", "nbagent-router.service")
    assert agent.run("systemctl", "is-active", "nbagent-door.socket").strip() == "active"
    agent.wait_warm()
    kernel = agent.open().kernel()
    kernel.run("x = 21")
    install(agent.host, [package for package in packages if "image" not in package.name])
    assert kernel.run("2 * x").text == "42"
    kernel.end()
    assert agent.run("systemctl", "is-active", "nbagent-landing.socket").strip() == "active"
    assert agent.run("systemctl", "is-active", "nbagent-door.socket", check=False).strip() == "inactive"
    assert not agent.run("sh", "-c", "ls -R /etc/systemd /run/systemd/system /usr/lib/systemd | grep door || true")
    agent.wait(lambda: b"Welcome to 0.2" in agent.router.get("/").body, "the landing page")
    agent.wait_warm()
    assert agent.open().run("1 + 1").text == "2"
    agent.run("rm", "/etc/nbagent/conf.d/50-door.toml", *(f"/root/{package.name}" for package in old))
    agent.run("systemctl", "reload", "nbagent.service")
    assert agent.run("systemctl", "is-system-running").strip() == "running"


def test_purge_with_a_running_slot_leaves_no_file(installed):
    slot = installed.open()
    slot.kernel().close()
    # Its stop would wait for the user for half an hour.
    installed.run("systemctl", "enable", "--now", "nbagent-drain.service")
    output = installed.purge()
    assert "warning" not in output.lower(), output
    assert re.search(r"nbagent: the removal ends [1-9]\d* claimed slots", output), output
    after = product.listing(installed.host)
    # Purge also removes the settings that this test wrote to /etc/nbagent.
    assert ours(after - installed.before) == []
    assert ours(installed.before - after) == []
    # Among them the sweep of the image that was removed, which the supervisor starts.
    assert installed.run("systemctl", "list-units", "--all", "--plain", "--no-legend", "nbagent*") == ""
    assert installed.run("systemctl", "is-system-running").strip() == "running"
