# SPDX-License-Identifier: BSD-3-Clause
"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check. `mend` is the way to fix it and is empty when there is nothing to do."""

    name: str
    status: Status
    found: str
    mend: str = ""
