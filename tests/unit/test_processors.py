# SPDX-License-Identifier: BSD-3-Clause
"""The slots that give way, by traces of a host whose processors are divided as the kernel does."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis
import pytest
from hypothesis import strategies

from nbagent.policy.processors import Processors

SAMPLE_INTERVAL_S = 0.25
# A slot wants so many processors at a time, in seconds since the beginning of the trace.
Demand = Callable[[float], float]


class Trace:
    """A host with slots, of which each gets the processors that it wants, or less by its weight when all want more."""

    def __init__(self, processors: int, part: float = 0.05) -> None:
        self.policy, self.processors, self.part = Processors(processors), processors, part
        self.slots: dict[str, Demand] = {}
        self.used_s: dict[str, float] = {}
        self.giving: set[str] = set()
        self.moves: list[tuple[float, str, bool]] = []
        self.reads = 0
        self.at_s = self.idle_s = 0.0

    def add(self, name: str, demand: Demand) -> None:
        self.slots[name], self.used_s[name] = demand, 0.0

    def run(self, until_s: float) -> None:
        while self.at_s < until_s:
            self.at_s += SAMPLE_INTERVAL_S
            got = self.divide({name: demand(self.at_s) for name, demand in self.slots.items()})
            for name, part in got.items():
                self.used_s[name] += part * SAMPLE_INTERVAL_S
            self.idle_s += (self.processors - sum(got.values())) * SAMPLE_INTERVAL_S
            reads_all = self.policy.sample(self.at_s, self.idle_s)
            due = self.policy.due(self.used_s if reads_all else self.giving, self.giving)
            used_s = {name: self.used_s[name] for name in due}
            self.reads += len(used_s)
            for name, gives_way in self.policy.decide(used_s, set(self.giving)).items():
                self.moves.append((self.at_s, name, gives_way))
                (self.giving.add if gives_way else self.giving.discard)(name)

    def divide(self, wanted: dict[str, float]) -> dict[str, float]:
        got: dict[str, float] = dict.fromkeys(wanted, 0.0)
        left, open_ = float(self.processors), {name for name, part in wanted.items() if part > 0}
        while open_ and left > 1e-9:
            weights = {name: self.part if name in self.giving else 1.0 for name in open_}
            share = left / sum(weights.values())
            done = {name for name in open_ if wanted[name] - got[name] <= share * weights[name]}
            for name in done or open_:
                more = wanted[name] - got[name] if done else share * weights[name]
                got[name] += more
                left -= more
            open_ = open_ - done if done else set()
        return got


def always(part: float) -> Demand:
    return lambda at_s: part


def until(end_s: float, part: float) -> Demand:
    return lambda at_s: part if at_s < end_s else 0.0


def test_a_slot_that_takes_all_processors_gives_way_within_a_second_and_until_it_rests() -> None:
    trace = Trace(2)
    trace.add("computes", until(20, 4))
    for number in range(10):
        trace.add(f"cells-{number}", always(0.015))
    trace.run(30)
    (began_s, first, _), (ended_s, last, gives_way) = trace.moves
    assert first == last == "computes" and not gives_way
    assert 0.5 <= began_s <= 1.25 and 20.5 <= ended_s <= 21.5


@pytest.mark.parametrize(("processors", "computing"), [(1, 0.3), (2, 0.8), (4, 2.8), (64, 62)])
def test_no_slot_gives_way_and_none_is_read_while_a_processor_is_free(processors: int, computing: float) -> None:
    trace = Trace(processors)
    for number in range(100):
        trace.add(f"idle-{number}", always(0.001))
    trace.add("computes", always(computing))
    trace.run(60)
    assert trace.moves == [] and trace.reads == 0


def test_a_slot_that_takes_one_of_two_processors_gives_way_because_cells_of_others_use_both() -> None:
    trace = Trace(2)
    trace.add("computes", always(1))
    for number in range(10):
        trace.add(f"cells-{number}", always(0.015))
    trace.run(10)
    assert trace.giving == {"computes"}


def test_slots_at_rest_are_read_once_a_second_while_another_computes() -> None:
    trace = Trace(2)
    trace.add("computes", always(4))
    for number in range(100):
        trace.add(f"rests-{number}", always(0.001))
    trace.run(100)
    assert trace.giving == {"computes"} and 100 * 101 <= trace.reads < 100 * 110
    # One that begins to compute gives way as soon as one that is read in each sample.
    began_s = trace.at_s
    trace.slots["rests-7"] = always(4)
    trace.run(began_s + 5)
    (at_s, name, _), = trace.moves[1:]
    assert name == "rests-7" and at_s - began_s <= 1.25


def test_cells_and_pages_that_open_do_not_give_way_beside_a_slot_that_computes() -> None:
    trace = Trace(2)
    trace.add("computes", always(4))
    for number in range(20):
        trace.add(f"cells-{number}", always(0.02))
    # Half a second of a processor each 20 s.
    trace.add("opens", lambda at_s: 1.0 if at_s % 20 < 0.5 else 0.01)
    trace.run(120)
    assert {name for _, name, _ in trace.moves} == {"computes"}


def test_a_slot_that_computes_in_bursts_gives_way_although_it_pauses() -> None:
    trace = Trace(1)
    trace.add("bursts", lambda at_s: 4.0 if at_s % 2 < 1 else 0.5)
    trace.add("cells", always(0.02))
    trace.add("other", lambda at_s: 0.0 if at_s % 2 < 1 else 0.5)
    trace.run(10)
    assert (trace.moves[0][1], trace.moves[0][2]) == ("bursts", True)


@pytest.mark.parametrize("count", [3, 40, 200])
def test_of_many_slots_that_compute_all_give_way(count: int) -> None:
    trace = Trace(2)
    for number in range(count):
        trace.add(f"computes-{number}", always(1))
    for number in range(10):
        trace.add(f"rests-{number}", always(0.0005))
    trace.run(300)
    assert trace.giving == {f"computes-{number}" for number in range(count)}
    # Starved slots are not taken for slots at rest.
    assert len(trace.moves) == count


def test_a_slot_whose_quota_is_small_gives_way_where_all_together_take_the_host() -> None:
    trace = Trace(2)
    for number in range(32):
        trace.add(f"bounded-{number}", always(2 / 32))
    trace.run(60)
    assert len(trace.giving) == 32


def test_a_slot_that_rested_gives_way_sooner_the_next_time() -> None:
    trace = Trace(2)
    trace.add("computes", lambda at_s: 0.0 if 10 <= at_s < 12 else 2.0)
    trace.run(20)
    times = [at_s for at_s, _, gives_way in trace.moves if gives_way]
    first_s, again_s = times[0], times[1] - 12
    assert len(times) == 2 and again_s < first_s


def test_a_slot_that_ends_leaves_nothing_behind() -> None:
    trace = Trace(2)
    trace.add("ends", always(4))
    trace.run(2)
    assert trace.giving == {"ends"}
    del trace.slots["ends"], trace.used_s["ends"]
    trace.giving.clear()
    trace.run(20)
    policy = trace.policy
    assert not policy._content_s and not policy._rests_s and not policy._reads


PARTS = strategies.lists(strategies.floats(0, 4), min_size=1, max_size=40)


@hypothesis.given(
    processors=strategies.integers(1, 64),
    demands=strategies.lists(PARTS, min_size=1, max_size=8),
)
def test_changes_alternate_and_a_host_at_rest_has_no_slot_that_gives_way(
    processors: int, demands: list[list[float]]
) -> None:
    trace = Trace(processors)
    for number, parts in enumerate(demands):
        trace.add(f"slot-{number}", lambda at_s, parts=parts: parts[int(at_s / SAMPLE_INTERVAL_S) % len(parts)])
    trace.run(20)
    for name in trace.slots:
        trace.slots[name] = always(0.0)
    trace.run(30)
    assert not trace.giving
    for name in trace.slots:
        kinds = [gives_way for _, moved, gives_way in trace.moves if moved == name]
        assert kinds == [number % 2 == 0 for number in range(len(kinds))]


@hypothesis.given(strategies.lists(strategies.tuples(strategies.floats(0, 10), strategies.floats(0, 1e9)), max_size=30))
def test_clocks_that_stand_still_or_jump_are_survived(samples: list[tuple[float, float]]) -> None:
    policy, at_s = Processors(2), 0.0
    for past_s, used_s in samples:
        at_s += past_s
        policy.sample(at_s, 0.0)
        policy.decide({"a": used_s, "b": 1e9 - used_s}, {"a"} if used_s > 1e8 else set())
