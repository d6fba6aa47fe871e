# SPDX-License-Identifier: BSD-3-Clause
"""Whether memory, file systems and limits of the kernel suffice for the slots."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nbagent.config import host_config
from nbagent.core import paths
from nbagent.core.quantities import format_size, parse_quota
from nbagent.doctor.finding import Finding
from nbagent.doctor.system import below, meminfo, text_of
from nbagent.image import ids
from nbagent.linux import resources, swap
from nbagent.policy import admission
from nbagent.wire.limits_page import TASKS_PER_THREAD, SlotLimits, processors

# The file systems that must not be full, and what for.
ROOM = {paths.RUN: "the records of slots", paths.IMAGES: "images", Path("/var/log"): "the journal"}
JOURNAL = Path("/var/log/journal")
ROOM_MIN_PERCENT, USE_MAX = 5.0, 0.8
# Use of a notebook server with two kernels: threads for pid_max, descriptors for nr_open.
TASKS_PER_SLOT = 64
FILES_PER_SLOT = 16
# Threads and processes of a slot with one kernel, and the pools of threads in it: numpy's OpenBLAS, scipy's, OpenMP,
# and polars, duckdb or another.
SERVER_TASKS, THREAD_POOLS = 24, 4
# The processes of a slot have 39 descriptors without a kernel and 80 more with each one (measured); the router and the
# supervisor have ten for it. So this suffices for five kernels.
OPEN_FILES_PER_SLOT = 512
CONNECTIONS_PER_SLOT = 64
TERMINALS_PER_SLOT = 2


def check_room(root: Path, path: Path, use: str, read: Callable[[Path], os.statvfs_result] = os.statvfs) -> Finding:
    """Whether a file system has blocks and inodes left."""
    try:
        least = min(resources.of_file_system(below(root, path), read), key=lambda resource: resource.free_percent)
    except FileNotFoundError:
        return Finding(f"room in {path}", "ok", "not in use")
    part, found = least.free_percent, f"{least.free_percent:.0f} % of the {least.name} are free ({least.free})"
    if part >= ROOM_MIN_PERCENT:
        return Finding(f"room in {path}", "ok", found)
    return Finding(f"room in {path}", "fail" if part < 1 else "warn", f"{found}, for {use}", f"delete files of {path}")


def check_journal(root: Path) -> Finding:
    """Whether journald makes a file for each slot, because each has a user id of its own."""
    users = [path.stem.removeprefix("user-") for path in below(root, JOURNAL).glob("*/user-*.journal")]
    slots = [user for user in users if user.isdecimal() and int(user) in range(ids.BASES.start, ids.BASES.stop)]
    if not slots:
        return Finding("journal", "ok", "no file of the journal is of a slot")
    return Finding(
        "journal", "warn", f"{len(slots)} files of {JOURNAL} are of slots, each of 8 MiB, beyond SystemMaxUse=",
        "systemd-analyze cat-config systemd/journald.conf must end with SplitMode=login; then systemctl restart "
        "systemd-journald; journalctl --rotate; journalctl --vacuum-size=1G",
    )


def check_use(root: Path) -> Finding:
    """Whether the host's processes, threads and open files are far from their limits now."""
    with resources.Kernel(root) as kernel:
        uses = [(name, limit - free, limit) for name, free, limit in kernel.read()]
    found = ", ".join(f"{used} of {limit} {what}" for what, used, limit in uses)
    for what, used, limit in uses:
        if used > USE_MAX * limit:
            mend = "nbagent top names the slots that use most; lower slots.tasks or slots.capacity"
            return Finding("use", "warn", f"{found}: nearly all {what}", mend)
    return Finding("use", "ok", found)


def check_memory(root: Path, settings: host_config.HostConfig) -> Finding:
    """Whether the host has memory for its slots: for one, and for all as slots.overcommit has it."""
    total_bytes = meminfo(root)["MemTotal"]
    one = settings.slots.memory
    if one > total_bytes - settings.host.memory_reserve:
        return Finding(
            "memory", "fail", f"{format_size(total_bytes)} are too little for one slot of {format_size(one)}",
            "lower slots.memory or host.memory_reserve",
        )
    capacity = capacity_of(root, settings)
    if settings.slots.overcommit is None:
        return Finding("memory", "ok", f"{format_size(total_bytes)}; up to {capacity} slots by what they use")
    ratio = capacity * one / total_bytes
    found = f"{format_size(total_bytes)}; {capacity} slots of {format_size(one)} are {ratio:.1f} times as much"
    if ratio > settings.slots.overcommit * 1.01:
        return Finding("memory", "warn", found, "lower slots.capacity, or raise slots.overcommit")
    return Finding("memory", "ok", found)


