"""The packages on a host of their own: installed by apt, upgraded under a user, purged without a trace.

On Debian 13, and on cgroup v2, they are installed and purged by the fixture of the virtual machines.
"""

import json
import os
import re
import subprocess

import pytest

import product
from conftest import SETTINGS, Agent
from testhost_driver import Host

SERVICES = ("nbagent.service", "nbagent-api.service", "nbagent-router.service")
SOCKETS = ("nbagent.socket", "nbagent-check.socket", "nbagent-api.socket", "nbagent-landing.socket",
           "nbagent-router.socket", "nbagent-network.socket")
ON_DEMAND = ("nbagent-network.service", "nbagent-dns.service")
EXPOSURE_MAX = 5.0
# Files that others of the host made or changed meanwhile; whatever is ours has our name in its path.
THEIRS = re.compile(r"file /(etc|usr|var|run)/(?!.*nbagent)")


def ours(lines):
    return sorted(line for line in lines if "nbagent" in line or not THEIRS.match(line))


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
    """A host that has never seen the packages."""
    with Host.up(name=f"pk-{os.getpid()}"[:16]) as host:
        yield host


@pytest.fixture(scope="module")
def installed(clean, packages):
    """The packages on it; what it was before is in `before`."""
    # What the packages depend on comes first, so that only they themselves are compared.
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


def test_everything_runs_after_the_installation_and_after_the_next_boot(installed):
    for unit in (*SERVICES, *SOCKETS):
        assert installed.run("systemctl", "is-enabled", unit).strip() == "enabled", unit
        assert installed.run("systemctl", "is-active", unit).strip() == "active", unit
    assert installed.run("systemctl", "is-system-running").strip() == "running"
    claim = json.loads(installed.run("curl", "-sS", "localhost:9000/claim"))
    assert claim["url"].startswith("http://localhost:8000/user/")
    installed.release(claim["slot"])


@pytest.mark.parametrize("unit", (*SERVICES, *ON_DEMAND))
def test_no_service_is_more_exposed_than_it_may_be(installed, unit):
    verdict = installed.run("systemd-analyze", "security", "--no-pager", unit).splitlines()[-1]
    assert float(re.search(r"(\d+\.\d+)", verdict)[1]) <= EXPOSURE_MAX, verdict


def test_systemd_finds_no_fault_in_the_units(installed):
    units = (*SERVICES, *ON_DEMAND, *SOCKETS, "nbagent-slots.slice")
    done = installed.host.run(["systemd-analyze", "verify", *units], check=False)
    assert done.returncode == 0, done.stderr
    assert "nbagent" not in done.stderr, done.stderr


def test_an_upgrade_keeps_the_user_and_the_websocket(installed, packages):
    kernel = installed.open().kernel()
    kernel.run("x = 21")
    started = installed.run("systemctl", "show", "-P", "InvocationID", "nbagent.service")
    install(installed.host, packages, "--reinstall")
    assert installed.run("systemctl", "show", "-P", "InvocationID", "nbagent.service") != started
    assert kernel.run("2 * x").text == "42"
    kernel.end()
    installed.wait_warm()
    assert installed.open().run("1 + 1").text == "2"


def test_purge_under_a_user_leaves_nothing(installed):
    slot = installed.open()
    slot.kernel().close()
    said = installed.purge()
    assert "warning" not in said.lower(), said
    after = product.listing(installed.host)
    # Our settings of this test were there before the package was, and go with /etc/nbagent.
    assert ours(after - installed.before) == []
    assert ours(installed.before - after) == []
    assert installed.run("systemctl", "is-system-running").strip() == "running"
