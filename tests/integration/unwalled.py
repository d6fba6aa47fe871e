# SPDX-License-Identifier: BSD-3-Clause
"""Starts sandboxes with one step of the plan left out or made to fail, or of an image with a link in a step's way.

    python3 unwalled.py IMAGE DECOYS <tests/integration/walls.py

Runs as root on a test host. Prints JSON: {variant: {"failed": text or null, "through": {try: what got through},
"left": [...]}}, where a variant is "whole", "without STEP", "fails after N" or "link NAME to TARGET"; "through": null
means that the program did not run. No supervisor: the launcher is called as the supervisor calls it, with the program
that tries the walls in the notebook server's place.
"""

import itertools
import json
import os
import select
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from nbagent.core.model import Limits, Slot, SlotState
from nbagent.image.store import ImageStore
from nbagent.linux import namespaces as ns
from nbagent.runtime import exec_slot
from nbagent.sandbox import plan, steps
from nbagent.supervisor.limit_files import LimitFiles
from nbagent.supervisor.sandbox_specs import sandbox_spec
from nbagent.wire import activity
from nbagent.wire.channel import Channel
from nbagent.wire.limits_page import SlotLimits

KINDS = {"mount": ns.CLONE_NEWNS, "pid": ns.CLONE_NEWPID, "ipc": ns.CLONE_NEWIPC, "uts": ns.CLONE_NEWUTS,
         "net": ns.CLONE_NEWNET, "cgroup": ns.CLONE_NEWCGROUP}
STORAGE = 64 << 20
# Names in an image's tree at which a step of the plan works, and targets of hostile links in their place.
IN_THE_WAY = (
    "tmp", "dev", "dev/null", "dev/shm", "dev/pts", "proc", "run", "run/nbagent", "run/nbagent/lib", "etc",
    "etc/passwd", "etc/group", "etc/hosts", "etc/hostname", "etc/resolv.conf", "home", "home/jovyan",
    "home/jovyan/notes",
)
TARGETS = ("/etc", "../../../../../etc/nbagent", "../../../../../tmp", "/proc/self/cwd/tmp", "/var/lib/nbagent")
whole_plan = plan.plan


class Refused(NamedTuple):
    """A step that the kernel refuses."""

    def describe(self):
        return "a step that is refused"

    def do(self):
        raise PermissionError(1, "Operation not permitted")


def changed(spec, change):
    """The plan with `change` made to the list of (part, step)."""
    made = whole_plan(spec)
    listed = [(part, step) for part in made._fields for step in getattr(made, part)]
    listed = change(listed)
    return plan.Plan(*(tuple(step for kind, step in listed if kind == part) for part in made._fields))


def name_of(step):
    """The name of a step here: its class, and its target where there are several."""
    kind = type(step).__name__
    return f"{kind} {step.target.lstrip('/')}" if kind in ("Tmpfs", "Bind") else kind


def variants(spec):
    """name → change"""
    listed = [step for part in whole_plan(spec) for step in part]
    found = {"whole": lambda known: known}
    for step in listed:
        name = f"without {name_of(step)}"
        if isinstance(step, steps.Namespaces):
            for kind, bit in KINDS.items():
                found[f"{name} {kind}"] = instead(name_of(step), step._replace(flags=step.flags & ~bit))
        elif type(step) in (steps.SharedProgram, steps.LimitFiles):
            found[f"{name}, by a bind mount"] = instead(
                name_of(step), steps.Bind(step.source, step.target, read_only=True)
            )
        else:
            found[name] = instead(name_of(step))
    for number in range(len(listed)):
        found[f"fails after {number}"] = failing(number)
    return found


def instead(name, *others):
    """The change that puts `others` in the place of the steps called `name`."""
    def change(known):
        changed_steps = []
        for part, step in known:
            changed_steps += [(part, other) for other in others] if name_of(step) == name else [(part, step)]
        return changed_steps

    return change


def failing(number):
    """The change that has a step that is refused before step `number`."""
    return lambda known: [*known[:number], (known[number][0], Refused()), *known[number:]]


