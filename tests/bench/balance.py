# SPDX-License-Identifier: BSD-3-Clause
"""How evenly slots are spread over hosts, measured and simulated. Pure: no HAProxy, no clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agents import Agent, Books


@dataclass(frozen=True)
class Spread:
    """Statistics of the share of each host's capacity that is in use."""

    mean: float
    most: float
    deviation: float
    gini: float

    @property
    def peak(self) -> float:
        """The share of the fullest host divided by the mean share."""
        return self.most / self.mean if self.mean else 1.0


def spread(used: Sequence[int], capacity: Sequence[int]) -> Spread:
    """The spread over hosts, of any sizes."""
    loads = [one / most for one, most in zip(used, capacity, strict=True)]
    return Spread(statistics.fmean(loads), max(loads), statistics.pstdev(loads), gini(loads))


def gini(values: Sequence[float]) -> float:
    """The Gini coefficient: 0 when all values are equal, near 1 when one value is the whole sum."""
    count, whole = len(values), sum(values)
    if not whole:
        return 0.0
    ranked = sum(place * value for place, value in enumerate(sorted(values), 1))
    return 2 * ranked / (count * whole) - (count + 1) / count


@dataclass(frozen=True)
class Played:
    """The outcome of simulated claims: failures, refusals of hosts, and the free share of the hosts that accepted."""

    claims: int
    failed: int
    refusals: int
    went_free: float
    spread: Spread


Choose = Callable[[Books, int], int]


def play(books: Books, claims: int, choose: Choose, tries: int) -> Played:
    """Simulates claims one after another. `choose` returns a host for claim `number`, again after a refusal."""
    failed = 0
    for number in range(claims):
        failed += all(books.claim(choose(books, number), f"{number}") is None for _ in range(tries))
    agents = books.agents
    refusals, went_free = sum(agent.refused for agent in agents), books.free_sum / max(1, claims - failed)
    return Played(claims, failed, refusals, went_free, of(agents))


def of(agents: Sequence[Agent]) -> Spread:
    return spread([agent.used for agent in agents], [agent.capacity for agent in agents])


def emptiest(books: Books, _: int) -> int:
    """Perfect knowledge: the host with the greatest free share."""
    return max(range(len(books.agents)), key=lambda number: books.agents[number].free / books.agents[number].capacity)


def emptier_of_two(books: Books, _: int) -> int:
    """Two hosts drawn at random, of which the one with the greater free share now is chosen."""
    first, second = (books.chance.randrange(len(books.agents)) for _ in range(2))
    return max(first, second, key=lambda number: books.agents[number].free / books.agents[number].capacity)


class Drawn:
    """HAProxy's random(): a host drawn by weight, which is the percentage that it reported `every` claims ago."""

    def __init__(self, every: int) -> None:
        self.every, self._numbers = every, range(0)
        self._weights: list[int] = []
        self._asked = -1

    def __call__(self, books: Books, number: int) -> int:
        if number // self.every != self._asked or not self._weights:
            self._asked = number // self.every
            self._weights = [agent.percent() for agent in books.agents]
            self._numbers = range(len(self._weights))
        return books.chance.choices(self._numbers, self._weights)[0]
