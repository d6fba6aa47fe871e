# SPDX-License-Identifier: BSD-3-Clause
"""share_memory(): makes the pages of a zygote stay shared with the processes forked from it.

A forked process shares a page with its parent until one of the two writes into it. CPython writes reference counts
into objects and profile data into code, and both allocators place new objects between old ones, so that without further
measures a forked kernel soon has a private copy of most pages that it uses. The four measures, each in its own module:

    snapshot     the heap is a sealed file in memory, so that fork(2) has few page tables to copy
    code_layout  the code that slots run lies together, so that specialising it writes into few pages
    immortal     reference counts of existing objects never change
    heap_fill    free blocks between existing objects are taken, so that new objects get pages of their own

They depend on the internals of CPython and glibc and do nothing where these differ. An image turns all of them off with
`share_memory = false` in /etc/nbagent-image.toml, for example because one of its libraries brings its own allocator;
its zygote then forks with ordinary memory.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
from typing import Iterator

from nbagent.zygote.memory import snapshot

# The zygote's command-line option for share_memory = false. It is not part of the zygote's first message because that
# is received only after json and socket are imported, whose memory belongs into the snapshot.
PRIVATE_MEMORY_OPTION = "--private-memory"
# The option of a zygote that is to be ready soon: without warm-up and with ordinary memory.
QUICK_OPTION = "--quick"


class MemorySharing:
    """The steps by which a zygote prepares its memory before it forks, in the order of the methods.

    When sharing is off, `arrange_code` and `freeze` do nothing.
    """

    # The other modules are imported in the methods, so that they too are loaded after the snapshot has begun.

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def fork_noop(self) -> None:
        """Forks a child that exits at once, so that libraries end their threads by their pthread_atfork(3) handlers."""
        snapshot.fork_noop()

    @contextlib.contextmanager
    def arrange_code(self) -> Iterator[None]:
        """Records the code that runs within the `with` block, in all threads, and moves it together at the end."""
        if not self.enabled:
            yield
            return
        from nbagent.zygote.memory import code_layout

        with code_layout.record() as runs:
            yield
        code_layout.relocate(runs)

    def freeze(self) -> None:
        """Makes everything loaded so far shared by all later forks. With one thread, after all loading."""
        if not self.enabled:
            return
        from nbagent.zygote.memory import heap_fill, immortal

        immortal.freeze()
        heap_fill.fill()
        snapshot.seal()


def share_memory(enabled: bool) -> MemorySharing:
    """Begins sharing if `enabled`. Before anything else is imported, with one thread."""
    if enabled:
        snapshot.begin()
    return MemorySharing(enabled)
