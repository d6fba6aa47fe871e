# SPDX-License-Identifier: BSD-3-Clause
"""Whether the kernel and systemd have what slots need."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from nbagent.core import paths
from nbagent.doctor.finding import Finding, Status
from nbagent.doctor.system import text_of
from nbagent.linux import apparmor, bpf
from nbagent.sandbox.spec import APPARMOR_PROFILE

SYSTEMD_MIN = 252
# A slot has one namespace of each kind, beside that of the users (namespaces(7)).
NAMESPACES = ("mnt", "pid", "ipc", "uts", "net", "cgroup")
NAMESPACES_MIN = 64
MODULES_UNIT = "nbagent-modules.service"
# The units that create user namespaces, and the settings that refuse these to processes without CAP_SYS_ADMIN: that of
# Debian's kernels, and that of AppArmor, whose effect depends on the profiles of the distribution.
USERNS_UNITS = ("nbagent-launch.service", "nbagent-zygote@.service")
USERNS_SETTINGS: tuple[tuple[str, str, Status], ...] = (
    ("unprivileged_userns_clone", "0", "fail"),
    ("apparmor_restrict_unprivileged_userns", "1", "warn"),
)


def check_pid1(root: Path, responds: bool) -> Finding:
    """Whether systemd is the service manager, by the directory that sd_booted(3) looks for, and `responds`."""
    name = "service manager"
    if not (root / "run/systemd/system").is_dir():
        program = text_of(root / "proc/1/comm", "unknown")
        return Finding(name, "fail", f"PID 1 is {program}", "slots are systemd scopes: boot this host with systemd")
    if responds:
        return Finding(name, "ok", "systemd")
    mend = "see journalctl _PID=1; if systemctl still fails, drain this host, and reboot it by systemctl reboot -ff"
    return Finding(name, "fail", "systemd does not respond to systemctl, so no slot starts or ends", mend)


def check_systemd_version(version_text: Callable[[], str]) -> Finding:
    """Whether systemd supports the scopes of slots; `version_text` is `systemctl --version`."""
    match = re.match(r"systemd (\d+)", version_text())
    if match is None:
        return Finding("systemd version", "fail", "no systemctl", "install systemd")
    if int(match[1]) >= SYSTEMD_MIN:
        return Finding("systemd version", "ok", match[1])
    return Finding(
        "systemd version", "fail", f"{match[1]}, but scopes of slots need {SYSTEMD_MIN} or later (OOMPolicy=continue)",
        "upgrade to Debian 12 or newer",
    )


def check_cgroups(root: Path) -> Finding:
    """The version of the host's cgroup hierarchy, with the features that v1 lacks."""
    mend = "boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line"
    lacks = "OOM kills of slots are not reported, slots have no PSI, and killing a slot is not atomic"
    if (root / "sys/fs/cgroup/cgroup.controllers").exists():
        return Finding("cgroups", "ok", "v2")
    if (root / "sys/fs/cgroup/unified").is_dir():
        return Finding("cgroups", "warn", f"hybrid, with limits by v1: {lacks}", mend)
    if (root / "sys/fs/cgroup/memory").is_dir():
        return Finding("cgroups", "warn", f"v1: {lacks}", mend)
    return Finding("cgroups", "fail", "no cgroup hierarchy is mounted at /sys/fs/cgroup", mend)


def check_controllers(root: Path) -> Finding:
    """Whether there is a controller for each limit of a slot."""
    wanted = ("memory", "cpu", "pids")
    below = root / "sys/fs/cgroup"
    listed = text_of(below / "cgroup.controllers", "").split()
    missing = [name for name in wanted if name not in listed and not (below / name).is_dir()]
    if not missing:
        return Finding("controllers", "ok", ", ".join(wanted))
    return Finding(
        "controllers", "fail", f"missing: {', '.join(missing)}; the kernel would not enforce these limits",
        f"boot with cgroup_enable={missing[0]}, without cgroup_disable=",
    )


def check_pressure(root: Path) -> Finding:
    """Whether the kernel measures pressure; with psi=0, /proc/pressure exists but cannot be read."""
    try:
        (root / "proc/pressure/memory").read_text()
    except OSError:
        return Finding(
            "pressure", "warn", "the kernel has no PSI, so a shortage of memory is detected late",
            "boot with psi=1 on the kernel's command line",
        )
    return Finding("pressure", "ok", "PSI")


