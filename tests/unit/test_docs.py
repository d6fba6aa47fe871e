# SPDX-License-Identifier: BSD-3-Clause
"""The functions, modules and paths that the pages in packaging/docs name exist."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from collections.abc import Iterable
from pathlib import Path

import pytest

from nbagent.config.host_config import HostConfig
from nbagent.gateway.settings import GatewaySettings

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "packaging/docs"
PACKAGES = {path.name for path in (ROOT / "nbagent").iterdir() if path.is_dir()}
NAME = re.compile(rf"`((?:{'|'.join(sorted(PACKAGES))})(?:\.\w+)+)`")
PATH = re.compile(r"`((?:nbagent|units|images|packaging|tests)/[\w./@-]+)`")


TEST = re.compile(r"`(test_\w+)`")
TESTS = {
    name
    for file in (ROOT / "tests").glob("*/test_*.py")
    for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
}
SETTINGS = {
    f"{section.name}.{setting.name}"
    for config in (HostConfig, GatewaySettings)
    for section in dataclasses.fields(config)
    if dataclasses.is_dataclass(kind := typing.get_type_hints(config)[section.name])
    for setting in dataclasses.fields(kind)
}


def defines(tree: ast.AST, names: list[str]) -> bool:
    """Whether nested definitions of these names are in a module or class."""
    if not names:
        return True
    body: Iterable[ast.stmt] = getattr(tree, "body", [])
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == names[0]:
            if defines(node, names[1:]):
                return True
        elif isinstance(node, ast.Assign | ast.AnnAssign) and len(names) == 1:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == names[0] for target in targets):
                return True
    return False


def exists(name: str) -> bool:
    """Whether a dotted name below nbagent is a module, or a definition in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ROOT.joinpath("nbagent", *parts[:count])
        for file in (module.with_suffix(".py"), module / "__init__.py"):
            if file.is_file():
                return defines(ast.parse(file.read_text()), parts[count:])
    return False


def test_a_name_is_found_only_when_it_is_defined() -> None:
    assert exists("core.model.Slot.claim_document") and exists("wire.operations.CLAIM") and exists("policy.pool")
    assert not exists("core.model.Slot.absent") and not exists("core.absent.Slot")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_names_paths_and_tests_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    # Settings such as `landing.rate` have the form of a name.
    missing = [name for name in NAME.findall(text) if not exists(name) and name not in SETTINGS]
    missing += [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    missing += [test for test in TEST.findall(text) if test not in TESTS]
    assert not missing


def test_the_page_lists_each_report_that_is_tried() -> None:
    trials = "".join(path.read_text() for path in (ROOT / "tests/conformance").glob("reported_*.py"))
    tried = re.findall(r'"([\w.-]+/[\w.-]+#\d+)"', trials)
    listed = re.findall(r"[\w.-]+/[\w.-]+#\d+", (DOCS / "conformance.md").read_text())
    assert len(tried) > 50 and not set(tried) - set(listed)


def test_the_walks_name_functions() -> None:
    assert len(NAME.findall((DOCS / "architecture.md").read_text())) > 60
