# SPDX-License-Identifier: BSD-3-Clause
"""The collection in packaging/ansible without a fleet: lint, syntax, and errors in variables.

`make test-ansible` runs tests/ansible, in which its playbooks install and change a fleet.
"""

import re
import subprocess

import pytest

import playbooks
from playbooks import Ansible

GATEWAY = {"gw": {"nbagent_gateway_address": "192.0.2.1"}}


@pytest.fixture(scope="module", params=playbooks.VERSIONS)
def ansible(request, tmp_path_factory):
    return Ansible(request.param, tmp_path_factory.mktemp(request.param))


def host(label="a", address="192.0.2.11"):
    return {"nbagent_host_label": label, "nbagent_host_address": address}


def test_playbooks_pass_the_production_profile_of_ansible_lint(tmp_path):
    ansible = Ansible("pypi", tmp_path)
    lint = subprocess.run([ansible.bin / "ansible-lint", "--nocolor"], cwd=playbooks.COLLECTION, check=False,
                          env=ansible.environment, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout + lint.stderr
    assert "Profile 'production' was required, and it passed" in lint.stdout + lint.stderr


def test_each_playbook_has_valid_syntax(ansible):
    ansible.inventory({"a": host()}, GATEWAY)
    names = [f"nbagent.fleet.{path.stem}" for path in sorted((playbooks.COLLECTION / "playbooks").glob("*.yml"))]
    done = ansible.call(str(ansible.bin / "ansible-playbook"), "-i", "inventory.json", "--syntax-check", *names)
    assert done.returncode == 0 and len(names) == 6, done.stdout + done.stderr


# Hosts that do not exist: each error is found before the first connection.
WRONG = {
    "n1": ({"nbagent_host_address": "192.0.2.11"}, "missing required arguments: nbagent_host_label"),
    "n2": (host("A-1"), "nbagent_host_label of n2 is A-1: expected 1 to 16 of a-z and 0-9"),
    "n3": (host("x"), "nbagent_host_label of n3 is x, as that of n4: expected one of its own"),
    "n4": (host("x"), "nbagent_host_label of n4 is x, as that of n3: expected one of its own"),
    "n5": (host("e", "c07.example.org"), "nbagent_host_address of n5 is c07.example.org: expected an IP address"),
    "n6": (host("f") | {"nbagent_host_ready_timeout_s": "soon"}, "nbagent_host_ready_timeout_s"),
}


def test_an_error_names_the_variable(ansible):
    ansible.inventory({name: variables for name, (variables, _) in WRONG.items()}, GATEWAY)
    done = ansible.run("site")
    assert done.status != 0 and not any(done.changed.values())
    for name, (_, expected) in WRONG.items():
        (error,) = re.findall(rf"^(?:fatal|failed): \[{name}\].*", done.output, re.MULTILINE)
        assert expected in error


def test_a_playbook_for_one_host_requires_its_name(ansible):
    ansible.inventory({"a": host()}, GATEWAY)
    for target in ({}, {"nbagent_target": "absent"}):
        done = ansible.run("remove_host", **target)
        assert done.status != 0 and f"nbagent_target is {target.get('nbagent_target', 'not set')}" in done.output


def test_a_malformed_key_of_the_dns_is_named_and_not_shown(ansible):
    ansible.inventory({}, {}, {"nbagent_dns_servers": {"ns": {"nbagent_dns_server_address": "192.0.2.53"}}},
                      nbagent_dns_zone="hosts.test", nbagent_dns_key="hosts:c2VjcmV0")
    done = ansible.run("site")
    assert done.status != 0 and "nbagent_dns_key of ns: expected ALGORITHM:NAME:SECRET" in done.output
    assert "c2VjcmV0" not in done.output


def test_a_gateway_without_an_address_for_its_metrics_is_named(ansible):
    ansible.inventory({}, GATEWAY, {"nbagent_monitoring": {"m": {}}})
    done = ansible.run("site", "--limit", "m")
    assert done.status != 0 and "nbagent_gateway_metrics of gw is not set: expected ADDRESS:PORT" in done.output
