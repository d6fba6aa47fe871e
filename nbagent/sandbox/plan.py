# SPDX-License-Identifier: BSD-3-Clause
"""The order of the sandbox's steps, from a process in its scope to a slot in its own root.

A test pins the order. The steps are in four parts, because they run in different processes:

    outside     in the process that the supervisor started; afterwards its next child is PID 1 of a pid namespace
    inside      in that PID 1, still root of the user namespace; ends with the host's root unmounted
    connected   in the same process, after the host has made the slot's interface; empty for a slot without one
    last        in every process of the slot; removes all capabilities and loads the system call filter

A slot that is forked from a zygote has the same plan. The zygote service forks the slot's PID 1, which is already in
the image's user namespace and in a new pid namespace. The zygote forks the slot's program, which joins the
namespaces of PID 1. Both run `last`. The zygote itself has the root that `zygote_plan` describes, made once for all
its slots.

No step needs a step that undoes it, because everything a step makes belongs to a namespace, or to the process
itself, and no process of the host is in those namespaces: when the processes of a failed start exit, the kernel
removes all of it.

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
# The masked and read-only paths of Docker and podman (moby's oci/defaults.go).
MASKED_DIRECTORIES = ("/proc/acpi", "/proc/asound", "/proc/scsi")
MASKED_FILES = (
    "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/sysrq-trigger",
    "/proc/timer_list", "/proc/timer_stats",
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys")
# The package nbagent inside the slot; its programs run there under the image's own Python.
CODE_PATH = "/run/nbagent/lib/nbagent"
# Where the directory of the storage is mounted that becomes the home: /dev has no entry of an image.
HOME_PATH = "/dev/home"
# A tmpfs does not count inodes against its size, so their number is limited, to one for every 4 KiB of storage.
BYTES_PER_INODE = 4096
OPEN_FILES = 65536
# Jupyter's files about kernels have a file system of their own, so that kernels start while the storage is full.
RUNTIME_PATH, RUNTIME_BYTES = "/run/jupyter", 1 << 20
NETWORK_SETTINGS = (
    ("net.core.tstamp_allow_data", "0"), ("net.ipv4.igmp_max_memberships", "4"),
    ("net.ipv4.tcp_max_tw_buckets", "4096"), ("net.ipv4.tcp_no_metrics_save", "1"),
)
# The name of the slot's end of its interface.
INTERFACE = "net0"
PENDING_SIGNALS = 4096
# CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_SYS_CHROOT and CAP_SYS_ADMIN (capabilities(7)). setns(2) needs the last two
# for a mount namespace; setresuid(2), setresgid(2) and the removal of the bounding set need the others.
FORKING = (6, 7, 8, 18, 21)
# A slot's share of the 3072 terminals (kernel.pty.max less kernel.pty.reserve) of all devpts instances of a host.
TERMINALS = 32


UNDO = "removed by the kernel when the slot's processes exit"


class Line(NamedTuple):
    """One step of a start as text: its part of the plan, its effect, its reason, and what undoes it."""

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
        """The plan as text, for `nbagent slot plan`."""
        parts = (("outside", self.outside), ("inside", self.inside), ("connected", self.connected), ("last", self.last))
        return [Line(part, step.describe(), reason(step), UNDO) for part, steps in parts for step in steps]


def reason(step: Step) -> str:
    """The reason for a step, which is the docstring of its class."""
    return " ".join((type(step).__doc__ or "").split())


def plan(spec: SandboxSpec) -> Plan:
    """The plan of `spec`."""
    base, uplink = spec.mountpoint, spec.uplink
    inodes = spec.storage_bytes // BYTES_PER_INODE
    links = (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
             ("stderr", "/proc/self/fd/2"), ("ptmx", "pts/ptmx"))
    return Plan(
        outside=(_namespaces_but_pid(),) if spec.forked else (
            steps.UserNamespace(spec.id_base, spec.uid),
            steps.Namespaces(NAMESPACES, "mount, pid, ipc, uts, net, cgroup"),
        ),
        inside=(
            steps.PrivateMounts(),
            steps.Tmpfs(base, spec.storage_bytes, inodes, "0755"),
            steps.Overlay(spec.root, f"{base}/upper", f"{base}/work", f"{base}/root"),
            steps.Directory(f"{base}/tmp", 0o1777),
            steps.Directory(f"{base}/shm", 0o1777),
            steps.Directory(f"{base}/var-tmp", 0o1777),
            steps.Directory(f"{base}/home", 0o700),
            *([steps.LimitFiles(spec.limit_files, f"{base}/limits", f"{base}/empty")] if spec.limit_files else []),
            steps.Pivot(f"{base}/root"),
            steps.Bind(f"{base}/tmp".lstrip("/"), "/tmp"),
            steps.Bind(f"{base}/var-tmp".lstrip("/"), "/var/tmp"),
            *((steps.PublicDirectories(f"{base}/public".lstrip("/"), tuple(spec.public), spec.uid),)
              if spec.public else ()),
            steps.Tmpfs("/dev", 65536, 64, "0755", MS_NOSUID | MS_NOEXEC),
            steps.Devices("dev", "/dev", DEVICES),
            steps.DevPts("/dev/pts", TERMINALS),
            steps.Bind(f"{base}/shm".lstrip("/"), "/dev/shm", no_exec=True),
            steps.Bind(f"{base}/home".lstrip("/"), HOME_PATH),
            *(steps.Link(f"/dev/{name}", to) for name, to in links),
            steps.SharedProgram(spec.code.lstrip("/"), CODE_PATH, f"{base}/empty".lstrip("/")),
            steps.SystemFiles(spec.system.lstrip("/"), "/sys", f"{base}/empty".lstrip("/")),
            steps.OwnCgroup("/sys/fs/cgroup"),
            *_limit_file(spec, "online", "/sys/devices/system/cpu/online"),
            steps.Proc("/proc"),
            *_limit_file(spec, "meminfo", "/proc/meminfo"),
            steps.NetworkSettings(NETWORK_SETTINGS),
            steps.Masked(MASKED_FILES, MASKED_DIRECTORIES, "dev/null"),
            steps.ReadOnly(READ_ONLY),
            steps.Detach(),
            steps.Identity(spec.user, spec.uid, spec.home, spec.slot),
            *((steps.UserPackages(spec.command[0]),) if spec.command else ()),
            # After Detach, because the image's home may be a link to its root directory, where the host's root was.
            steps.Home(HOME_PATH, spec.home, spec.uid),
            steps.Tmpfs(RUNTIME_PATH, RUNTIME_BYTES, RUNTIME_BYTES // BYTES_PER_INODE, "0700", uid=spec.uid),
            steps.Loopback(),
            *((steps.ReadOnlyRoot(),) if uplink is None else ()),
        ),
        connected=() if uplink is None else (
            steps.Interface(INTERFACE, uplink.addresses, uplink.gateways, uplink.rate),
            steps.Resolver(uplink.gateways[0]),
            steps.ReadOnlyRoot(),
        ),
        # The PID 1 of a forked slot inherits an empty bounding set from the zygote service.
        last=last(spec.uid, spec.syscall_filter, () if spec.forked else None, spec.apparmor),
    )


def _limit_file(spec: SandboxSpec, name: str, target: str) -> List[Step]:
    return [steps.LimitFile(f"{spec.mountpoint}/limits/{name}".lstrip("/"), target)] if spec.limit_files else []


def _namespaces_but_pid() -> steps.Namespaces:
    return steps.Namespaces(NAMESPACES & ~ns.CLONE_NEWPID, "mount, ipc, uts, net, cgroup")


def zygote_plan(spec: SandboxSpec) -> Plan:
    """The plan of a zygote, which differs from a slot's in what a zygote needs to fork slots.

    A zygote stays root of the image's user namespace, with the capabilities `FORKING` only. It stays in the host's
    pid namespace, because the kernel kills nested pid namespaces together with their ancestor: otherwise the end of
    a zygote would end its slots.
    """
    base = plan(spec)
    return Plan(
        outside=(steps.UserNamespace(spec.id_base, spec.uid), _namespaces_but_pid()),
        inside=tuple(steps.HostProc(step.target) if isinstance(step, steps.Proc) else step for step in base.inside),
        connected=(),
        last=(
            steps.ResourceLimits(OPEN_FILES, PENDING_SIGNALS),
            steps.Forking(FORKING),
            steps.SystemCalls(binascii.a2b_base64(spec.syscall_filter)),
        ),
    )


def last(
    uid: int, syscall_filter: str, held: Optional[Tuple[int, ...]] = None, apparmor: str = ""
) -> Tuple[Step, ...]:
    """The steps that take all privileges from a process in the slot's namespaces: the end of every slot's plan.

    `held` are the capabilities that its bounding set can still contain; None means all. A child of a zygote has
    inherited the zygote's bounding set and system call filter, so that its own filter only has to refuse the calls
    that `syscalls.FORKING` allows to a zygote. `apparmor` is a profile, empty on a host without AppArmor.
    """
    return (
        steps.ResourceLimits(OPEN_FILES, PENDING_SIGNALS),
        steps.Unprivileged(uid, held),
        *([steps.AppArmor(apparmor)] if apparmor else []),
        steps.SystemCalls(binascii.a2b_base64(syscall_filter)),
    )
