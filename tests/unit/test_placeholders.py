# SPDX-License-Identifier: BSD-3-Clause
"""Placeholders are found and filled in dicts, lists and attributes, whether CPython's collector tracks them or not."""

from __future__ import annotations

import _asyncio
import gc

import pytest

from nbagent.zygote.placeholders import PlaceholderSubstitution

HERE = "/place/" + "0" * 9 + "/"


class Holder:
    """An object with attributes."""

    def __init__(self) -> None:
        # Joined at run time, so that no constant of this module contains the name.
        self.address = "http://host" + HERE
        self.variables = {"ROOT": "/home", "URL": self.address + "x"}
        self.listed = ["a", HERE]
        self.nested = {"settings": {"url": HERE, "other": [1, {"deep": HERE}]}}
        self.kept = "other"


def test_the_free_list_of_asyncio_is_not_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    referents, visited = gc.get_referents, []

    def note_and_list(*objects: object) -> list[object]:
        visited.append(any(known is _asyncio for known in objects))
        return referents(*objects)

    monkeypatch.setattr(gc, "get_referents", note_and_list)
    PlaceholderSubstitution(HERE, without=globals())
    assert visited and not any(visited)


def test_each_string_with_a_placeholder_is_filled() -> None:
    holder = Holder()
    assert not gc.is_tracked(holder.variables)
    PlaceholderSubstitution(HERE, without=globals()).fill("/user/a/")
    assert (holder.address, holder.kept) == ("http://host/user/a/", "other")
    assert holder.variables == {"ROOT": "/home", "URL": "http://host/user/a/x"}
    assert holder.listed == ["a", "/user/a/"]
    assert holder.nested == {"settings": {"url": "/user/a/", "other": [1, {"deep": "/user/a/"}]}}
