# SPDX-License-Identifier: BSD-3-Clause
"""The benchmarks' figures: statistics of samples, and the result of memory.py for a running process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(autouse=True)
def bench_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs is a path of its own, and their names are common ones."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("figures", "memory"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def made() -> tuple[Any, list[Any], list[Any]]:
    """The module, a column of each kind, and three sides: ours, a peer, and one that could not be measured."""
    import figures

    columns = [figures.Column("ready", "start", "s", "how"), figures.Column("rate", "slots", "1/s", "how", True)]
    ours = figures.Line("fork", "ours", "forks", ours=True, at_once=100, users=50)
    peer = figures.Line("peer", "peer", "runs", ours=False, at_once=20, users=20)
    dead = figures.Line("dead", "dead", "", ours=False, why="it cannot run")
    for ready, rate in ((0.012, 50), (0.010, 70), (0.020, 60)):
        ours.add("ready", ready)
        ours.add("rate", rate)
    peer.add("ready", 2.4)
    peer.add("rate", 0.5)
    return figures, columns, [ours, peer, dead]


def test_better_means_less_time_and_more_slots() -> None:
    figures, (ready, rate), (ours, peer, dead) = made()
    assert figures.better(ours, peer, ready) == pytest.approx(200)
    assert figures.better(ours, peer, rate) == pytest.approx(120)
    assert figures.better(peer, ours, rate) == pytest.approx(1 / 120)
    assert figures.better(dead, peer, ready) is None


def test_bursts_of_other_numbers_are_not_compared() -> None:
    figures, _, (ours, peer, _) = made()
    burst = figures.Column("ready", "burst", "s", "how", of_all=True)
    assert figures.better(ours, peer, burst) is None
    peer.at_once = ours.at_once
    assert figures.better(ours, peer, burst) == pytest.approx(200)


def test_tables_show_medians_spread_and_numbers_and_leave_out_what_was_not_measured() -> None:
    figures, columns, lines = made()
    values, ratios = figures.comparison(lines, columns, lines[1])
    assert values[0] == ["", "start, s", "slots, 1/s", "at once", "users"]
    assert values[1] == ["ours", "0.012 (0.01..0.02)", "60 (50..70)", "100", "50"]
    assert values[2] == ["peer", "2.4", "0.5", "20", "20"]
    assert ratios[1:] == [["ours", "200×", "120×"], ["peer", "1×", "1×"]]
    assert len(values) == 3
    assert "dead is not in the table: it cannot run" in figures.notes(lines, columns)


def test_repeated_requests_for_kernels_are_reported() -> None:
    figures, columns, lines = made()
    assert not [note for note in figures.notes(lines, columns) if "again" in note]
    lines[1].again += ["closed with 1006", "404"]
    said = "peer: 2 kernels did not start and were requested again: closed with 1006"
    assert said in figures.notes(lines, columns)
    assert lines[1].document()["again"] == ["closed with 1006", "404"]


def test_columns_stand_below_each_other_in_text_and_markdown() -> None:
    figures, *_ = made()
    table = [["", "a", "long heading"], ["first side", "1", "22"]]
    text = figures.columns_of(table).splitlines()
    assert text[0].index("long heading") + len("long heading") == text[1].index("22") + len("22")
    lines = figures.markdown(table).splitlines()
    assert lines == ["|  | a | long heading |", "| --- | --: | --: |", "| first side | 1 | 22 |"]


def test_quantiles_are_samples_and_the_last_is_the_most() -> None:
    figures, *_ = made()
    said = figures.latency([float(value) for value in range(1, 101)])
    assert said == {"n": 100, "p50": 50.5, "p90": 91, "p99": 100, "max": 100}
    assert figures.quantile([7.0], 0.99) == 7.0


def test_memory_a_user_is_the_sum_of_all_processes_by_users() -> None:
    figures, *_ = made()
    roles = {"init": {"pss": 1024}, "server": {"pss": 8192}, "kernel": {"pss": 10240}, "services": {"pss": 20480}}
    found = {"roles": roles, "kernel": 2048, "meminfo": {"MemAvailable": 1000 * 1024}}
    said = figures.per_user(found, 10)
    assert said["all"] == pytest.approx(3.9)
    assert said["services"] == pytest.approx(2.0)
    assert said[figures.KERNEL] == pytest.approx(0.2)
    before = {"meminfo": {"MemAvailable": 1050 * 1024}}
    assert figures.taken(before, found, 10) == pytest.approx(5.0)


def test_a_process_is_measured_as_the_kernel_has_it() -> None:
    import memory

    number, parent, found = memory.measure(str(os.getpid()))
    assert parent == os.getppid()
    assert 0 <= number <= os.getpid()
    assert 1024 < found["private"] <= found["rss"]
    assert found["pss"] <= found["rss"]
    assert found["page_tables"] > 0
    assert memory.measure("0") is None
    assert memory.units_of(str(os.getpid()))[0][0] == ""


def test_a_slots_processes_are_told_apart_by_their_numbers_in_it() -> None:
    import memory

    forked = [(7, False), (1, True), (3, False), (2, True), (9, False)]
    assert memory.roles_of(forked) == ["kernel", "init", "server", "fork_server", "kernel"]
    assert memory.roles_of([(1, True), (2, False), (5, False)]) == ["init", "server", "kernel"]
    assert memory.roles_of([(0, False), (0, True)]) == ["slots", "slots"]


def test_books_of_the_machine_have_what_is_asked_for() -> None:
    import memory

    books = memory.meminfo()
    assert 0 < books["MemAvailable"] < books["MemTotal"]


def test_a_load_is_compared_with_the_quiet_samples_of_its_own_round() -> None:
    import figures

    quiet = [1.0] * 50 + [2.0] * 50
    rounds = [
        {"quiet": quiet, "load": [3.0] * 100},
        # A round in which the machine was ten times slower has the same ratio.
        {"quiet": [10 * value for value in quiet], "load": [30.0] * 100},
        {"quiet": quiet, "load": [1.0] * 99 + [8.0]},
    ]
    assert figures.beside_quiet(rounds, "load", "quiet") == {"p50": 3.0, "p99": 8.0, "ratio": 1.5}
    assert figures.beside_quiet(rounds, "quiet", "quiet")["ratio"] == 1.0