def check_user_namespaces(root: Path, bounding_set_of: Callable[[str], str]) -> Finding:
    """Whether the units that create the user namespaces of slots may do so.

    `bounding_set_of` returns the CapabilityBoundingSet= of a unit. Both units run as root, but without CAP_SYS_ADMIN.
    """
    name = "user namespaces"
    limits = {"user.max_user_namespaces": int(text_of(root / "proc/sys/user/max_user_namespaces", "0"))}
    for kind in NAMESPACES:
        if text := text_of(root / f"proc/sys/user/max_{kind}_namespaces", ""):
            limits[f"user.max_{kind}_namespaces"] = int(text)
    if low := {setting: number for setting, number in limits.items() if number < NAMESPACES_MIN}:
        found = ", ".join(f"{setting} is {number}" for setting, number in low.items())
        return Finding(
            name, "fail", found, f"sysctl -w {' '.join(f'{setting}=65536' for setting in low)}, and in /etc/sysctl.d"
        )
    for setting, value, status in USERNS_SETTINGS:
        if text_of(root / "proc/sys/kernel" / setting, "") != value:
            continue
        shown = f"kernel.{setting}={value}"
        without = [unit for unit in USERNS_UNITS if "cap_sys_admin" not in bounding_set_of(unit).split()]
        if not without:
            return Finding(name, "ok", f"{shown}, and the units that create them have CAP_SYS_ADMIN")
        effect = "refuses" if status == "fail" else "may restrict"
        mend = [*map(_userns_drop_in, without), "systemctl daemon-reload && systemctl restart nbagent-launch nbagent"]
        found = f"{shown} {effect} those of {' and '.join(without)}, which have no CAP_SYS_ADMIN"
        return Finding(name, status, found, "; ".join(mend))
    return Finding(name, "ok", f"up to {min(limits.values())}")


def _userns_drop_in(unit: str) -> str:
    """The command that gives a unit CAP_SYS_ADMIN."""
    directory = f"/etc/systemd/system/{unit}.d"
    lines = r"[Service]\nCapabilityBoundingSet=CAP_SYS_ADMIN\n"
    return f"mkdir -p {directory} && printf '{lines}' > {directory}/userns.conf"


def check_apparmor(root: Path) -> Finding:
    """Whether slots have their profile, on a host with AppArmor. It confines them beside all else that does."""
    name, profile = "AppArmor", APPARMOR_PROFILE
    if not apparmor.is_enabled(root):
        return Finding(name, "ok", "not in this kernel, or disabled; slots are confined without it")
    mode = apparmor.mode_of(profile, root)
    if mode == "enforce":
        return Finding(name, "ok", f"profile {profile} is enforced in slots")
    file = f"/etc/apparmor.d/{profile}"
    if mode is None:
        load = f"apparmor_parser -r {file}"
        mend = load if (root / "sbin/apparmor_parser").exists() else f"apt install apparmor && {load}"
        return Finding(name, "warn", f"profile {profile} is not loaded, so slots have none", mend)
    return Finding(name, "warn", f"profile {profile} is in mode {mode}", f"aa-enforce {file} (apparmor-utils)")


def check_module_requests(root: Path, state_of: Callable[[str], str]) -> Finding:
    """Whether the kernel refuses to load modules for slots; `state_of` returns the state of a unit."""
    name, requests = "module requests", "slots can have modprobe started outside of their limits"
    if (root / "run/systemd/container").exists():
        return Finding(name, "ok", "in a container, whose kernel is not its own")
    if not bpf.is_security_module(str(root / bpf.SECURITY_MODULES.lstrip("/"))):
        mend = "add bpf to lsm= on the kernel's command line, or use the distribution's kernel"
        return Finding(name, "warn", f"the kernel's security modules do not include bpf: {requests}", mend)
    if state_of(MODULES_UNIT) == "active":
        return Finding(name, "ok", f"those of slots are refused by {MODULES_UNIT}")
    mend = f"systemctl restart {MODULES_UNIT}; journalctl -eu {MODULES_UNIT}"
    return Finding(name, "warn", f"{MODULES_UNIT} is not active: {requests}", mend)


def check_overlay(root: Path) -> Finding:
    """Whether the kernel has overlayfs, built in or as a module."""
    if "overlay" in text_of(root / "proc/filesystems", "").split():
        return Finding("overlayfs", "ok", "in the kernel")
    release = text_of(root / "proc/sys/kernel/osrelease", os.uname().release)
    modules = root / "lib/modules" / release
    lists = text_of(modules / "modules.dep", "") + text_of(modules / "modules.builtin", "")
    if "/overlay.ko" in lists:
        return Finding("overlayfs", "ok", "a module, not loaded yet")
    return Finding(
        "overlayfs", "fail", f"kernel {release} does not have it, and the root of a slot is an overlay",
        "use the distribution's kernel, or modprobe overlay",
    )


def check_proc(root: Path) -> Finding:
    """Whether a slot may mount a /proc of its own.

    In a user namespace the kernel refuses to mount a new proc unless another proc, with no other file system mounted
    over parts of it, is already mounted (mount_too_revealing() in fs/namespace.c). A mount over an empty directory,
    such as binfmt_misc, does not count.
    """
    covered: dict[str, list[str]] = {}
    points = []
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        points.append(fields[4])
        if fields[fields.index("-") + 1] == "proc" and fields[3] == "/":
            covered[fields[4]] = []
    for proc, over in covered.items():
        over += [
            point for point in points
            if point.startswith(proc + "/") and not point.endswith("/sys/fs/binfmt_misc")
        ]
    if any(not over for over in covered.values()):
        return Finding("proc", "ok", "a /proc without mounts over it exists")
    names = sorted({point for over in covered.values() for point in over})
    return Finding(
        "proc", "fail", f"mounts over {', '.join(names[:4])}: the kernel does not let a slot mount its own /proc",
        f"if this is a container: mount a full proc in it from outside, for example at {paths.RUN}/proc",
    )
