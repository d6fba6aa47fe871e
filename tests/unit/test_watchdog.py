# SPDX-License-Identifier: BSD-3-Clause
"""The notifications of systemd's watchdog, and accept(2) without descriptors."""

from __future__ import annotations

import errno
import re
import socket
from pathlib import Path

import pytest

from nbagent.systemd import watchdog
from nbagent.systemd.watchdog import Watchdog
from nbagent.wire import accepting
from nbagent.wire.accepting import accept_now

UNITS = Path(__file__).resolve().parents[2] / "units"


def test_systemd_is_notified_three_times_in_its_interval(monkeypatch):
    clock, sent = [100.0], []
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog.daemon, "notify", sent.append)
    dog = Watchdog()
    assert dog.notify() == pytest.approx(10)
    clock[0] += 4
    assert dog.notify() == pytest.approx(6) and sent == ["WATCHDOG=1"]
    clock[0] += 7
    assert dog.notify() == pytest.approx(10) and sent == ["WATCHDOG=1"] * 2


def test_without_a_watchdog_systemd_is_not_notified(monkeypatch):
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    monkeypatch.setattr(watchdog.daemon, "notify", pytest.fail)
    assert Watchdog().notify() > 60


@pytest.mark.parametrize("name", ["nbagent", "nbagent-launch", "nbagent-network", "nbagent-units"])
def test_services_with_a_loop_of_their_own_have_a_watchdog(name):
    text = (UNITS / f"{name}.service").read_text()
    assert re.search(r"^WatchdogSec=30$", text, re.M) and re.search(r"^WatchdogSignal=SIGKILL$", text, re.M)


class Exhausted:
    """A listening socket whose accept(2) fails."""

    def __init__(self, number):
        self.number = number

    def accept(self):
        raise OSError(self.number, "refused")


def test_a_service_without_descriptors_accepts_later_and_does_not_end(monkeypatch):
    monkeypatch.setattr(accepting, "ACCEPT_PAUSE_S", 0.0)
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        assert accept_now(Exhausted(number)) is None
    with pytest.raises(OSError, match="refused"):
        accept_now(Exhausted(errno.EINVAL))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        assert accept_now(listener) is None
        with socket.create_connection(listener.getsockname()), accept_now(listener) as connection:
            assert connection.getpeername()[0] == "127.0.0.1"
