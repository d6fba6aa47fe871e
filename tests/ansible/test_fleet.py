# SPDX-License-Identifier: BSD-3-Clause
"""The playbooks of packaging/ansible against test hosts: from bare Debian 12 and 13 to a fleet, and its changes.

The tests run in this order on the same three machines. The connection is tests/ansible/ssh.
"""

import os
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import product
from fleet import HTTP_PORT, gateway_address, host_address
from notebook import Kernel, Notebook
from playbooks import VERSIONS, Ansible
from product import Api
from testhost_driver import Host
from testhost_driver.lan import Lan

LABELS = ("a", "b")
# Debian 12 and 13 side by side, as in a fleet that is changed host by host.
SUITES = {"a": "bookworm", "b": "trixie", "gw": "trixie"}
PACKAGES = tuple(dict.fromkeys((*product.HOST, *product.GATEWAY)))
SETTINGS = """
[slots]
capacity = 4
memory = "512M"
[pool]
warm = 1
"""


class Site:
    """The machines of a site by name, and its inventory."""

    def __init__(self, prefix, labels=LABELS, suites=SUITES):
        self.prefix, self.gateway_name, self.suites = prefix, f"{prefix}-gw", suites
        self.machines = {}
        self.hosts = {
            self.name(label): {"nbagent_host_label": label, "nbagent_host_address": host_address(number)}
            for number, label in enumerate(labels)
        }

    def name(self, label):
        return f"{self.prefix}-{label}"

    def boot(self, lan):
        addresses = {name: host["nbagent_host_address"] for name, host in self.hosts.items()}
        for name, address in (addresses | {self.gateway_name: gateway_address(0)}).items():
            suite = self.suites.get(name.removeprefix(f"{self.prefix}-"), "bookworm")
            self.machines[name] = Host.up(name=name, suite=suite)
            lan.plug(self.machines[name], address)

    @property
    def gateway(self):
        return self.machines[self.gateway_name]

    def inventory(self, ansible, gateways=None, more=None, **variables):
        gateways = gateways or {self.gateway_name: {"nbagent_gateway_address": gateway_address(0)}}
        variables = {"nbagent_host_settings": SETTINGS, "nbagent_host_drain_wait": "1s"} | variables
        ansible.inventory(self.hosts, gateways, more, **variables)

    def spawn(self):
        """A notebook by a claim at the gateway, which the test keeps open."""
        answer = Api(self.gateway, HTTP_PORT).post("/api/spawn")
        assert answer.status == 200, answer.body
        slot, token = re.search(r"/user/([^/]+)/.*token=([^&]+)", answer.json()["url"]).groups()
        return Notebook(self.gateway, {"slot": slot, "token": token}, HTTP_PORT)

    def spawn_on(self, label):
        """As `spawn`, on one host, because the others drain meanwhile."""
        others = [self.machines[self.name(other)] for other in LABELS if other != label]
        for machine in others:
            machine.run(["nbagent", "drain"])
        notebook = self.spawn()
        for machine in others:
            machine.run(["nbagent", "drain", "--off"])
        assert notebook.slot.startswith(f"{label}-")
        return notebook

    def release(self, notebook):
        host = self.machines[self.name(notebook.slot.partition("-")[0])]
        host.run(["nbagent", "release", notebook.slot])

    def version(self, label):
        return self.machines[self.name(label)].run(["dpkg-query", "-W", "-f", "${Version}", "nbagent"]).stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    product.build(product.say, PACKAGES)
    found = Site(f"an{os.getpid() % 10000}")
    lan = Lan(found.prefix)
    try:
        found.boot(lan)
        yield found
    finally:
        for machine in found.machines.values():
            machine.down(now=True)
        lan.remove()


@pytest.fixture(scope="module")
def ansible(site, tmp_path_factory):
    """Each ansible-core with the inventory of the site."""
    found = {version: Ansible(version, tmp_path_factory.mktemp(version)) for version in VERSIONS}
    for one in found.values():
        site.inventory(one)
    return found


