# SPDX-License-Identifier: BSD-3-Clause
"""The users of an image, from its own /etc/passwd and /etc/group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from nbagent.image import ids
from nbagent.image import manifest as manifests
from nbagent.untrusted.tree import Tree


class Account(NamedTuple):
    """A user of the image. `home` is "" when the image does not have it."""

    name: str
    uid: int
    gid: int
    home: str


def account(tree: Tree, wanted: str) -> Account:
    """The account that `wanted` names as a container's USER does: a name or id, with a group after a colon, or "".

    A user that the image does not have is root, as is "".
    """
    user, _, group = wanted.partition(":")
    found = Account("root", 0, 0, "")
    if user.isascii() and user.isdigit() and int(user) < ids.COUNT:
        found = Account("", int(user), 0, "")
    for fields in _lines(tree, "passwd", 7):
        if user and user in (fields[0], fields[2]) and (numbers := _numbers(fields[2:4])) is not None:
            found = Account(fields[0], numbers[0], numbers[1], fields[5])
            break
    for fields in _lines(tree, "group", 4):
        if group and group in (fields[0], fields[2]) and (numbers := _numbers(fields[2:3])) is not None:
            return found._replace(gid=numbers[0])
    return found


def _numbers(fields: list[str]) -> list[int] | None:
    if all(field.isascii() and field.isdigit() and int(field) < ids.COUNT for field in fields):
        return [int(field) for field in fields]
    return None


def _lines(tree: Tree, name: str, fields: int) -> Iterator[list[str]]:
    try:
        file = tree.open_regular(("etc", name))
    except OSError:
        return
    if file is not None:
        with file:
            content = file.read(manifests.MAX_BYTES)
        for line in content.decode(errors="replace").splitlines():
            if len(found := line.split(":")) == fields:
                yield found
