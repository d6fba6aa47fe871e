# SPDX-License-Identifier: BSD-3-Clause
"""Entries for the journal: a journald that does not read delays a service once, and the lost entries are counted."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from nbagent.core import journald
from nbagent.core.journald import Journal

SEND = Journal.send


class Journald:
    """The socket of journald."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)

    def read(self):
        entries = []
        with contextlib.suppress(BlockingIOError):
            while True:
                entries.append(self.socket.recv(65536).decode())
        return entries


@pytest.fixture
def daemon(settled, tmp_path):
    daemon = Journald(tmp_path / "socket")
    yield daemon
    daemon.socket.close()


@pytest.fixture
def journal(settled, tmp_path, monkeypatch):
    """Takes the place of the fixture that keeps entries of other tests out of the journal."""
    monkeypatch.setattr(Journal, "send", SEND)
    monkeypatch.setattr(journald, "STALL_S", 0.2)
    journal = Journal(lambda count: {"MESSAGE": f"{count} lost"}, str(tmp_path / "socket"))
    yield journal
    journal.close()


def test_an_entry_has_a_line_for_each_field(daemon, journal):
    journal.send({"MESSAGE": "slot a is warm", "PRIORITY": "6"})
    assert daemon.read() == ["MESSAGE=slot a is warm\nPRIORITY=6\n"]


def test_a_journald_that_does_not_read_delays_once_and_the_losses_are_counted(daemon, journal):
    began_s, sent = time.monotonic(), 0
    while not journal._stalled:
        journal.send({"MESSAGE": str(sent)})
        sent += 1
    assert time.monotonic() - began_s >= 0.2
    began_s = time.monotonic()
    for _ in range(100):
        journal.send({"MESSAGE": "no room"})
    assert time.monotonic() - began_s < 0.2
    assert len(daemon.read()) == sent - 1
    journal.send({"MESSAGE": "room"})
    assert daemon.read() == ["MESSAGE=101 lost\n", "MESSAGE=room\n"]


def test_a_new_socket_of_journald_is_found_and_without_one_nothing_fails(tmp_path, daemon, journal):
    journal.send({"MESSAGE": "one"})
    assert len(daemon.read()) == 1
    daemon.socket.close()
    (tmp_path / "socket").unlink()
    journal.send({"MESSAGE": "two"})
    second = Journald(tmp_path / "socket")
    with second.socket:
        journal.send({"MESSAGE": "three"})
        assert second.read() == ["MESSAGE=1 lost\n", "MESSAGE=three\n"]


def test_a_text_that_is_too_long_is_cut(daemon, journal):
    journal.send({"MESSAGE": "x" * 1_000_000})
    entry, = daemon.read()
    assert 1000 < len(entry) < 20000
