"""One claim, and what is said of many; and of HAProxy's own figures. Pure."""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import figures


@dataclass(frozen=True)
class Claimed:
    """One claim: `status` is 0 when no answer came, `slot` "" when there is none."""

    status: int
    slot: str
    began_s: float
    took_ms: float

    @property
    def label(self) -> str:
        return self.slot.partition("-")[0]


def slot_of(url: str) -> str:
    """The slot in the address that tmpnb's API answers."""
    return url.partition("/user/")[2].partition("/")[0]


def told(claims: list[Claimed]) -> dict[str, Any]:
    """What is said of claims."""
    statuses = Counter(claimed.status for claimed in claims)
    return {
        "claims": len(claims), "failed": len(claims) - statuses[200],
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "answer_ms": figures.latency([claimed.took_ms for claimed in claims]),
        "by_host": dict(sorted(Counter(claimed.label for claimed in claims if claimed.slot).items())),
    }


def metric(text: str, name: str, labels: str) -> float:
    """One sample of Prometheus' text; 0 when it is not there."""
    match = re.search(rf"^{re.escape(name)}{{{re.escape(labels)}}} (\S+)", text, re.MULTILINE)
    return float(match[1]) if match else 0.0


def rows(text: str) -> list[dict[str, str]]:
    """What HAProxy's `show stat` tells, a row for each frontend, backend and server."""
    return list(csv.DictReader(text.removeprefix("# ").splitlines()))
