"""Which of its limits a slot runs into, from one look to the next. Pure.

Each is told once an episode: tasks are refused until a look finds none refused since the look
before, and storage is full until there is room again.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of the size, and of the number of files. What has no room for a write of 4 MiB in 256 has none for a notebook.
FULL, ROOMY = 0.98, 0.9


@dataclass(frozen=True)
class Storage:
    """The slot's file system: bytes and files, in use and at most. All 0: it could not be looked at."""

    used_bytes: int = 0
    size_bytes: int = 0
    used_files: int = 0
    most_files: int = 0

    @property
    def share(self) -> float:
        """How full it is, 0 to 1, of what is fuller."""
        pairs = ((self.used_bytes, self.size_bytes), (self.used_files, self.most_files))
        return max(used / size if size else 0.0 for used, size in pairs)


@dataclass(frozen=True)
class Trouble:
    """The limits that hold a slot at one look, and the count that the next look starts from."""

    tasks_refused: int = 0
    refuses_tasks: bool = False
    storage_full: bool = False


def find(before: Trouble, tasks_refused: int, storage: Storage) -> Trouble:
    """The trouble at this look, given that at the look before; `tasks_refused` counts a slot's whole life."""
    return Trouble(
        tasks_refused=tasks_refused,
        refuses_tasks=tasks_refused > before.tasks_refused,
        storage_full=storage.share >= (ROOMY if before.storage_full else FULL),
    )
