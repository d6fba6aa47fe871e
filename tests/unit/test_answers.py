# SPDX-License-Identifier: BSD-3-Clause
"""Answers that a server keeps: the same text while the files are the same, computed again when one has changed."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def tornado(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decorator that a handler needs of tornado, which this machine may lack."""
    web = SimpleNamespace(authenticated=lambda get: get)
    monkeypatch.setitem(sys.modules, "tornado", SimpleNamespace(web=web))


class Handler:
    """A request to the server: what it was answered, and how often that was computed."""

    computed = 0

    def __init__(self, status: int = 200) -> None:
        self.status, self.sent, self._headers = status, "", {"Content-Type": "text/plain"}

    def get_status(self) -> int:
        return self.status

    def set_header(self, name: str, value: str) -> None:
        self._headers[name] = value

    def finish(self, text: str) -> None:
        self.sent = text


async def compute(handler: Handler, name: str = "") -> None:
    Handler.computed += 1
    handler.set_header("Content-Type", "application/json")
    handler.finish(f"{name} {Handler.computed}")


@pytest.fixture
def get(tmp_path: Path) -> Iterator[Callable[..., Handler]]:
    """Sends a request whose answer depends on the files of a directory."""
    from nbagent.zygote.answers import Answers

    Handler.computed = 0
    method = Answers(
        compute, lambda _handler, name="": None if name == "never" else name, lambda _: [(str(tmp_path), 2)]
    ).method()

    def call(status: int = 200, **named: Any) -> Handler:
        handler = Handler(status)
        asyncio.run(method(handler, **named))
        return handler

    yield call


def test_an_answer_is_computed_once_for_each_request(get: Callable[..., Handler]) -> None:
    assert [get().sent, get().sent, get(name="x").sent, get(name="x").sent] == [" 1", " 1", "x 2", "x 2"]
    assert get()._headers["Content-Type"] == "application/json"


def test_an_answer_is_computed_again_when_a_file_changes(get: Callable[..., Handler], tmp_path: Path) -> None:
    before = get().sent
    (tmp_path / "one").mkdir()
    assert get().sent != before
    before = get().sent
    (tmp_path / "one/two").write_text("1")
    assert get().sent != before
    before = get().sent
    os.utime(tmp_path / "one/two", (1, 1))
    assert get().sent != before
    before = get().sent
    (tmp_path / "one/two").unlink()
    assert get().sent != before
    assert get().sent == get().sent


def test_neither_errors_nor_requests_with_an_effect_are_kept(get: Callable[..., Handler]) -> None:
    assert get(500).sent != get(500).sent
    assert get(name="never").sent != get(name="never").sent


def test_too_many_files_are_not_compared(
    get: Callable[..., Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbagent.zygote import answers

    monkeypatch.setattr(answers, "FILES_MAX", 3)
    assert get().sent == get().sent
    for number in range(4):
        (tmp_path / str(number)).touch()
    assert get().sent != get().sent


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    from nbagent.zygote.answers import state_of

    (tmp_path / "self").symlink_to(tmp_path)
    assert len(state_of([(str(tmp_path), 4)]) or ()) == 5
    assert state_of([(str(tmp_path / "none"), 4)]) == ()
