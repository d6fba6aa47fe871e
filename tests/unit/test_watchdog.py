# SPDX-License-Identifier: BSD-3-Clause
"""The notifications of systemd's watchdog, and accept(2) without descriptors."""

from __future__ import annotations

import errno
import os
import re
import resource
import socket
from pathlib import Path

import pytest

from nbagent.systemd import watchdog
from nbagent.systemd.watchdog import Watchdog
from nbagent.wire import accepting
from nbagent.wire.accepting import accept_now

UNITS = Path(__file__).resolve().parents[2] / "units"


def listening(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind(str(path))
    made.setblocking(False)
    return made


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    """The socket of a systemd with a watchdog of 30 s."""
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with listening(tmp_path / "notify") as made:
        yield made


def received(systemd: socket.socket) -> int:
    """How often a watchdog has notified systemd since the last call."""
    for count in range(10):
        try:
            assert systemd.recv(100) == b"WATCHDOG=1"
        except BlockingIOError:
            return count
    return 10


def test_systemd_is_notified_three_times_in_its_interval(monkeypatch, systemd):
    clock = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    dog = Watchdog()
    assert dog.notify() == pytest.approx(10) and received(systemd) == 1
    clock[0] += 4
    assert dog.notify() == pytest.approx(6) and received(systemd) == 0
    clock[0] += 7
    assert dog.notify() == pytest.approx(10) and received(systemd) == 1
    dog.close()


def test_systemd_is_notified_while_no_file_can_be_opened_and_after_it_has_made_its_socket_anew(
    monkeypatch, systemd, tmp_path
):
    clock = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock[0])
    dog = Watchdog()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        dog.notify()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert received(systemd) == 1
    systemd.close()
    Path(os.environ["NOTIFY_SOCKET"]).unlink()
    clock[0] += 11
    assert dog.notify() == pytest.approx(10)
    with listening(Path(os.environ["NOTIFY_SOCKET"])) as again:
        clock[0] += 11
        dog.notify()
        assert received(again) == 1
    dog.close()


def test_without_a_watchdog_systemd_is_not_notified(monkeypatch, systemd):
    monkeypatch.delenv("WATCHDOG_USEC")
    assert Watchdog().notify() > 60 and received(systemd) == 0


@pytest.mark.parametrize("name", ["nbagent", "nbagent-launch", "nbagent-network", "nbagent-units"])
def test_services_with_a_loop_of_their_own_have_a_watchdog(name):
    text = (UNITS / f"{name}.service").read_text()
    assert re.search(r"^WatchdogSec=30$", text, re.M) and re.search(r"^WatchdogSignal=SIGKILL$", text, re.M)


def test_a_call_of_pid_1_that_blocks_the_units_service_ends_before_its_watchdog():
    text = (UNITS / "nbagent-units.service").read_text()
    interval_s = int(re.search(r"^WatchdogSec=(\d+)$", text, re.M)[1])
    longest_s = int(re.search(r"^Environment=SYSTEMD_BUS_TIMEOUT=(\d+)s$", text, re.M)[1])
    # The watchdog is notified before a call when a third of the interval has passed.
    assert interval_s / 3 + longest_s < interval_s


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
