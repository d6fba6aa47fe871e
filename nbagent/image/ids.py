"""Which host ids an image's files and processes get: 65,536 that nobody else uses. Pure but for `reserved`.

The default area is 0x70000000 to 0x7FFDFFFF, 4,094 images. In systemd's plan of ids
(https://systemd.io/UIDS-GIDS/) nobody has it: what lies below, 0x80000 to 0x6FFFFFFF, is for nspawn and
other containers, above are foreign images, and from 0x80000000 on many programs take an id for negative.
useradd's subordinate ids begin at 100000 and end far below.
"""

from __future__ import annotations

import grp
import pwd
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from nbagent.core.errors import NbagentError

COUNT = 0x10000
BASES = range(0x70000000, 0x7FFE0000, COUNT)
SUBORDINATE = (Path("/etc/subuid"), Path("/etc/subgid"))


def free_base(bases: range, used: Collection[int], reserved: Iterable[range]) -> int:
    """The first of `bases` that is not `used` and overlaps nothing `reserved`. Raises NbagentError."""
    taken = list(reserved)
    for base in bases:
        if base not in used and not any(r.start < base + COUNT and base < r.stop for r in taken):
            return base
    raise NbagentError(f"no free range of {COUNT} ids from {bases.start:#x} on; remove an image")


def reserved(subordinate: Iterable[Path] = SUBORDINATE) -> Iterator[range]:
    """Ids that this host has given away: its users and groups, and subordinate ids."""
    for user in pwd.getpwall():
        yield range(user.pw_uid, user.pw_uid + 1)
    for group in grp.getgrall():
        yield range(group.gr_gid, group.gr_gid + 1)
    for path in subordinate:
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            continue
        for line in lines:
            _, _, numbers = line.partition(":")
            start, _, count = numbers.partition(":")
            if start.isdigit() and count.isdigit():
                yield range(int(start), int(start) + int(count))
