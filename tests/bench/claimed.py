# SPDX-License-Identifier: BSD-3-Clause
"""One claim, statistics of many, and parsers of HAProxy's figures. Pure."""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import figures


@dataclass(frozen=True)
class Claimed:
    """One claim: `status` is 0 without a response, `slot` is "" without a slot."""

    status: int
    slot: str
    began_s: float
    took_ms: float

    @property
    def label(self) -> str:
        return self.slot.partition("-")[0]


def slot_of(url: str) -> str:
    """The id of the slot in the url that tmpnb's API returns."""
    return url.partition("/user/")[2].partition("/")[0]


def summary(claims: list[Claimed]) -> dict[str, Any]:
    """The statistics of claims: counts, failures, latencies, claims by host."""
    statuses = Counter(claimed.status for claimed in claims)
    return {
        "claims": len(claims), "failed": len(claims) - statuses[200],
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "answer_ms": figures.latency([claimed.took_ms for claimed in claims]),
        "by_host": dict(sorted(Counter(claimed.label for claimed in claims if claimed.slot).items())),
    }


def metric(text: str, name: str, labels: str) -> float:
    """The value of one sample of a Prometheus text; 0 when it is missing."""
    match = re.search(rf"^{re.escape(name)}{{{re.escape(labels)}}} (\S+)", text, re.MULTILINE)
    return float(match[1]) if match else 0.0


def rows(text: str) -> list[dict[str, str]]:
    """The output of HAProxy's `show stat`: a row for each frontend, backend and server."""
    return list(csv.DictReader(text.removeprefix("# ").splitlines()))
