# SPDX-License-Identifier: BSD-3-Clause
"""The host's swap areas: those in compressed memory (zram) and those on a disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Swap:
    """The active swap areas, by their names in /proc/swaps."""

    in_memory: tuple[str, ...]
    on_disk: tuple[str, ...]

    @property
    def stays_in_memory(self) -> bool:
        """Whether there is swap and no page that is swapped out reaches a disk."""
        return bool(self.in_memory) and not self.on_disk


def read(root: Path = Path("/")) -> Swap:
    """The active swap areas; none when the kernel was built without swap and has no /proc/swaps. Raises OSError."""
    listed = root / "proc/swaps"
    areas = [line.split()[:2] for line in listed.read_text().splitlines()[1:]] if listed.exists() else []
    in_memory = tuple(name for name, kind in areas if kind == "partition" and _is_memory(name, root))
    return Swap(in_memory, tuple(name for name, _ in areas if name not in in_memory))


def _is_memory(name: str, root: Path) -> bool:
    """Whether a block device is zram without a backing device, to which zram would write pages.

    Only zram has comp_algorithm in sysfs; backing_dev exists when the kernel was built with CONFIG_ZRAM_WRITEBACK.
    """
    device = root / "sys/block" / os.path.basename(name)
    if not (device / "comp_algorithm").exists():
        return False
    backing = device / "backing_dev"
    return not backing.exists() or backing.read_text().strip() == "none"
