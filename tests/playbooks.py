# SPDX-License-Identifier: BSD-3-Clause
"""Runs the collection in packaging/ansible by real ansible-core, Debian's or PyPI's, against test hosts."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import product

COLLECTION = product.TOP / "packaging/ansible"
REQUIREMENTS = product.TOP / "tests/requirements-ansible.txt"
VERSIONS = ("debian", "pypi")
VERSION = (product.TOP / "packaging/debian/changelog").read_text().partition("(")[2].partition(")")[0]


def tools(version: str) -> Path:
    """The directory of the commands of an ansible-core; PyPI's is installed into the cache."""
    if version == "debian":
        return Path("/usr/bin")
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:16]
    venv = product.CACHE / f"ansible-{digest}"
    if not (venv / "ready").exists():
        product.say(f"installing {REQUIREMENTS.name} into {venv}")
        subprocess.run(["/usr/bin/python3", "-m", "venv", "--clear", venv], check=True)
        subprocess.run([venv / "bin/python", "-m", "pip", "install", "-q", "-r", REQUIREMENTS], check=True)
        (venv / "ready").touch()
    return venv / "bin"


class Run:
    """A playbook that has ended."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status, self.output = done.returncode, done.stdout + done.stderr
        rows = re.findall(r"^(\S+) +: ok=\d+ +changed=(\d+)", self.output.partition("PLAY RECAP")[2], re.MULTILINE)
        self.changed = {name: int(count) for name, count in rows}


class Ansible:
    """An ansible-core with an inventory of test hosts, in a directory of its own."""

    def __init__(self, version: str, directory: Path) -> None:
        self.bin, self.directory = tools(version), directory
        link = directory / "ansible_collections/nbagent/fleet"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(COLLECTION)
        self.environment = os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "ANSIBLE_COLLECTIONS_PATH": str(directory),
            "ANSIBLE_HOME": str(directory / "home"),
            "ANSIBLE_LOCAL_TEMP": str(directory / "local"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_SSH_ARGS": "",
            "ANSIBLE_SSH_TRANSFER_METHOD": "piped",
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def inventory(
        self, hosts: Mapping[str, Mapping[str, Any]], gateways: Mapping[str, Mapping[str, Any]],
        more: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None, **variables: Any,
    ) -> None:
        """Writes the inventory: the variables of hosts, gateways and `more` groups by the hosts' names, and of all."""
        common = {
            "ansible_ssh_executable": str(product.TOP / "tests/ansible/ssh"),
            "ansible_python_interpreter": "/usr/bin/python3",
            "nbagent_packages_directory": str(product.DIST),
            # The directory may have packages of other versions too.
            "nbagent_packages_version": VERSION,
        }
        members = {"nbagent_hosts": hosts, "nbagent_gateways": gateways, **(more or {})}
        groups = {group: {"hosts": names} for group, names in members.items()}
        document = {"all": {"vars": common | variables, "children": groups}}
        (self.directory / "inventory.json").write_text(json.dumps(document))

    def run(self, playbook: str, *options: str, **variables: Any) -> Run:
        """Runs a playbook of the collection, `site` for example, and returns it when it has ended."""
        argv = [self.bin / "ansible-playbook", "-i", "inventory.json", f"nbagent.fleet.{playbook}", *options]
        argv += ["-e", json.dumps(variables)]
        return Run(self.call(*map(str, argv)))

    def call(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, cwd=self.directory, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )

    def must(self, playbook: str, *options: str, **variables: Any) -> dict[str, int]:
        """As `run`, for a playbook that must succeed; returns the number of changes by host."""
        done = self.run(playbook, *options, **variables)
        assert done.status == 0, done.output
        return done.changed
