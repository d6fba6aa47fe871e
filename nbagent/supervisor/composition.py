# SPDX-License-Identifier: BSD-3-Clause
"""The objects of a supervisor, made of each other in one place: each gets the ones it calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from nbagent.config.host_config import CurrentConfig
from nbagent.core import paths
from nbagent.image.store import ImageStore
from nbagent.launch.requests import OpenedSlot
from nbagent.linux import cgroup
from nbagent.linux.cgroup import Cgroup
from nbagent.policy.admission import Pressure
from nbagent.supervisor import launch_service
from nbagent.supervisor.adoption import Adoption
from nbagent.supervisor.agent import Agent
from nbagent.supervisor.allocator import Allocator
from nbagent.supervisor.calls import Calls
from nbagent.supervisor.claims import Claims
from nbagent.supervisor.compressor import Compressor
from nbagent.supervisor.counters import Counters
from nbagent.supervisor.figures import Figures
from nbagent.supervisor.health import Health
from nbagent.supervisor.host_load import HostLoad, Memory, read_memory, read_pressure
from nbagent.supervisor.images import Images
from nbagent.supervisor.interfaces import Interfaces
from nbagent.supervisor.launcher import Launcher
from nbagent.supervisor.lending import Lending
from nbagent.supervisor.lock_guard import LockGuard
from nbagent.supervisor.memory_guard import MemoryGuard
from nbagent.supervisor.monitor import Monitor
from nbagent.supervisor.network import Network
from nbagent.supervisor.pools import Pools
from nbagent.supervisor.preparation import Preparation
from nbagent.supervisor.processor_guard import ProcessorGuard, read_idle
from nbagent.supervisor.records import Records
from nbagent.supervisor.resources import Resources
from nbagent.supervisor.scope_limits import ScopeLimits
from nbagent.supervisor.sessions import Sessions
from nbagent.supervisor.slot_starter import SlotStarter
from nbagent.supervisor.slot_stopper import SlotStopper
from nbagent.supervisor.slots import Slots
from nbagent.supervisor.systemd import Systemd
from nbagent.supervisor.tasks import Tasks
from nbagent.supervisor.trials import Trials
from nbagent.supervisor.updates import Updates
from nbagent.supervisor.zygotes import Zygotes


@dataclass(frozen=True)
class Surroundings:
    """All that a supervisor stands on. `changed` is also set by the zygotes."""

    config: CurrentConfig
    systemd: Systemd
    store: ImageStore
    launcher: Launcher
    zygotes: Zygotes
    records: Records
    network: Network
    drain_file: Path
    changed: asyncio.Event
    memory: Callable[[], Memory] = read_memory
    pressure: Callable[[Cgroup | None], Pressure] = read_pressure
    cgroup_of: Callable[[int], Cgroup] = cgroup.of_process
    router: Path = paths.ROUTER_CHECK_SOCKET
    idle: Callable[[], float] = read_idle
    open_slot: Callable[[str, int], Awaitable[OpenedSlot]] = launch_service.open_slot


@dataclass(frozen=True)
class Supervisor:
    """A supervisor: `adoption` runs first, then `agent`, which serves `calls`."""

    slots: Slots
    pools: Pools
    load: HostLoad
    stopper: SlotStopper
    images: Images
    adoption: Adoption
    calls: Calls
    agent: Agent
    health: Health
    resources: Resources
    memory_guard: MemoryGuard
    processor_guard: ProcessorGuard
    sessions: Sessions


def compose(on: Surroundings) -> Supervisor:
    """A supervisor of the current event loop."""
    config, systemd, records, changed = on.config, on.systemd, on.records, on.changed
    slots, tasks, counters = Slots(), Tasks(), Counters()
    limits = ScopeLimits(systemd, tasks)
    sessions = Sessions(records.path.parent / paths.SESSIONS.name)
    pools = Pools(config, slots, records, changed)
    load = HostLoad(config, slots, on.zygotes, on.drain_file, on.memory, on.pressure)
    health = Health(config, systemd, on.store, records, on.network, changed, on.router, pools.resume, pools.refuse)
    resources = Resources()
    interfaces = Interfaces(on.network, slots)
    images = Images(on.store, slots, pools, on.zygotes, systemd, tasks, changed)
    stopper = SlotStopper(config, slots, pools, records, systemd, interfaces, images, sessions, changed)
    compressor = Compressor(systemd, counters, tasks)
    monitor = Monitor(systemd, counters, stopper, compressor, tasks, LockGuard(stopper, tasks))
    starter = SlotStarter(
        config, slots, pools, records, systemd, on.launcher, on.network, monitor, counters, stopper, tasks, on.cgroup_of
    )
    allocator = Allocator(config, slots, pools, load, health, on.launcher, stopper)
    preparation = Preparation(config, slots, records, systemd, limits, on.network, interfaces, stopper, tasks)
    claims = Claims(config, slots, pools, records, load, allocator, preparation, counters, sessions, changed)
    lending = Lending(config, slots, pools, records, load, claims, stopper, counters, sessions)
    return Supervisor(
        slots=slots,
        pools=pools,
        load=load,
        stopper=stopper,
        images=images,
        adoption=Adoption(
            slots, pools, records, systemd, monitor, compressor, interfaces, counters, sessions, lending, tasks
        ),
        calls=Calls(
            config, slots, load, claims, lending,
            Updates(config, records, limits, load, sessions),
            Trials(config, pools, load, health, starter, on.router, on.open_slot),
            Figures(config, slots, pools, load, health, resources, on.zygotes, counters), stopper, counters, tasks,
            changed,
        ),
        health=health,
        resources=resources,
        agent=Agent(
            config, pools, load, on.zygotes, images, monitor, starter, stopper, interfaces, tasks, changed
        ),
        memory_guard=MemoryGuard(config, slots, limits, counters, on.memory),
        processor_guard=ProcessorGuard(config, slots, limits, counters, load.cpus, on.idle),
        sessions=sessions,
    )
