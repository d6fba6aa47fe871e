# SPDX-License-Identifier: BSD-3-Clause
"""The state of a host at rest, and figures, for the runs in this directory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

WARM = 2
SETTINGS = f"""
[slots]
memory = "512M"
[pool]
warm = {WARM}
[network]
allow = ["none", "internet"]
"""
REST_S = 240.0


def differences(
    slots: list[dict[str, Any]], take_census: Callable[[], dict[str, Any]], held: set[str]
) -> list[str]:
    """The differences from a host at rest on which `held` are claimed.

    A census starts a dozen programs, which delay the starts of slots on an emulated machine. So none is taken before
    the slots are those of a host at rest.
    """
    found: list[str] = []

    def check(name: str, is_there: Any, wanted: Any) -> None:
        if is_there != wanted:
            found.append(f"{name}: {is_there} instead of {wanted}")

    states = {slot["slot"]: slot["state"] for slot in slots}
    check("claimed slots", {name for name, state in states.items() if state == "claimed"}, held)
    check("warm slots", sum(state == "warm" for state in states.values()), WARM)
    check("all slots", len(states), WARM + len(held))
    reasons = [slot["launch_reason"] for slot in slots if slot["state"] == "warm" and slot["launch_reason"]]
    check("reasons why warm slots are not of a complete zygote", reasons, [])
    if found:
        return found
    census = take_census()
    names = sorted(states)
    records = census["records"]
    check("records", sorted(records), names)
    check("states by records", {name: record and record["state"] for name, record in records.items()}, states)
    limits = {slot["slot"]: slot["limits"]["memory_bytes"] for slot in slots}
    check("limits by records", {name: record and record["memory"] for name, record in records.items()}, limits)
    ids = [tuple(record["uid"]) for record in records.values() if record]
    check("user ids that two slots have", len(ids) - len(set(ids)), 0)
    used = [address for record in records.values() if record for address in record["addresses"] or []]
    check("addresses that two slots have", len(used) - len(set(used)), 0)
    scopes = [f"nbagent-{name}.scope" for name in names]
    check("scopes", census["scopes"], scopes)
    zygotes = sorted(unit for unit in census["processes"] if unit.startswith("nbagent-zygote@"))
    check("zygotes", len(zygotes), 1)
    check("processes of zygotes", [census["processes"][unit] for unit in zygotes], [2])
    check("cgroups", census["cgroups"], sorted([*scopes, *zygotes]))
    check("processes in the cgroup of the launch service", census["processes"].get("nbagent-launch.service", 1), 1)
    check("processes outside of slots", census["strays"], [])
    check("processes that have ended and were not reaped", census["zombies"], [])
    check("connections in systemd's store", census["stored"], "1")
    with_interface = sum(bool(record and record["addresses"]) for record in records.values())
    links = len(census["links"])
    if not with_interface - len(held) <= links <= with_interface:
        found.append(f"interfaces: {links} for {with_interface} slots with addresses")
    check("faults of the network", census["network"], [])
    check("files of the journal for one user", census["journals"], [])
    check("unfinished records", census["half"] + census["files"], [])
    left = [name for name in census["transient"] if not any(
        name.startswith(unit.removesuffix(".service").removesuffix(".scope")) for unit in (*scopes, *zygotes)
    ) and not name.startswith(("nbagent.slice", "nbagent-launch"))]
    check("files of units that have ended", left, [])
    return found


def percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def summary(values: list[float]) -> dict[str, float]:
    return {
        "count": len(values), "p50": round(statistics.median(values), 3) if values else 0.0,
        "p90": round(percentile(values, 0.9), 3), "p99": round(percentile(values, 0.99), 3),
        "max": round(max(values, default=0.0), 3),
    }
