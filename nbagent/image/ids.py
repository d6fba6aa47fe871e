# SPDX-License-Identifier: BSD-3-Clause
"""The range of 65,536 host ids of an image's files and processes. Pure, except for `reserved`.

The default area is 0x70000000 to 0x7FFDFFFF, for 4,094 images. systemd's allocation of ids
(https://systemd.io/UIDS-GIDS/) does not use it: 0x80000 to 0x6FFFFFFF are for nspawn and other containers, the ids
above the area are for foreign images, and from 0x80000000 on many programs read an id as a negative number. useradd's
subordinate ids begin at 100000 and end far below.
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
    """The first of `bases` that is not in `used` and does not overlap a `reserved` range. Raises NbagentError."""
    taken = list(reserved)
    for base in bases:
        if base not in used and not any(r.start < base + COUNT and base < r.stop for r in taken):
            return base
    raise NbagentError(f"no free range of {COUNT} host ids from {bases.start:#x} on; remove an image")


def reserved(subordinate: Iterable[Path] = SUBORDINATE) -> Iterator[range]:
    """The ids of this host's users and groups, and its subordinate ids."""
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
