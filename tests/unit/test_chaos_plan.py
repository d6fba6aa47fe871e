# SPDX-License-Identifier: BSD-3-Clause
"""The plan of `make chaos` is a function of its seed, and a short run has every fault."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "chaos"))

import plan

PAIRS = {(kind.name, target) for kind in plan.KINDS for target in kind.targets}


def test_a_seed_has_one_plan_and_another_seed_another() -> None:
    assert plan.faults(7, 300) == plan.faults(7, 300)
    assert plan.faults(7, 300) != plan.faults(8, 300)
    # So that a fault is found again by its number.
    assert plan.faults(7, 300)[:20] == plan.faults(7, 20)


def test_every_fault_comes_before_any_comes_twice() -> None:
    first = plan.faults(3, len(PAIRS))
    assert {(fault.kind, fault.target) for fault in first} == PAIRS
    assert [fault.number for fault in first] == list(range(1, len(PAIRS) + 1))


def test_only_faults_that_last_have_a_duration_below_that_of_a_watchdog() -> None:
    held = {kind.name for kind in plan.KINDS if kind.held}
    for fault in plan.faults(1, 500):
        assert 0 <= fault.pause_s <= plan.PAUSE_S[1]
        assert plan.HELD_S[0] <= fault.held_s <= plan.HELD_S[1] if fault.kind in held else fault.held_s == 0


def test_kinds_come_by_their_weights() -> None:
    later = plan.faults(5, 5000)[len(PAIRS):]
    kills = sum(fault.kind == "kill" for fault in later) / len(later)
    share = sum(kind.weight for kind in plan.KINDS if kind.name == "kill") / sum(kind.weight for kind in plan.KINDS)
    assert abs(kills - share) < 0.05


def test_only_ends_of_the_router_close_websockets() -> None:
    closing = {(fault.kind, fault.target) for fault in plan.faults(1, 500) if fault.closes_websockets}
    assert closing == {
        ("kill", plan.ROUTER), ("kill", plan.ALL), ("kill", "one worker of the router"), ("restart", plan.ROUTER),
    }
