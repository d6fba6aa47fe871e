# SPDX-License-Identifier: BSD-3-Clause
"""The memory limit that jupyter-resource-usage shows: that of the slot now.

It reads MEM_LIMIT once, when it is loaded, which is before the claim, and in a zygote before the fork. It calls its
setting `mem_limit` at each request if that is a function. A value of the image's configuration stays.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import os
from typing import Any, Callable, MutableMapping, Optional

_SETTING = "jupyter_resource_usage_display_config"
_apply: Optional[Callable[[MutableMapping[str, str]], None]] = None


def install(settings: MutableMapping[str, Any]) -> None:
    """Replaces the limit that the extension has read from the environment, if it is loaded."""
    usage = settings.get(_SETTING)
    if usage is not None and str(getattr(usage, "mem_limit", "")) == os.environ.get("MEM_LIMIT", "0"):
        usage.mem_limit = memory_bytes


def follow(apply: Callable[[MutableMapping[str, str]], None]) -> None:
    """`apply` sets the variables of an environment to the slot's limits (nbagent.wire.limits_page)."""
    global _apply
    _apply = apply


def memory_bytes(**_: Any) -> int:
    """The limit; the arguments are the memory that is used."""
    if _apply is not None:
        _apply(os.environ)
    text = os.environ.get("MEM_LIMIT", "")
    return int(text) if text.isdigit() else 0