def newer(directory, suffix):
    """Copies of the packages with a higher version."""
    for package in product.build(product.say, PACKAGES):
        tree = directory / package.stem
        subprocess.run(["dpkg-deb", "-R", package, tree], check=True)
        control = tree / "DEBIAN/control"
        version = re.search(r"^Version: (.*)$", control.read_text(), re.MULTILINE)[1]
        # The dependency on the exact version of python3-nbagent too.
        text = control.read_text().replace(f"Version: {version}", f"Version: {version}{suffix}")
        control.write_text(text.replace(f"(= {version})", f"(= {version}{suffix})"))
        pack = ["dpkg-deb", "-b", "--root-owner-group", "-Znone", tree, directory]
        subprocess.run(pack, check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(tree)


def test_check_mode_changes_nothing_on_bare_machines(site, ansible):
    assert all(ansible["debian"].must("site", "--check").values())
    for machine in site.machines.values():
        assert machine.run(["ls", "/etc/nbagent"], check=False).returncode


def test_bare_machines_become_a_fleet_that_serves_a_cell(site, ansible):
    began_s = time.monotonic()
    ansible["debian"].must("site")
    notebook = site.spawn()
    assert notebook.run("print(6 * 7)").stream == "42\n"
    product.say(f"from bare machines to a served cell: {time.monotonic() - began_s:.0f} s")
    site.release(notebook)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_second_run_changes_nothing(site, ansible, version):
    assert not any(ansible[version].must("site").values())
    assert not any(ansible[version].must("upgrade").values())


def test_an_upgrade_loses_no_session_and_a_second_one_does_nothing(site, ansible, tmp_path):
    newer(tmp_path, "+a")
    before = site.version("a")
    notebook = site.spawn()
    with notebook.kernel() as kernel:
        kernel.run("x = 41")
    site.inventory(ansible["pypi"], nbagent_packages_directory=str(tmp_path), nbagent_packages_version="")
    ansible["pypi"].must("upgrade")
    assert {site.version(label) for label in LABELS} == {f"{before}+a"}
    # By a new websocket, because Jupyter closes one whose client, as this one meanwhile, sends no pong for 90 s.
    with Kernel(notebook, kernel.id) as again:
        assert again.run("print(x + 1)").stream == "42\n"
    site.release(notebook)
    assert not any(ansible["pypi"].must("upgrade").values())


def test_an_image_is_rolled_out_and_back(site, ansible, tmp_path):
    deb, = product.build(product.say, ["nbagent-image-minimal"])
    subprocess.run(["dpkg-deb", "-x", deb, tmp_path], check=True)
    archive = next(tmp_path.rglob("*.tar.zst"))
    first = image(site, "a")
    # Another archive of the same image: a frame that zstd skips has other bytes and no content.
    archive.write_bytes(archive.read_bytes() + b"\x50\x2a\x4d\x18\x00\x00\x00\x00")
    new = {"nbagent_image_name": "minimal", "nbagent_image_archive": str(archive)}
    ansible["debian"].must("image", **new)
    assert {image(site, label) for label in LABELS}.isdisjoint({first})
    assert not any(ansible["debian"].must("image", **new).values())
    ansible["debian"].must("image", nbagent_image_name="minimal", nbagent_image_digest=first)
    assert {image(site, label) for label in LABELS} == {first}


def image(site, label):
    (found,) = Api(site.machines[site.name(label)]).get("/images").json()
    return found["digest"]


def test_a_host_is_removed_and_added(site, ansible):
    gone = site.name("b")
    ansible["pypi"].must("remove_host", nbagent_target=gone)
    assert "b" not in labels(site)
    assert site.machines[gone].run(["ls", "/usr/bin/nbagent"], check=False).returncode
    ansible["pypi"].must("add_host", nbagent_target=gone)
    assert labels(site) == {"a", "b"}


def labels(site):
    hosts = Api(site.gateway, HTTP_PORT).get("/api/stats").json()["hosts"]
    return {name.removeprefix("http://") for name in hosts}


def test_a_host_with_users_is_not_rebooted(site, ansible):
    notebook = site.spawn()
    name = site.name(notebook.slot.partition("-")[0])
    done = ansible["debian"].run("reboot", "--limit", name)
    assert done.status != 0 and f"{name} is not rebooted: nbagent: 1 claimed slots are left" in done.output
    assert notebook.run("print(6 * 7)").stream == "42\n"
    assert Api(site.machines[name]).get("/stats").json()["draining"] is False
    site.release(notebook)


def test_a_host_is_rebooted_and_serves_again(site, ansible):
    # Debian 13's. The other host serves meanwhile, with a user.
    name, kept = site.name("b"), site.spawn_on("a")
    boot_id = ["cat", "/proc/sys/kernel/random/boot_id"]
    before = site.machines[name].run(boot_id).stdout
    with ThreadPoolExecutor(1) as threads:
        booted = threads.submit(site.machines[name].boot_again, timeout_s=300)
        ansible["debian"].must("reboot", "--limit", name)
        booted.result()
    assert site.machines[name].run(boot_id).stdout != before
    assert kept.run("print(6 * 7)").stream == "42\n"
    site.release(kept)
    notebook = site.spawn_on("b")
    assert notebook.run("print(6 * 7)").stream == "42\n"
    site.release(notebook)


@pytest.fixture(scope="module")
def second_upgrade(site, ansible, tmp_path_factory):
    """Packages that are newer than those of test_an_upgrade_loses_no_session_and_a_second_one_does_nothing."""
    directory = tmp_path_factory.mktemp("newer")
    newer(directory, "+b")
    site.inventory(ansible["pypi"], nbagent_packages_directory=str(directory), nbagent_packages_version="")
    return directory


def test_a_full_disk_stops_an_upgrade_while_the_host_serves(site, ansible, second_upgrade):
    before, host = site.version("a"), site.machines[site.name("a")]
    host.run(["mount", "-t", "tmpfs", "-o", "size=1M", "full", "/var/cache/nbagent-packages"])
    try:
        done = ansible["pypi"].run("upgrade")
    finally:
        host.run(["umount", "/var/cache/nbagent-packages"])
    assert done.status != 0 and "No space left on device" in done.output
    assert {site.version(label) for label in LABELS} == {before}
    assert Api(host).get("/stats").json()["draining"] is False


def test_a_package_that_is_incomplete_or_of_another_architecture_is_refused_while_the_host_serves(
    site, ansible, second_upgrade
):
    before, host = site.version("a"), site.machines[site.name("a")]
    (image,) = second_upgrade.glob("nbagent-image-minimal_*.deb")
    complete, other = image.read_bytes(), image.with_name(image.name.replace("_amd64", "_arm64"))
    image.write_bytes(complete[: len(complete) // 2])
    other.write_bytes(complete)
    done = ansible["pypi"].run("upgrade")
    assert done.status != 0 and "unexpected end of file" in done.output
    image.unlink()
    done = ansible["pypi"].run("upgrade")
    assert done.status != 0 and "0 files of nbagent-image-minimal for amd64 are in" in done.output
    image.write_bytes(complete)
    assert {site.version(label) for label in LABELS} == {before}
    assert Api(host).get("/stats").json()["draining"] is False


def test_an_upgrade_stops_at_a_host_that_died(site, ansible, second_upgrade):
    before = site.version("b")
    # The first host cannot start after its upgrade, so that the second must not be upgraded.
    first = site.machines[site.name("a")]
    first.run(["mkdir", "-p", "/etc/systemd/system/nbagent.service.d"])
    first.run(["tee", "/etc/systemd/system/nbagent.service.d/broken.conf"], input="[Service]\nExecStartPre=false\n")
    done = ansible["pypi"].run("upgrade", nbagent_host_ready_timeout_s=5)
    assert done.status != 0, done.output
    assert site.version("b") == before
    assert site.spawn().slot.startswith("b-")
    first.down(now=True)
    done = ansible["pypi"].run("upgrade")
    assert done.status != 0 and "UNREACHABLE" in done.output
    assert site.version("b") == before


def test_a_dead_host_is_removed_by_force(site, ansible):
    gone = site.name("a")
    done = ansible["pypi"].run("remove_host", nbagent_target=gone)
    assert done.status != 0
    ansible["pypi"].must("remove_host", nbagent_target=gone, nbagent_force=True)
    assert labels(site) == {"b"}
