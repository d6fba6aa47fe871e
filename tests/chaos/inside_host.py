# SPDX-License-Identifier: BSD-3-Clause
"""The program inside.py on a test host, as an object."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from pathlib import Path
from typing import Any

from plan import Fault

from testhost_driver import Host

# A command of the host, or ("fault", KIND, TARGET), or ("end", KIND).
Act = tuple[str, ...]
PROGRAM = Path(__file__).with_name("inside.py")
END_S = 120.0


class Inside:
    """A context with the program running. Threads may share it. Methods raise RuntimeError."""

    def __init__(self, host: Host) -> None:
        host.copy_in(PROGRAM, "/root/")
        self._host = host
        self._lock = threading.Lock()
        self._process = host.popen(
            ["python3", "-u", "/root/inside.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *_: object) -> None:
        # At the end of its input it ends the faults that last.
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._process.stdout.close()
        self._process.kill()
        self._process.wait()

    def begin(self, fault: Fault) -> Any:
        """Begins a fault."""
        return self._do({"do": "begin", "kind": fault.kind, "target": fault.target})

    def end(self, fault: Fault) -> None:
        """Ends a fault that lasts."""
        self._do({"do": "end", "kind": fault.kind, "target": fault.target})

    def census(self) -> dict[str, Any]:
        """Everything of nbagent on the host."""
        return self._do({"do": "census"})

    def load(self) -> dict[str, Any]:
        """Use of the processes of nbagent."""
        return self._do({"do": "load"})

    def act(self, words: Act) -> bool:
        """Executes a command of the host, or begins or ends a fault; False when the fault hit nothing."""
        if words[0] == "fault":
            return self.begin(Fault(0, words[1], words[2], 0.0, 1.0)) not in (None, [])
        if words[0] == "end":
            self.end(Fault(0, words[1], "", 0.0, 1.0))
        else:
            self._host.run(list(words))
        return True

    def _do(self, request: dict[str, str]) -> Any:
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            response = json.loads(self._process.stdout.readline())
        if "error" in response:
            raise RuntimeError(response["error"])
        return response["ok"]


def shell(text: str) -> Act:
    return ("sh", "-c", text)


def fault(kind: str, target: str) -> Act:
    """The begin of a fault of inside.py."""
    return ("fault", kind, target)
