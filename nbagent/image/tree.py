# SPDX-License-Identifier: BSD-3-Clause
"""The root filesystem of an image as a Tree: no symbolic link is followed, because an image may be hostile."""

from __future__ import annotations

from pathlib import Path

from nbagent.untrusted.tree import Tree


def open_tree(root: Path) -> Tree:
    return Tree(str(root), follow_links=False, directory_mode=0o700)
