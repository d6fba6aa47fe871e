# SPDX-License-Identifier: BSD-3-Clause
"""Paths on a host are defined once, in nbagent.core.paths, and packaging/nbagent.tmpfiles creates their directories.
The directory of the build cache is that of $NBAGENT_CACHE, if it has one.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from nbagent.core import paths
from testhost_driver import entry, rootfs

TOP = Path(__file__).resolve().parents[2]
ON_A_HOST = re.compile(r"/(?:run|etc|var/lib|var/cache)/nbagent(?:/[\w./-]+|-gateway[\w./-]*)?")
# Paths inside a slot or a zygote, which are mounted over those of the host.
INSIDE_A_SLOT = {"sandbox/plan.py", "runtime/zygote_service.py"}


def test_no_other_module_has_a_path_literal() -> None:
    found = []
    for file in (TOP / "nbagent").rglob("*.py"):
        name = str(file.relative_to(TOP / "nbagent"))
        if name == "core/paths.py" or name in INSIDE_A_SLOT:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and ON_A_HOST.fullmatch(node.value):
                found.append(f"{name}:{node.lineno}: {node.value}")
    assert found == []


def test_tmpfiles_creates_the_directories() -> None:
    lines = (TOP / "packaging/nbagent.tmpfiles").read_text().splitlines()
    created = {Path(line.split()[1]) for line in lines if line.startswith("d ")}
    assert {paths.RUN, paths.SLOTS, paths.SESSIONS, paths.SANDBOX, paths.IMAGES} <= created


@pytest.mark.parametrize(("value", "expected"), [("", "/var/cache/nbagent-build"), ("/elsewhere", "/elsewhere")])
def test_an_empty_cache_variable_is_as_none(monkeypatch, value, expected) -> None:
    monkeypatch.setenv("NBAGENT_CACHE", value)
    assert str(rootfs.cache()) == expected
    for program in ("build-deb", "build-repo"):
        assert str(runpy.run_path(str(TOP / "packaging" / program))["CACHE"]) == expected
    for settings in ([], [f"NBAGENT_CACHE={value}"]):
        make = ["make", "-s", "-C", TOP, "--eval", "show: ; @echo $$NBAGENT_CACHE $(DIST)", "show", *settings]
        shown = subprocess.run(make, check=True, capture_output=True, text=True, env=os.environ).stdout
        assert shown.split() == [expected, f"{expected}/dist"]


def test_an_empty_variable_for_the_state_of_test_hosts_is_as_none(monkeypatch) -> None:
    monkeypatch.setenv("NBAGENT_TESTHOST_STATE", "")
    assert entry.state_directory() == "/var/lib/nbagent-testhost"


def test_no_program_takes_an_empty_cache_variable_as_it_is() -> None:
    takes = re.compile(r'''environ(\.get\(|\[)"NBAGENT_CACHE"[],]|\$\{?NBAGENT_CACHE[-}"]|NBAGENT_CACHE \?=''')
    files = [file for part in ("images", "nbagent", "packaging", "tests") for file in (TOP / part).rglob("*")]
    files = [file for file in (*files, TOP / "Makefile") if file.is_file() and file != Path(__file__)]
    assert [str(file) for file in files if takes.search(file.read_text(errors="replace"))] == []
