# SPDX-License-Identifier: BSD-3-Clause
"""The limits that a slot runs into, from one sample to the next. Pure.

Each is reported once in an episode. The episode of refused tasks ends with a sample since which no task was refused,
that of full storage when there is room again.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of the size, and of the number of files. 256 MiB are full with less than 5 MiB free, because a notebook cannot be
# saved where a write of 4 MiB fails.
FULL, ROOMY = 0.98, 0.9


@dataclass(frozen=True)
class Storage:
    """The slot's file system: bytes and files, in use and at most. All 0 when it could not be read."""

    used_bytes: int = 0
    size_bytes: int = 0
    used_files: int = 0
    most_files: int = 0

    @property
    def share(self) -> float:
        """The part in use, 0 to 1, of bytes or of files, whichever is more."""
        pairs = ((self.used_bytes, self.size_bytes), (self.used_files, self.most_files))
        return max(used / size if size else 0.0 for used, size in pairs)


@dataclass(frozen=True)
class Trouble:
    """The limits that a slot runs into at one sample, and the count that the next sample compares with."""

    tasks_refused: int = 0
    refuses_tasks: bool = False
    storage_full: bool = False


def find(before: Trouble, tasks_refused: int, storage: Storage) -> Trouble:
    """The trouble at this sample, given that of the sample before; `tasks_refused` counts since the slot's start."""
    return Trouble(
        tasks_refused=tasks_refused,
        refuses_tasks=tasks_refused > before.tasks_refused,
        storage_full=storage.share >= (ROOMY if before.storage_full else FULL),
    )
