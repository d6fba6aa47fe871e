# SPDX-License-Identifier: BSD-3-Clause
"""The lines of a service on standard error have their priorities in the journal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("act", "priority", "text"), [
    ("logging.getLogger('x').warning('one')", "4", "one"),
    ("logging.getLogger('asyncio').error('two')", "3", "two"),
    ("print(undefined)", "3", "NameError"),
    ("thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()", "3", "ZeroDivisionError"),
    ("sys.exit(7)", "", ""),
])
def test_each_line_has_its_priority(act: str, priority: str, text: str) -> None:
    code = f"import logging, sys, threading; from nbagent.core import logs; logs.configure(); {act}"
    by_hand = stderr_of(code, {})
    assert text in by_hand and not by_hand.startswith("<")
    by_systemd = stderr_of(code, {"JOURNAL_STREAM": "8:1"})
    assert text in by_systemd
    assert {line[:3] for line in by_systemd.splitlines()} == ({f"<{priority}>"} if priority else set())


def stderr_of(code: str, variables: dict[str, str]) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"} | variables
    argv = [sys.executable, "-c", code]
    return subprocess.run(argv, cwd=ROOT, env=environment, check=False, capture_output=True, text=True).stderr


def test_every_lasting_service_of_ours_has_this_log() -> None:
    programs = set()
    for unit in (ROOT / "units").glob("*.service"):
        if "Restart=always" in unit.read_text():
            programs |= set(re.findall(r"^ExecStart=\S+ -I -m (nbagent\.\S+)", unit.read_text(), re.MULTILINE))
    assert len(programs) > 5
    for program in programs:
        source = ROOT / program.replace(".", "/")
        main = source / "__main__.py" if source.is_dir() else source.with_suffix(".py")
        assert "    logs.configure()\n" in main.read_text(), program
