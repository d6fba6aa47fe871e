#!/usr/bin/python3
"""PSS of every process of the units that match, in KiB, as JSON: runs on the host that is measured."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path


def main(pattern: str) -> None:
    """Adds up by unit; a process that ends meanwhile counts as nothing."""
    found: dict[str, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines = (process / "cgroup").read_text().splitlines()
            named = [line for line in lines if "name=systemd" in line] or lines
            unit = named[0].rsplit("/", 1)[-1]
            if re.fullmatch(pattern, unit):
                rollup = (process / "smaps_rollup").read_text()
                found[unit] = found.get(unit, 0) + int(re.findall(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE)[0])
        except (OSError, IndexError):
            continue
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
