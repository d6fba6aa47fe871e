# SPDX-License-Identifier: BSD-3-Clause
"""A host that consists of a few files in a directory."""

from __future__ import annotations

from pathlib import Path


def host(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
