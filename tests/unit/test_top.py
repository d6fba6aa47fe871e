# SPDX-License-Identifier: BSD-3-Clause
"""`nbagent top`: its measurement and order as functions, and the command in a terminal against the real API."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console
from test_cli import ROOT, run, supervisor, url  # noqa: F401 - fixtures

from nbagent.cli import top

STATS = {"label": "c07", "available": 3, "capacity": 4, "uptime_s": 60, "draining": False, "ready": True, "claimed": 1,
         "warm": 2, "starting": 0, "stopping": 0, "memory_available_bytes": 1 << 30, "faults": {}}


def slots(**cpu_s: float | None) -> list[dict[str, Any]]:
    return [{"slot": name, "cpu_s": value} for name, value in cpu_s.items()]


def test_the_use_of_the_processor_is_that_between_two_samples() -> None:
    before = top.Sample(10.0, STATS, slots(a=5.0, b=7.0, ended=9.0, unknown=None))
    after = top.Sample(12.0, STATS, slots(a=6.0, b=7.0, new=1.0, unknown=2.0))
    found = {slot["slot"]: slot["cpu_percent"] for slot in top.measured(before, after)}
    assert found == {"a": 50.0, "b": 0.0, "new": None, "unknown": None}


def test_an_adopted_slot_has_no_negative_use() -> None:
    found = top.measured(top.Sample(1.0, STATS, slots(a=5.0)), top.Sample(1.0, STATS, slots(a=4.0)))
    assert [slot["cpu_percent"] for slot in found] == [0.0]


@pytest.mark.parametrize("order, expected", [("cpu", "cab"), ("memory", "bac"), ("idle", "abc"), ("age", "cba")])
def test_slots_with_the_largest_value_are_first_and_those_without_one_last(order: str, expected: str) -> None:
    found = [
        {"slot": "a", "cpu_percent": 5.0, "memory_bytes": 2, "idle_s": 9.0, "age_s": 1},
        {"slot": "b", "cpu_percent": None, "memory_bytes": 3, "idle_s": 0.0, "age_s": 2},
        {"slot": "c", "cpu_percent": 5.5, "memory_bytes": 1, "idle_s": None, "age_s": 3},
    ]
    assert "".join(slot["slot"] for slot in top.ordered(found, order)) == expected


def test_the_head_has_the_faults_of_the_host() -> None:
    first, second = top.head(STATS | {"draining": True, "ready": False, "faults": {"router": "no response"}})
    assert first == "host c07: 3 of 4 slots free, up 1m00s, draining, not ready, router fails"
    assert second == "slots: 1 claimed, 2 warm, 0 starting, 0 stopping; 1G of memory available"


def test_the_screen_has_as_many_slots_as_the_terminal_has_room_for() -> None:
    slot = {"state": "claimed", "image": "minimal", "age_s": 1, "limits": {"memory_bytes": 1 << 30}}
    many = [slot | {"slot": f"c07-{number:012}", "memory_bytes": number} for number in range(50)]
    sample = top.Sample(1.0, STATS, many)
    console = Console(width=180, height=24, file=io.StringIO())
    lines = console.render_lines(top.screen(sample, sample, "memory", console.height))
    text = ["".join(segment.text for segment in line).strip() for line in lines]
    assert len(lines) == console.height - 1  # the caption
    assert text[-1] == "and 34 more slots" and sum(line.startswith("c07-") for line in text) == 16
    assert text[5].startswith("c07-000000000049")


def test_once_prints_plain_columns_for_scripts(run: Any) -> None:  # noqa: F811
    slot = run("claim", "--json").json["slot"]
    done = run("top", "--once", "--interval", "0.1", "--sort", "memory")
    figures, counts, columns, *rows = done.out.splitlines()
    assert figures.startswith("host c07: ") and counts.startswith("slots: 1 claimed, ")
    assert tuple(columns.split()) == top.COLUMNS
    row, = (row.split() for row in rows if row.startswith(slot))
    assert row[1:5] == ["claimed", "minimal", "0", "90M"]
    # Without a terminal it does not repeat either, so that a pipe or a cron job ends.
    assert run("top", "--interval", "0.1").out.splitlines()[2] == columns
    document = run("top", "--json", "--interval", "0.1").json
    assert document["stats"]["label"] == "c07"
    assert slot in [one["slot"] for one in document["slots"]]


def test_an_api_that_does_not_respond_is_an_error(run: Any) -> None:  # noqa: F811
    done = run("top", "--once", "--url", "http://127.0.0.1:9")
    assert (done.status, done.out) == (69, "")


class Terminal:
    """`nbagent top` in a terminal of its own."""

    def __init__(self, url: str) -> None:  # noqa: F811
        self.leader, follower = pty.openpty()
        # Background jobs of a shell ignore SIGINT, and their children inherit that.
        code = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from nbagent.cli import main; main(sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "top", "--url", url, "--interval", "0.1"], cwd=ROOT,
            stdin=follower, stdout=follower, stderr=follower,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "180", "LINES": "40"},
        )
        os.close(follower)
        self.shown = ""

    def wait(self, pattern: str) -> None:
        """Waits until the text since the last call has the pattern; text is compared without escape sequences."""
        while not re.search(pattern, re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", self.shown)):
            self.shown += os.read(self.leader, 65536).decode()
        self.shown = ""

    def press(self, key: str) -> None:
        os.write(self.leader, key.encode())

    def end(self) -> int:
        """The exit status."""
        try:
            while True:
                os.read(self.leader, 65536)
        except OSError:
            pass  # EIO: the process has closed the follower end
        os.close(self.leader)
        return self.process.wait(10)


@pytest.mark.parametrize("key", ["q", "\x03"], ids=["q", "ctrl-c"])
def test_a_terminal_shows_the_slots_in_the_order_of_a_key_until_it_ends(run: Any, url: str, key: str) -> None:  # noqa: F811
    slot = run("claim", "--json").json["slot"]
    terminal = Terminal(url)
    try:
        terminal.wait(rf"host c07: (?s:.*){slot}(?s:.*)by cpu")
        terminal.press("m")
        terminal.wait("by memory")
        if key == "\x03":
            terminal.process.send_signal(2)
        else:
            terminal.press(key)
    finally:
        assert terminal.end() == 0
