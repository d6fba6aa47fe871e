"""How evenly slots are spread, and how they would be with other knowledge. Pure: no HAProxy, no clock."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agents import Agent, Books


@dataclass(frozen=True)
class Spread:
    """Of the shares of each host's places that are in use."""

    mean: float
    most: float
    deviation: float
    gini: float

    @property
    def peak(self) -> float:
        """The fullest host against the mean."""
        return self.most / self.mean if self.mean else 1.0


def spread(used: Sequence[int], capacity: Sequence[int]) -> Spread:
    """The spread over hosts, of any sizes."""
    loads = [one / most for one, most in zip(used, capacity, strict=True)]
    return Spread(statistics.fmean(loads), max(loads), statistics.pstdev(loads), gini(loads))


def gini(values: Sequence[float]) -> float:
    """0 when all have the same, near 1 when one has all."""
    count, whole = len(values), sum(values)
    if not whole:
        return 0.0
    ranked = sum(place * value for place, value in enumerate(sorted(values), 1))
    return 2 * ranked / (count * whole) - (count + 1) / count


@dataclass(frozen=True)
class Played:
    """What became of claims: what nobody took, how often a host said no, how free the hosts were that took one."""

    claims: int
    failed: int
    refusals: int
    went_free: float
    spread: Spread


Choose = Callable[[Books, int], int]


def play(books: Books, claims: int, choose: Choose, tries: int) -> Played:
    """Claims one after another. `choose` gives a host for the claim of that number, again when it says no."""
    failed = 0
    for number in range(claims):
        failed += all(books.claim(choose(books, number), f"{number}") is None for _ in range(tries))
    agents = books.agents
    refusals, went_free = sum(agent.refused for agent in agents), books.free_sum / max(1, claims - failed)
    return Played(claims, failed, refusals, went_free, of(agents))


def of(agents: Sequence[Agent]) -> Spread:
    return spread([agent.used for agent in agents], [agent.capacity for agent in agents])


def emptiest(books: Books, _: int) -> int:
    """Perfect knowledge: the host with the greatest share of its places free."""
    return max(range(len(books.agents)), key=lambda number: books.agents[number].free / books.agents[number].capacity)


def emptier_of_two(books: Books, _: int) -> int:
    """Any two hosts, and of them the one with the greater share of its places free now."""
    first, second = (books.chance.randrange(len(books.agents)) for _ in range(2))
    return max(first, second, key=lambda number: books.agents[number].free / books.agents[number].capacity)


class Drawn:
    """As HAProxy's random(): a host is drawn by weight, which is the percentage that it told `every` claims ago."""

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
