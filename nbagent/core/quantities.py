# SPDX-License-Identifier: BSD-3-Clause
"""Parsers and formatters of quantities: memory, time, shares of the processors, network rates.

The settings and the API parse quantities by these functions only, so that both accept the same syntax.
Every parser raises ValueError with the expected syntax; the caller adds the name of the field.
"""

from __future__ import annotations

import re

_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_SIZE_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DURATION = re.compile(r"(?:[0-9]{1,10}(?:\.[0-9]{1,6})?(?:ms|s|min|m|h|d)\s*){1,6}")
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|min|m|h|d)")
_DURATION_UNITS = {"ms": 0.001, "s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}
_RATE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([kMG]?)bit")
_RATE_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_FRACTION = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")
_PERCENT = re.compile(r"([0-9]{1,7}(?:\.[0-9]+)?)%")

SIZE_EXPECTED = 'a size in bytes such as 536870912 or "512M" (K, M, G, T are powers of 1024)'
DURATION_EXPECTED = 'a time in seconds such as 3600, or "90s", "30min", "12h", "1d"'
QUOTA_EXPECTED = 'a share of the host such as "1/32", or of one processor such as "50%" or "150%"'
RATE_EXPECTED = 'bits a second such as "500kbit", "100Mbit" or "1Gbit" (powers of 1000), from 64kbit to 32Gbit'
INTEGER_EXPECTED = "a whole number"


def parse_size(value: object) -> int:
    """Bytes of `"512M"` or `536870912`. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value >= 0:
            return value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(float(match[1]) * _SIZE_UNITS[match[2].upper()])
    raise ValueError(SIZE_EXPECTED)


def parse_duration(value: object) -> float:
    """Seconds of `"1h30min"`, `90` or `0.5`. Raises ValueError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if 0 <= value < 1e10:
            return float(value)
    elif isinstance(value, str):
        text = value.strip()
        if re.fullmatch(r"[0-9]{1,10}(?:\.[0-9]+)?", text):
            return float(text)
        if _DURATION.fullmatch(text):
            return sum(float(n) * _DURATION_UNITS[unit] for n, unit in _DURATION_PART.findall(text))
    raise ValueError(DURATION_EXPECTED)


def parse_rate(value: object) -> int:
    """Bytes a second of `"100Mbit"`. Raises ValueError.

    The upper bound keeps the bytes a second within 32 bits, the size of the rate in the kernel's token bucket.
    """
    if isinstance(value, str) and (match := _RATE.fullmatch(value.strip())):
        rate = float(match[1]) * _RATE_UNITS[match[2]]
        if 64e3 <= rate <= 32e9:
            return int(rate / 8)
    raise ValueError(RATE_EXPECTED)


def parse_quota(value: object, cpus: int) -> float:
    """The number of processors in `"1/32"` (of `cpus`) or `"50%"` (of one). Raises ValueError.

    The percentage has the meaning of systemd's `CPUQuota=`; the fraction of the host is tmpnb's syntax.
    """
    if isinstance(value, str):
        if (match := _FRACTION.fullmatch(value.strip())) and int(match[2]):
            quota = int(match[1]) * cpus / int(match[2])
        elif match := _PERCENT.fullmatch(value.strip()):
            quota = float(match[1]) / 100
        else:
            raise ValueError(QUOTA_EXPECTED)
        if 0 < quota <= cpus:
            return quota
        raise ValueError(f"{QUOTA_EXPECTED}, above 0 and at most the host's {cpus} processors")
    raise ValueError(QUOTA_EXPECTED)


def parse_integer(value: object) -> int:
    """The integer in `7` or `"7"`, because values of a query string are text. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value.strip()):
        return int(value)
    raise ValueError(INTEGER_EXPECTED)


def format_size(size_bytes: int) -> str:
    """`"512M"`: the largest binary unit that leaves at most one decimal."""
    amount = float(size_bytes)
    for unit in ("B", "K", "M", "G"):
        if amount < 1024:
            return f"{amount:.0f}{unit}" if amount >= 10 or amount == int(amount) else f"{amount:.1f}{unit}"
        amount /= 1024
    return f"{amount:.1f}T"


def format_duration(duration_s: float) -> str:
    """`"2h05m"`, `"3m10s"` or `"45s"`, for a table column."""
    seconds = max(0, int(duration_s))
    if seconds >= 86400:
        return f"{seconds // 86400}d{seconds % 86400 // 3600:02}h"
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"
    if seconds >= 60:
        return f"{seconds // 60}m{seconds % 60:02}s"
    return f"{seconds}s"
