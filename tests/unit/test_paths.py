# SPDX-License-Identifier: BSD-3-Clause
"""Paths on a host are defined once, in nbagent.core.paths, and packaging/nbagent.tmpfiles creates their directories."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from nbagent.core import paths

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
