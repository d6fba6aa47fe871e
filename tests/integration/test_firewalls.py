# SPDX-License-Identifier: BSD-3-Clause
"""Slots have their network beside Debian's firewalld, ufw, docker.io and iptables after the commands of `nbagent
doctor`, and start after its commands on a host with kernel.unprivileged_userns_clone=0.

For `make test-firewalls`, and `make test-vms`, since each package takes a minute to install on an emulated machine.
"""

import json

import pytest
import simulated_internet
from execd import execd_image
from simulated_internet import OTHER4, PUBLIC4, PUBLIC6, Slot, connected, refused_at_once, sh

import product
from conftest import ALL_MACHINES, MACHINES

HOSTS = ("nspawn-bookworm", *MACHINES) if ALL_MACHINES else ()
IPTABLES = """
iptables -A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT; iptables -A INPUT -i lo -j ACCEPT
iptables -A INPUT -p tcp -m state --state NEW -m multiport --dports 22,8000,9000:9001 -j ACCEPT
iptables -A INPUT -j REJECT --reject-with icmp-host-prohibited
iptables -A FORWARD -m comment --comment "no router" -j REJECT --reject-with icmp-host-prohibited
"""
# Packages; the commands that make the firewall effective and leave the ssh of the virtual machine open; those that
# have it write its rules anew.
FIREWALLS = {
    "firewalld": (["firewalld"], "systemctl start firewalld", "systemctl restart firewalld"),
    "ufw": (["ufw"], "ufw allow 22/tcp && ufw --force enable", "ufw reload"),
    "docker": (["docker.io"], "systemctl start docker", "systemctl restart docker"),
    # The rules of iptables-services and of cloud images: the policies accept, and the last rules reject.
    "iptables": (["iptables"], IPTABLES, "iptables-save > /root/rules; iptables-restore /root/rules"),
}
pytestmark = pytest.mark.parametrize("any_shared", HOSTS, indirect=True, scope="session")


@pytest.fixture(scope="module")
def networked(any_shared):
    """Each kind of host, with the internet attached, and slots that may reach it."""
    yield from simulated_internet.attached(any_shared)


def finding(agent, name):
    found = json.loads(agent.host.run(["nbagent", "doctor", "--json"], check=False, timeout=300).stdout)
    return next(one for one in found if one["name"] == name)


def lacks(slot):
    """The parts of its network that a slot lacks."""
    found = {"addresses": connected(slot.reach(PUBLIC4)), "IPv6": connected(slot.reach(PUBLIC6)),
             "names": slot.eval("names('other.example')") == {"other.example": [OTHER4]}}
    return [what for what, works in found.items() if not works]


def refuses(slot):
    """Whether refused addresses are refused at once."""
    return refused_at_once(slot.reach("10.1.2.3", "5.5.5.1"))


def opened(agent):
    agent.wait_warm()
    return Slot(agent, network="internet")


@pytest.mark.parametrize("name", FIREWALLS)
def test_slots_have_their_network_beside_a_firewall(networked, tmp_path, name):
    agent, (packages, start, again) = networked, FIREWALLS[name]
    before = opened(agent)
    assert lacks(before) == [] and refuses(before)
    agent.expect(simulated_internet.RESTORED)
    debs = product.debian_packages(agent.host, packages, tmp_path)
    agent.host.copy_in(debs, "/root/")
    try:
        # Docker's start of its own at the installation fails without cgroups that it can write to.
        agent.run("sh", "-c", f"cd /root && dpkg -i {' '.join(deb.name for deb in debs)}", timeout=900)
        agent.run("sh", "-ec", start, timeout=600)
        found = finding(agent, "firewall")
        print(f"{agent.host.driver} {agent.host.suite} {name}: {found}")
        lacking = lacks(before)
        print(f"without it a slot lacks {lacking}")
        assert bool(lacking) == (found["status"] != "ok"), (lacking, found)
        # Each command of the remedy; that of Docker ends with a sentence about the next boot.
        commands = found["mend"].partition("; and ")[0]
        agent.run("sh", "-ec", commands or "true", timeout=600)
        for act in ("true", again):
            agent.run("sh", "-ec", act, timeout=600)
            agent.wait(lambda: finding(agent, "firewall")["status"] == "ok", f"rules of {name} that let slots pass")
            assert lacks(before) == [] and refuses(before), act
        after = opened(agent)
        assert lacks(after) == [] and refuses(after)
        after.release()
    finally:
        agent.run("sh", "-c", f"apt-get -q purge -y {' '.join(packages)}; nft flush ruleset", timeout=900)
    # The table of nbagent is restored after the flush.
    agent.wait(lambda: sh(agent, "nft list table inet nbagent | grep -q slots4"), "the table")
    agent.wait(lambda: not lacks(before), "the network without the firewall")
    assert refuses(before)
    before.release()


def test_slots_start_without_unprivileged_user_namespaces(any_shared):
    agent = any_shared
    setting = "/proc/sys/kernel/unprivileged_userns_clone"
    if not sh(agent, f"test -e {setting}"):
        pytest.skip("only kernels of Debian have the setting")
    drop_ins = [f"/etc/systemd/system/{unit}.d/userns.conf" for unit in
                ("nbagent-launch.service", "nbagent-zygote@.service")]
    agent.expect("zygote .* (it|the zygote service) ended")
    new_zygote = "systemctl stop 'nbagent-zygote@*.service'; systemctl restart nbagent-launch.service"
    with execd_image(agent) as name:
        agent.configure(f"[images.{name}]\nwarm = 0\n")
        agent.wait_warm()
        try:
            agent.run("sh", "-ec", f"echo 0 > {setting}")
            found = finding(agent, "user namespaces")
            print(f"{agent.host.suite}: {found}")
            assert found["status"] == "fail" and "kernel.unprivileged_userns_clone=0" in found["found"]
            agent.run("sh", "-ec", found["mend"])
            assert all(sh(agent, f"test -e {path}") for path in drop_ins)
            assert finding(agent, "user namespaces")["status"] == "ok"
            # Zygotes and warm slots that were made before are in their user namespaces already.
            former = {slot["slot"] for slot in agent.slots()}
            agent.run("sh", "-ec", new_zygote)
            assert agent.api.delete("/api/pool").status == 200
            agent.wait(
                lambda: [s for s in agent.slots("warm") if s["launch"] == "fork" and s["slot"] not in former],
                "a slot of a new zygote",
            )
            for image, launch in (("minimal", "fork"), (name, "exec")):
                notebook = agent.open(image=image)
                assert notebook.run("6 * 7", timeout=300).text == "42"
                assert agent.api.get(f"/slots/{notebook.slot}").json()["launch"] == launch
                agent.release(notebook.slot)
        finally:
            agent.run("sh", "-c", f"echo 1 > {setting}; rm -f {' '.join(drop_ins)}; systemctl daemon-reload")
            agent.run("sh", "-c", new_zygote)
            agent.configure("")
