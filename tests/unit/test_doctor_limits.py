# SPDX-License-Identifier: BSD-3-Clause
"""The checks of the services' limits and restarts by `nbagent doctor`."""

from __future__ import annotations

from pathlib import Path

import pytest
from host_files import host

from nbagent.doctor import limits


def unit(name: str, **properties: object) -> limits.Unit:
    return {"Id": name, **{key: str(value) for key, value in properties.items()}}


@pytest.mark.parametrize(("properties", "found"), [
    ({"TasksCurrent": 9, "TasksMax": 4915, "MemoryCurrent": 1 << 20, "MemoryMax": "infinity"}, ""),
    ({"TasksCurrent": "[not set]", "TasksMax": "infinity", "MemoryCurrent": (1 << 64) - 1, "MemoryMax": 4096}, ""),
    ({"TasksCurrent": 5, "TasksMax": 7}, "nbagent.service has 5 of 7 tasks"),
    ({"TasksCurrent": 980, "TasksMax": 1000}, "nbagent.service has 980 of 1000 tasks"),
    ({"MemoryCurrent": 99, "MemoryMax": 100}, "nbagent.service has 99 of 100 bytes of memory"),
    ({"MainPID": 7}, "nbagent.service has 2 of 5 descriptors"),
    ({"MainPID": 9}, ""),
])
def test_a_service_near_its_limits_is_a_warning(tmp_path: Path, properties: dict[str, object], found: str) -> None:
    host(tmp_path, {"proc/7/task/7/children": "8 9 ", "proc/8/limits": "Max open files  5  524288  files\n"})
    host(tmp_path, {f"proc/{pid}/fd/{number}": "" for pid in (7, 8) for number in (0, 1)})
    finding = limits.check_limits(tmp_path, [unit("nbagent.service", **properties)])
    assert finding.status == ("warn" if found else "ok")
    assert not found or (finding.found, "systemctl edit nbagent.service" in finding.mend) == (found, True)


@pytest.mark.parametrize(("count", "started_s", "status"), [(0, 990, "ok"), (3, 990, "warn"), (3, 900, "ok")])
def test_a_service_that_has_ended_lately_is_a_warning(count: int, started_s: int, status: str) -> None:
    properties = {"NRestarts": count, "ExecMainStartTimestampMonotonic": started_s * 1_000_000}
    finding = limits.check_restarts([unit("nbagent-api.service", **properties), unit("nbagent.slice")], 1000.0)
    assert finding.status == status
    assert ("started again 10 s ago (restarts: 3)" in finding.found) == (status == "warn")


def test_memory_that_a_zygote_has_used_for_files_is_no_finding(tmp_path: Path) -> None:
    zygote = unit("nbagent-zygote@minimal:1.service", MemoryCurrent=99, MemoryMax=100, TasksCurrent=2, TasksMax=256)
    assert limits.check_limits(tmp_path, [zygote]).status == "ok"


def test_the_limits_of_all_services_are_read() -> None:
    units = Path(__file__).parents[2] / "units"
    lasting = {
        path.name.replace("@.", "@*.") for path in units.glob("nbagent*.service")
        if "Restart=always" in path.read_text() and "gateway" not in path.name
    }
    assert lasting - {"nbagent-dns-update.service"} <= set(limits.UNITS)
