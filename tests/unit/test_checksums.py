# SPDX-License-Identifier: BSD-3-Clause
"""The checksums of an image's files."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nbagent.image import checksums

ALL_BYTES = 1 << 30


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "rootfs"
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/python3").write_bytes(b"\x7fELF" * 1000)
    os.link(root / "usr/bin/python3", root / "usr/bin/python")
    (root / "usr/bin/py").symlink_to("python3")
    (root / "bin").symlink_to("usr/bin")
    (root / "lost").symlink_to("/nowhere")
    os.mkfifo(root / "pipe")
    Path(os.fsdecode(os.fsencode(root) + b"/\xff\n")).write_text("a name that is not UTF-8")
    checksums.write(root, tmp_path / "files.json")
    return root


def damaged(root: Path, most_bytes: int = ALL_BYTES, seed: int = 1) -> list[str]:
    return sorted(checksums.damaged(root, root.parent / "files.json", most_bytes, random.Random(seed)))


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("other")


def test_a_tree_is_as_it_was(tree: Path) -> None:
    assert damaged(tree) == []


@pytest.mark.parametrize(("act", "names"), [
    (lambda root: (root / "usr/bin/python3").write_bytes(b"\x7fELF" * 999 + b"\x7fELE"),
     ["usr/bin/python", "usr/bin/python3"]),
    (lambda root: (root / "usr/bin/python").unlink(), ["usr/bin/python"]),
    (lambda root: (root / "usr/bin/new").write_text(""), ["usr/bin/new"]),
    (lambda root: replace_by_link(root / "usr/bin/python"), ["usr/bin/python"]),
    (lambda root: replace_by_link(root / "bin"), ["bin"]),
    (lambda root: (root / "pipe").unlink(), ["pipe"]),
], ids=["content", "missing", "new", "type", "target", "no pipe"])
def test_a_change_is_found(tree: Path, act: Callable[[Path], object], names: list[str]) -> None:
    act(tree)
    assert damaged(tree) == names


def test_sizes_of_all_files_are_compared_and_the_content_of_some(tree: Path) -> None:
    (tree / "usr/bin/python3").write_bytes(b"\x7fELE" * 1000)
    assert damaged(tree, 0) == []
    # One file is chosen, which is the third at times.
    assert {tuple(damaged(tree, 10, seed)) for seed in range(40)} == {(), ("usr/bin/python",), ("usr/bin/python3",)}
    (tree / "usr/bin/python3").write_bytes(b"")
    assert damaged(tree, 0) == ["usr/bin/python", "usr/bin/python3"]


def test_a_tree_or_file_that_cannot_be_read_is_an_error(tree: Path) -> None:
    with pytest.raises(FileNotFoundError):
        damaged(tree / "missing")
    (tree.parent / "files.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        damaged(tree)
