"""When a claimed slot is ended by rule. Pure.

Active is: a kernel busy, a person or a kernel acting, or the processors in use above a
threshold. An open browser tab is none of these, so a tab on a sleeping machine keeps nothing
alive, and a cell that computes for hours without a word is never idle.

Of limits, only memory ends a slot: the kernel's log tells of each kill, with a list of the slot's
processes, two a second at the most (oom_kill_process in mm/oom_kill.c), and a slot that is killed
on and on fills it. A thousand are ten minutes of that; a leaking notebook is killed a few times.
"""

from __future__ import annotations

from dataclasses import dataclass

OOM_KILLS_MAX = 1000


@dataclass(frozen=True)
class ActivitySample:
    """A claimed slot at one moment.

    `active_s`: when it was last known to be active; `cpu`: processors' worth of time used since
    the look before, None at the first one; `oom_kills`: processes killed for memory, in all its life.
    """

    claimed_s: float
    expires_s: float
    active_s: float
    acted_s: float
    busy: int
    cpu: float | None
    oom_kills: int


def active_since(look: ActivitySample, cpu_threshold: float, now_s: float) -> float:
    """When the slot was last active, as far as this look can tell.

    A slot whose processor time is not known yet, as after a restart of the agent, gets the
    benefit of the doubt until the next look.
    """
    if look.busy or look.cpu is None or look.cpu >= cpu_threshold:
        return now_s
    return max(look.claimed_s, look.active_s, look.acted_s)


def reason(look: ActivitySample, idle_s: float, cpu_threshold: float, now_s: float) -> str | None:
    """`"age"`, `"idle"`, `"memory"`, or None when the slot goes on."""
    if now_s >= look.expires_s:
        return "age"
    if look.oom_kills >= OOM_KILLS_MAX:
        return "memory"
    if now_s - active_since(look, cpu_threshold, now_s) >= idle_s:
        return "idle"
    return None