def check_tasks(cpus: int, settings: host_config.HostConfig) -> Finding:
    """Whether slots.tasks suffices for a kernel with libraries, and for how many threads of each."""
    quota, tasks = settings.slots.cpu_quota, settings.slots.tasks
    limits = SlotLimits(settings.slots.memory, None if quota == "none" else parse_quota(quota, cpus), tasks)
    used, usable = processors(limits, cpus), processors(limits._replace(tasks=0), cpus)
    found = f"slots.tasks is {tasks}; libraries start up to {used} threads each"
    if used < usable:
        found += f"; one for each of {usable} processors requires slots.tasks = {usable * TASKS_PER_THREAD}"
    if (wanted := SERVER_TASKS + THREAD_POOLS * used) > tasks:
        return Finding("tasks", "warn", f"{found}, too little for a kernel", f"raise slots.tasks to {wanted}")
    return Finding("tasks", "ok", found)


def check_swap(root: Path, settings: host_config.HostConfig) -> Finding:
    """Whether idle slots are compressed, which requires cgroup v2 and that all swap of the host is in zram."""
    swap_bytes, areas = meminfo(root)["SwapTotal"], swap.read(root)
    if settings.cull.compress is None or not (root / "sys/fs/cgroup/cgroup.controllers").exists():
        found = f"{format_size(swap_bytes)}, which slots do not use" if swap_bytes else "none; slots would not use it"
        return Finding("swap", "ok", found)
    mend = "apt install systemd-zram-generator && systemctl daemon-reload && systemctl start dev-zram0.swap"
    if areas.on_disk:
        return Finding(
            "swap", "warn",
            f"{', '.join(areas.on_disk)} may be on a disk, so slots are not compressed: their data must stay in memory",
            f"run swapoff, and {mend}; or set cull.compress = \"never\"",
        )
    if not areas.in_memory:
        return Finding("swap", "ok", f"none; to let the agent compress idle slots into zram: {mend}")
    return Finding("swap", "ok", f"{format_size(swap_bytes)} in zram; idle slots are compressed into it")


@dataclass(frozen=True)
class KernelLimit:
    """A kernel limit that many slots together may reach. `path` is below /proc/sys; `per_slot` is what users need.

    `each_bytes`: the kernel memory of one object, if only its memory limit keeps a slot from creating all of them. That
    is named and no warning, because such a slot is an attack.
    """

    path: str
    base: int
    per_slot: int
    what: str
    each_bytes: int | None = None

    @property
    def sysctl(self) -> str:
        """The name of the limit for sysctl(8)."""
        return self.path.replace("/", ".")


LIMITS = (
    KernelLimit("kernel/pid_max", 4096, TASKS_PER_SLOT, "processes and threads"),
    KernelLimit("kernel/threads-max", 4096, TASKS_PER_SLOT, "processes and threads"),
    # The router needs four descriptors for each user, two for each websocket, all in one process.
    KernelLimit("fs/nr_open", 65536, FILES_PER_SLOT, "open files of one process"),
    # each_bytes is the size of struct file in /proc/slabinfo. systemd raises fs.file-max at boot to the highest value,
    # but a container has the value of its machine.
    KernelLimit("fs/file-max", 65536, OPEN_FILES_PER_SLOT, "open files", each_bytes=192),
    # kernel.pty.reserve keeps 1024 for the host. One slot has at most 32.
    KernelLimit("kernel/pty/max", 1024 + 32, TERMINALS_PER_SLOT, "terminals"),
    KernelLimit("net/netfilter/nf_conntrack_max", 16384, CONNECTIONS_PER_SLOT, "tracked connections"),
)


def check_limit(root: Path, limit: KernelLimit, settings: host_config.HostConfig) -> Finding:
    """Whether a kernel limit suffices for as many slots as the host has capacity for."""
    text = text_of(root / "proc/sys" / limit.path, "")
    if not text:
        return Finding(limit.sysctl, "ok", "not in use")
    value, capacity = int(text), capacity_of(root, settings)
    need = limit.base + capacity * limit.per_slot
    if value >= need:
        found = f"{value} {limit.what}"
        if limit.each_bytes is not None and (one := settings.slots.memory_max // limit.each_bytes) > value - need:
            found += f"; a slot of {format_size(settings.slots.memory_max)} that does nothing else may take {one}"
        return Finding(limit.sysctl, "ok", found)
    return Finding(
        limit.sysctl, "warn", f"{value} {limit.what} are too few for {capacity} slots",
        f"sysctl -w {limit.sysctl}={need}, and in /etc/sysctl.d",
    )


def capacity_of(root: Path, settings: host_config.HostConfig) -> int:
    """The number of slots that the supervisor would run at most on this host."""
    slots, total_bytes = settings.slots, meminfo(root)["MemTotal"]
    if slots.capacity is not None:
        return slots.capacity
    if slots.overcommit is not None:
        return admission.promised(total_bytes, slots.memory, slots.overcommit)
    return admission.most(total_bytes, settings.host.memory_reserve, slots.memory)
