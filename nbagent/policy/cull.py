# SPDX-License-Identifier: BSD-3-Clause
"""The rules that end a claimed slot. Pure.

A slot is active while a kernel is busy, when a person or a kernel does something, and while its use of processors is
above a threshold. An open browser tab alone is no activity, so a tab on a sleeping machine does not keep a slot, and a
cell that computes for hours without output is not idle.

Memory is the only limit that ends a slot, because the kernel logs each OOM kill with a list of the slot's processes,
at most two a second (oom_kill_process in mm/oom_kill.c), and a slot with endless kills fills the log. A thousand kills
take ten minutes at that rate; a notebook that leaks memory has a few.
"""

from __future__ import annotations

from dataclasses import dataclass

OOM_KILLS_MAX = 1000


@dataclass(frozen=True)
class ActivitySample:
    """A claimed slot at one time.

    `active_s`: its last activity by the former samples. `cpu`: processors in use since the sample before, None at the
    first one. `oom_kills`: processes killed for memory since its start.
    """

    claimed_s: float
    expires_s: float
    active_s: float
    acted_s: float
    busy: int
    cpu: float | None
    oom_kills: int


def active_since(sample: ActivitySample, cpu_threshold: float, now_s: float) -> float:
    """The time of the slot's last activity by this sample.

    A slot counts as active while its use of processors is not known, as at the first sample after a restart of the
    supervisor.
    """
    if sample.busy or sample.cpu is None or sample.cpu >= cpu_threshold:
        return now_s
    return max(sample.claimed_s, sample.active_s, sample.acted_s)


def reason(sample: ActivitySample, idle_s: float, cpu_threshold: float, now_s: float) -> str | None:
    """The rule that ends the slot: `"age"`, `"idle"` or `"memory"`; None when it goes on."""
    if now_s >= sample.expires_s:
        return "age"
    if sample.oom_kills >= OOM_KILLS_MAX:
        return "memory"
    if now_s - active_since(sample, cpu_threshold, now_s) >= idle_s:
        return "idle"
    return None