def links(spec, below):
    """name → specification whose image, without a program, has one link in the way of a step"""
    found = {}
    for number, (name, target) in enumerate(itertools.product(IN_THE_WAY, TARGETS)):
        root = Path(below, str(number))
        for directory in ("tmp", "dev", "proc", "run", "etc", "home/jovyan"):
            if not (directory + "/").startswith(name + "/"):
                (root / directory).mkdir(parents=True, exist_ok=True)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)
        for path in (root, *root.rglob("*")):
            os.chown(path, spec.id_base, spec.id_base, follow_symlinks=False)
        found[f"link {name} to {target}"] = spec._replace(root=str(root))
    return found


def run(spec, change):
    """Starts one sandbox as the supervisor would; returns its failure and what its program reported."""
    control, peer = Channel.pair()
    result, report = os.pipe()
    page, config = activity.create(), os.memfd_create("nbagent-config")
    pid = os.fork()
    if pid == 0:
        os.setsid()
        control.close()
        for fd in (result, report, page, config):
            os.close(fd)
        exec_slot.plan = lambda given: changed(given, change)
        os.set_inheritable(peer.fileno(), True)
        sys.argv = ["exec_slot", str(peer.fileno())]
        exec_slot.main()
    peer.close()
    failed, init = None, None
    with control:
        control.send({"spec": spec.save()}, {"listen": report, "activity": page, "config": config})
        for fd in (report, page, config):
            os.close(fd)
        while (message := control.receive()) is not None:
            with message:
                init = message.take("init") if "init" in message.fds else init
                failed = message.body.get("failure", failed)
    os.waitpid(pid, 0)
    with open(result, "rb") as stream:
        reported = stream.read()
    if init is not None:
        select.select([init], [], [], 10)
        os.close(init)
    through = {name: what for name, what in json.loads(reported).items() if what is not None} if reported else None
    return {"failed": failed, "through": through}


def left(before):
    """Remains of a start on the host; waits, because a namespace's last process ends with a delay."""
    deadline = time.monotonic() + 10
    while (found := traces() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return sorted(found)


def traces():
    """Everything on the host that a start could leave behind."""
    with open("/proc/self/mountinfo") as file:
        found = {f"mount {line.split()[4]}" for line in file}
    found |= {f"file {name}" for name in os.listdir("/run/nbagent/sandbox")}
    for top in ("/etc", "/root", "/home", "/var/lib/nbagent", "/tmp", "/dev/shm"):
        for directory, directories, files in os.walk(top):
            is_images = directory.endswith("/images")
            if is_images:
                found |= {f"file {directory}/{name}" for name in directories if not name.startswith(".staging-")}
                directories.clear()
            # systemd makes and removes these whenever a service with PrivateTmp= starts or ends, so neither they nor
            # the size and time of /tmp itself are traces of a slot. Nor are the time of the store, from which
            # nbagent-sweep.service may be deleting the image of an earlier test, and that image.
            directories[:] = [name for name in directories if not name.startswith("systemd-private-")]
            for name in (files if is_images or directory == "/tmp" else (".", *files)):
                status = os.lstat(os.path.join(directory, name))
                facts = (status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns)
                found.add(f"file {directory}/{name} {facts}")
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                # Not of the agent's own processes, because its pool may be starting slots.
                if "/nbagent" not in Path(f"/proc/{name}/cgroup").read_text():
                    found.add(f"namespace {os.readlink(f'/proc/{name}/ns/user')}")
            except OSError:
                pass
    return found


def main():
    """Every variant, one after the other."""
    image, decoys = ImageStore().get(sys.argv[1]), json.loads(sys.argv[2])
    slot = Slot(
        id="host-unwalled00000", image=image.name, digest=image.digest, id_base=image.id_base, uid=1999,
        state=SlotState.STARTING, limits=Limits(1 << 30, 100, None, 256), token="", created_s=0.0,
    )
    code = f"{sys.stdin.read()}\nreport({decoys | {'storage': STORAGE}!r})\n"
    spec = sandbox_spec(slot, image, STORAGE, 60.0)._replace(command=[image.python, "-I", "-c", code])
    found = {}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as below:
        os.chmod(below, 0o755)
        files = Path(below, "limits")
        files.mkdir()
        LimitFiles(files).create(SlotLimits(1 << 30, 1.0))
        spec = spec._replace(limit_files=str(files))
        for name, change in variants(spec).items():
            before = traces()
            found[name] = run(spec, change) | {"left": left(before)}
        for name, hostile in links(spec, below).items():
            before = traces()
            found[name] = run(hostile, lambda known: known) | {"left": left(before)}
    print(json.dumps(found))


main()
