# SPDX-License-Identifier: BSD-3-Clause
"""The limits that jupyter-resource-usage shows: those of the slot now.

It reads MEM_LIMIT and CPU_LIMIT once, when it is loaded, which is before the claim, and in a zygote before the fork. At
each request it calls its setting `mem_limit`, if that is a function, before it reads `cpu_limit`, which has to be a
number. A value of the image's configuration stays.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import os
from typing import Any, Callable, MutableMapping, Optional

_SETTING = "jupyter_resource_usage_display_config"
_apply: Optional[Callable[[MutableMapping[str, str]], None]] = None
# The extension's settings, if it shows the CPU quota.
_with_quota: Any = None


def install(settings: MutableMapping[str, Any]) -> None:
    """Replaces the limits that the extension has read from the environment, if it is loaded."""
    global _with_quota
    usage = settings.get(_SETTING)
    if usage is None or str(getattr(usage, "mem_limit", "")) != os.environ.get("MEM_LIMIT", "0"):
        return
    usage.mem_limit = memory_bytes
    _with_quota = usage if getattr(usage, "cpu_limit", None) == _processors() else None


def follow(apply: Callable[[MutableMapping[str, str]], None]) -> None:
    """`apply` sets the variables of an environment to the slot's limits (nbagent.wire.limits_page)."""
    global _apply
    _apply = apply


def memory_bytes(**_: Any) -> int:
    """The limit of memory; sets that of processors. The arguments are the memory that is used."""
    if _apply is not None:
        _apply(os.environ)
    if _with_quota is not None:
        _with_quota.cpu_limit = _processors()
    text = os.environ.get("MEM_LIMIT", "")
    return int(text) if text.isdigit() else 0


def _processors() -> float:
    """The CPU quota, 0 for none."""
    try:
        return float(os.environ.get("CPU_LIMIT", "0"))
    except ValueError:
        return 0.0
