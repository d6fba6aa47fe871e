# SPDX-License-Identifier: BSD-3-Clause
"""The messages of a kernel whose page is closed, which jupyter_server keeps for the page's return, within a limit.

Without a limit a cell that prints takes the whole memory of its slot, in the server, where no restart of the kernel
frees it. Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

from typing import Callable, List, Tuple

LIMIT_BYTES = 16 << 20
# A message on a channel, as the parts of a zmq message.
Item = Tuple[str, List[bytes]]


class OutputBuffer(List[Item]):
    """A list of at most `limit_bytes`, which drops its oldest output beyond that.

    `note(dropped, parts)` makes the message that stands for the output, where `parts` is the newest that was dropped.
    Replies, and the kernel's states, are kept.
    """

    def __init__(self, note: Callable[[int, List[bytes]], List[bytes]], limit_bytes: int = LIMIT_BYTES) -> None:
        super().__init__()
        self._note, self._limit_bytes = note, limit_bytes
        self._bytes = self._dropped = 0
        self._noted: List[bytes] = []

    def append(self, item: Item) -> None:
        super().append(item)
        self._bytes += _size(item)
        if self._bytes > self._limit_bytes:
            self._drop()

    def _drop(self) -> None:
        """Drops output until half of the limit is left, so that this is seldom done."""
        items, kept, wanted = list(self), [], self._bytes - self._limit_bytes // 2  # type: List[Item], List[Item], int
        newest, place = self._noted, 0
        for number, item in enumerate(items):
            if wanted <= 0:
                kept += items[number:]
                break
            if item[0] != "iopub" or any(b'"status"' in part for part in item[1][:4]):
                kept.append(item)
                continue
            wanted, place = wanted - _size(item), len(kept)
            if item[1] is not self._noted:
                self._dropped, newest = self._dropped + 1, item[1]
        self._noted = self._note(self._dropped, newest)
        kept.insert(place, ("iopub", self._noted))
        self[:] = kept
        self._bytes = sum(map(_size, kept))


def _size(item: Item) -> int:
    return sum(map(len, item[1]))
