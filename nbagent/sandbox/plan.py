"""The order of the steps: from a process in its scope to a slot's root.

The order is one list, and a test pins it. Two moments divide it. `outside` runs in the process
that the supervisor started: it ends as the parent of a new pid namespace. `inside` runs in that
namespace's first process, still root of the user namespace, and ends with the host out of sight.
`connected` follows when the host has made the slot's interface meanwhile, and is empty without one.
`last` runs in the slot's own processes and leaves them without a capability.

A slot by fork has the same plan. Of its two processes, both forked for it, the first begins in the image's user
namespace and as the first of a pid namespace; the other, forked off the zygote, forks the program, and both join the
rest and do `last`.
The zygote itself is in a root made by `zygote_plan`, once for many slots.

Every step has its undo, the same for all: what it did is in a namespace, or in the process itself,
that no process of the host's is in, and the kernel takes it back when the process that failed has
ended. There is no second list of steps backwards that could fail as well.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import binascii
from typing import List, NamedTuple, Optional, Tuple

from nbagent.linux import namespaces as ns
from nbagent.linux.mounts import MS_NOEXEC, MS_NOSUID
from nbagent.sandbox import steps
from nbagent.sandbox.spec import SandboxSpec
from nbagent.sandbox.steps import Step

NAMESPACES = (
    ns.CLONE_NEWNS | ns.CLONE_NEWPID | ns.CLONE_NEWIPC | ns.CLONE_NEWUTS | ns.CLONE_NEWNET | ns.CLONE_NEWCGROUP
)
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# Docker's and podman's lists of what a container must not see or change (moby's oci/defaults.go).
MASKED_DIRECTORIES = ("/proc/acpi", "/proc/asound", "/proc/scsi")
MASKED_FILES = (
    "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/sysrq-trigger",
    "/proc/timer_list", "/proc/timer_stats",
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys")
# Where the slot finds the package nbagent; `zygote` in it runs under the image's own Python.
CODE_PATH = "/run/nbagent/lib/nbagent"
# A file of a notebook user is seldom below 4 KiB; a million empty ones end here, not in memory.
BYTES_PER_INODE = 4096
OPEN_FILES = 65536
# The inner end of a slot's interface.
INTERFACE = "net0"
PENDING_SIGNALS = 4096
# CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_SYS_CHROOT and CAP_SYS_ADMIN (capabilities(7)): setns(2) asks for the last
# two, the user and the end of all capabilities for the others.
FORKING = (6, 7, 8, 18, 21)
# Of the 3072 that kernel.pty.max leaves to all slots of a host.
TERMINALS = 32


UNDO = "goes with the process that did it"


class Line(NamedTuple):
    """One step of a start in words: which part of it, what it does, why, and how it is undone."""

    part: str
    step: str
    reason: str
    undo: str


class Plan(NamedTuple):
    """The steps of one sandbox, in order."""

    outside: Tuple[Step, ...]
    inside: Tuple[Step, ...]
    connected: Tuple[Step, ...]
    last: Tuple[Step, ...]

    def lines(self) -> List[Line]:
        """The plan for people: what each step does, where, and why."""
        parts = (("outside", self.outside), ("inside", self.inside), ("connected", self.connected), ("last", self.last))
        return [Line(part, step.describe(), reason(step), UNDO) for part, steps in parts for step in steps]


def reason(step: Step) -> str:
    """Why there is such a step: the words its class begins with."""
    return " ".join((type(step).__doc__ or "").split())


def plan(spec: SandboxSpec) -> Plan:
    """The plan of `spec`."""
    base, uplink = spec.mountpoint, spec.uplink
    inodes = spec.storage_bytes // BYTES_PER_INODE
    links = (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
             ("stderr", "/proc/self/fd/2"), ("ptmx", "pts/ptmx"))
    return Plan(
        outside=(_joined(),) if spec.forked else (
            steps.UserNamespace(spec.id_base, spec.uid),
            steps.Namespaces(NAMESPACES, "mount, pid, ipc, uts, net, cgroup"),
        ),
        inside=(
            steps.PrivateMounts(),
            steps.Tmpfs(base, spec.storage_bytes, inodes, "0755"),
            steps.Overlay(spec.root, f"{base}/upper", f"{base}/work", f"{base}/root"),
            steps.Directory(f"{base}/tmp", 0o1777),
            steps.Directory(f"{base}/shm", 0o1777),
            steps.Pivot(f"{base}/root"),
            steps.Bind(f"{base}/tmp".lstrip("/"), "/tmp"),
            steps.Tmpfs("/dev", 65536, 64, "0755", MS_NOSUID | MS_NOEXEC),
            steps.Devices("dev", "/dev", DEVICES),
            steps.DevPts("/dev/pts", TERMINALS),
            steps.Bind(f"{base}/shm".lstrip("/"), "/dev/shm", no_exec=True),
            *(steps.Link(f"/dev/{name}", to) for name, to in links),
            steps.Bind(spec.code.lstrip("/"), CODE_PATH, read_only=True),
            steps.Proc("/proc"),
            steps.Masked(MASKED_FILES, MASKED_DIRECTORIES, "dev/null"),
            steps.ReadOnly(READ_ONLY),
            steps.Detach(),
            steps.Identity(spec.user, spec.uid, spec.home, spec.slot),
            steps.OwnHome(spec.home, spec.uid),
            steps.Loopback(),
        ),
        connected=() if uplink is None else (
            steps.Interface(INTERFACE, uplink.addresses, uplink.gateways, uplink.rate),
            steps.Resolver(uplink.gateways[0]),
        ),
        # The first process of a slot by fork is born without a bounding set.
        last=last(spec.uid, spec.syscall_filter, () if spec.forked else None),
    )


def _joined() -> steps.Namespaces:
    return steps.Namespaces(NAMESPACES & ~ns.CLONE_NEWPID, "mount, ipc, uts, net, cgroup")


def zygote_plan(spec: SandboxSpec) -> Plan:
    """The plan of a zygote: a slot's, but for what it needs to fork slots.

    It is the root of the image's user namespace, of whose capabilities it keeps few, and in the host's pid
    namespace: the end of a pid namespace ends the ones within, and no slot ends with its zygote.
    """
    whole = plan(spec)
    return Plan(
        outside=(steps.UserNamespace(spec.id_base, spec.uid), _joined()),
        inside=tuple(steps.HostProc(step.target) if isinstance(step, steps.Proc) else step for step in whole.inside),
        connected=(),
        last=(
            steps.ResourceLimits(OPEN_FILES, PENDING_SIGNALS),
            steps.Forking(FORKING),
            steps.SystemCalls(binascii.a2b_base64(spec.syscall_filter)),
        ),
    )


def last(uid: int, syscall_filter: str, held: Optional[Tuple[int, ...]] = None) -> Tuple[Step, ...]:
    """What makes a process in the slot's namespaces one of the slot's: the end of every plan.

    `held` are the capabilities that it could still have; None for all. A zygote's children have its few, and its
    filter, so theirs only refuses what that allows beside (`syscalls.FORKING`).
    """
    return (
        steps.ResourceLimits(OPEN_FILES, PENDING_SIGNALS),
        steps.Unprivileged(uid, held),
        steps.SystemCalls(binascii.a2b_base64(syscall_filter)),
    )
