# SPDX-License-Identifier: BSD-3-Clause
"""The faults of a run of `make chaos`, as a function of its seed: which, on what, for how long, and the pause before.

Pure, so that a run is repeated by its seed. `inside.py` carries the faults out on the host.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

SUPERVISOR, API, ROUTER = "nbagent.service", "nbagent-api.service", "nbagent-router.service"
UNITS, LAUNCH, NETWORK = "nbagent-units.service", "nbagent-launch.service", "nbagent-network.service"
BUS, JOURNAL = "dbus.service", "systemd-journald.service"
# Stands for the unit of the zygote that runs at that time, and for its two processes.
ZYGOTE, ZYGOTE_SERVICE, ZYGOTE_PROCESS = "zygote", "zygote-service", "zygote-process"
OURS = (SUPERVISOR, API, ROUTER, UNITS, LAUNCH, NETWORK)
ALL = "all services of nbagent at once"
RULESET, ELEMENTS, LINKS = "the rules of nftables", "the elements of slots", "the flags and routes of slots"
# A service that does not respond for longer is ended by its watchdog, which is a kill.
HELD_S = (0.5, 8.0)
PAUSE_S = (0.0, 1.5)


class Kind(NamedTuple):
    """A kind of fault; `weight` is its share. Those of `held` last for a while, the others happen."""

    name: str
    targets: Sequence[str]
    weight: int
    held: bool = False


KINDS = (
    Kind("kill", (*OURS, ZYGOTE, ZYGOTE_SERVICE, ZYGOTE_PROCESS, BUS, JOURNAL), 8),
    Kind("kill", (ALL,), 1),
    Kind("kill", ("the first process of a warm slot", "one worker of the router"), 2),
    Kind("freeze", (*OURS, ZYGOTE_SERVICE, ZYGOTE_PROCESS, BUS, JOURNAL), 6, held=True),
    Kind("restart", (SUPERVISOR, API, UNITS, LAUNCH, NETWORK, BUS, JOURNAL, ROUTER), 3),
    Kind("reload", (SUPERVISOR, API, ROUTER, "the units of systemd"), 2),
    Kind("reexec", ("PID 1",), 2),
    Kind("full", ("blocks of /run", "inodes of /run"), 2, held=True),
    # One of each: the service may open a few descriptors more than it has open.
    Kind("descriptors", (SUPERVISOR, API, ROUTER, UNITS, LAUNCH, NETWORK, ZYGOTE_SERVICE), 3, held=True),
    Kind("tasks", ("nbagent.slice", SUPERVISOR, API, UNITS, LAUNCH, NETWORK), 2, held=True),
    # The service may take 64 KiB more than it has.
    Kind("memory", (SUPERVISOR, API, UNITS, LAUNCH, NETWORK), 2, held=True),
    # Another program removes what the network service has made; it has to be there again without a restart.
    Kind("network", (RULESET, ELEMENTS, LINKS), 2),
    # By strace: calls that change files fail with EIO, or take longer; calls that take memory fail with ENOMEM.
    Kind("input/output errors", (SUPERVISOR, API, UNITS, LAUNCH, NETWORK), 2, held=True),
    Kind("slow files", (SUPERVISOR, API, UNITS, LAUNCH, NETWORK), 2, held=True),
    Kind("failed allocations", (SUPERVISOR, API, UNITS, LAUNCH, NETWORK), 2, held=True),
)
# After these a service may report an error wherever it is.
ANYWHERE = ("input/output errors", "failed allocations", "memory")
# Containers have the clock of the machine that the tests run on.
OF_A_MACHINE = (Kind("clock", ("an hour ahead", "an hour back", "ten years ahead"), 2, held=True),)


class Fault(NamedTuple):
    """One fault: `pause_s` after the one before has been repaired, for `held_s`."""

    number: int
    kind: str
    target: str
    pause_s: float
    held_s: float

    def __str__(self) -> str:
        return f"{self.number}: {self.kind} {self.target}" + (f" for {self.held_s:.1f} s" if self.held_s else "")

    @property
    def closes_websockets(self) -> bool:
        """Whether the router ends by it, which closes the websockets of browsers."""
        return self.kind in ("kill", "restart") and self.target in (ROUTER, ALL, "one worker of the router")


def faults(seed: int, count: int, kinds: Sequence[Kind] = KINDS) -> list[Fault]:
    """The faults of a run. Each pair of kind and target comes once before the rest, so that a short run has all.

    A longer run of a seed begins as a shorter one.
    """
    source = random.Random(seed)
    pairs = [(kind, target) for kind in kinds for target in kind.targets]
    chosen = source.sample(pairs, len(pairs))
    while len(chosen) < count:
        kind = source.choices(kinds, [kind.weight for kind in kinds])[0]
        chosen.append((kind, source.choice(kind.targets)))
    return [_fault(seed, number, *pair) for number, pair in enumerate(chosen[:count], 1)]


def _fault(seed: int, number: int, kind: Kind, target: str) -> Fault:
    source = random.Random(f"{seed} {number}")
    pause_s, held_s = (round(source.uniform(*bounds), 3) for bounds in (PAUSE_S, HELD_S))
    return Fault(number, kind.name, target, pause_s, held_s if kind.held else 0.0)
