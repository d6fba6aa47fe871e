#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""The cost of isolation by step: runs as root on the measured host, prints JSON.

    isolation.py IMAGE COUNT STORAGE

Makes COUNT sandboxes side by side, as the launcher makes them but in lockstep: each does one step of the plan on a
command, reports its time, and waits. After each step of all sandboxes the memory of their cgroup is read; its growth
divided by COUNT is the memory of the step. Prints [[part, step, milliseconds of each, bytes a slot], ...].
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from nbagent.core.model import Limits, Slot, SlotState
from nbagent.image.store import ImageStore
from nbagent.linux import cgroup
from nbagent.sandbox.plan import plan
from nbagent.supervisor.sandbox_specs import sandbox_spec

FORK = "fork"
# The parts that end with a fork: the parent of a pid namespace stays outside it, and init is the parent of the program.
FORKING = ("outside", "inside")


def sandbox(spec: Any, control: socket.socket) -> NoReturn:
    """One sandbox that does a step for each command; ends when the command socket is closed."""
    for part, steps in zip(plan(spec)._fields, plan(spec), strict=True):
        for step in steps:
            obey(control, step.do)
        if part in FORKING:
            # The parent of a finished part waits here, because the main process waits for it.
            obey(control, lambda: None if os.fork() == 0 else wait_for_child())
    control.recv(1)
    os._exit(0)


def wait_for_child() -> NoReturn:
    """Forks; the child does the remaining steps."""
    os.wait()
    os._exit(0)


def obey(control: socket.socket, action: Any) -> None:
    """Waits for a command, acts, and sends the milliseconds that it took."""
    if not control.recv(1):
        os._exit(0)
    began_s = time.perf_counter()
    action()
    control.send(f"{1000 * (time.perf_counter() - began_s):.6f}".encode())


def main() -> None:
    """Makes all sandboxes and measures."""
    image, count, storage = ImageStore().get(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    controls = []
    for number in range(count):
        slot = Slot(
            id=f"bench-{number:012}", image=image.name, digest=image.digest, id_base=image.id_base, uid=2000 + number,
            state=SlotState.STARTING, limits=Limits(1 << 30, 100, None, 256), token="", created_s=0.0,
        )
        spec = sandbox_spec(slot, image, storage, 60.0)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            ours.close()
            for other in controls:
                other.close()
            sandbox(spec, theirs)
        theirs.close()
        controls.append(ours)
    own, rows = cgroup.of_process(os.getpid()), []
    before = own.usage().memory_bytes
    lines = plan(spec).lines()
    for part in plan(spec)._fields:
        named = [(part, line.step) for line in lines if line.part == part]
        for name in [*named, *([(part, FORK)] if part in FORKING else [])]:
            took_ms = []
            for control in controls:
                control.send(b".")
                took_ms.append(float(control.recv(100)))
            after = own.usage().memory_bytes
            rows.append([*name, took_ms, (after - before) / count])
            before = after
    for control in controls:
        control.close()
    for _ in controls:
        os.wait()
    print(json.dumps(rows))


if __name__ == "__main__":
    Path("/run/nbagent/sandbox").mkdir(exist_ok=True)
    main()
