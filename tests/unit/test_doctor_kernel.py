# SPDX-License-Identifier: BSD-3-Clause
"""The checks of the kernel and of systemd by `nbagent doctor`, on a host of a few files in a temporary directory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from host_files import host

from nbagent.doctor import kernel, services, system
from nbagent.doctor.finding import Finding

MOUNT = "21 1 0:20 / /proc rw,nosuid - proc proc rw\n"


def test_a_host_without_systemd_fails(tmp_path: Path) -> None:
    finding = kernel.check_pid1(host(tmp_path, {"proc/1/comm": "sh\n"}), responds=False)
    assert (finding.status, finding.found) == ("fail", "PID 1 is sh")
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert kernel.check_pid1(tmp_path, responds=True).status == "ok"


def test_a_systemd_that_does_not_respond_fails_once_and_units_are_not_known(tmp_path: Path) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    finding = kernel.check_pid1(tmp_path, responds=False)
    assert finding.status == "fail" and "does not respond" in finding.found and "systemctl reboot -ff" in finding.mend
    unit = services.check_unit("nbagent.service", system.unknown_state)
    assert unit.status == "warn" and "service manager" in unit.mend


@pytest.mark.parametrize(
    ("text", "status"),
    [("systemd 252 (252.39-1~deb12u1)", "ok"), ("systemd 257 (257.8)", "ok"),
     ("systemd 247 (247.3)", "fail"), ("", "fail")],
)
def test_an_old_systemd_fails(text: str, status: str) -> None:
    assert kernel.check_systemd_version(lambda: text).status == status


def test_the_cgroup_hierarchy_is_found(tmp_path: Path) -> None:
    assert kernel.check_cgroups(tmp_path).status == "fail"
    (tmp_path / "sys/fs/cgroup/memory").mkdir(parents=True)
    assert kernel.check_cgroups(tmp_path).found.startswith("v1")
    (tmp_path / "sys/fs/cgroup/unified").mkdir()
    assert kernel.check_cgroups(tmp_path).found.startswith("hybrid")
    host(tmp_path, {"sys/fs/cgroup/cgroup.controllers": "cpu memory pids"})
    assert kernel.check_cgroups(tmp_path) == Finding("cgroups", "ok", "v2")


def test_a_missing_controller_fails(tmp_path: Path) -> None:
    host(tmp_path, {"sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids\n"})
    finding = kernel.check_controllers(tmp_path)
    assert finding.status == "fail"
    assert "memory" in finding.found and "cgroup_enable=memory" in finding.mend
    (tmp_path / "sys/fs/cgroup/memory").mkdir()
    assert kernel.check_controllers(tmp_path).status == "ok"


def test_a_kernel_without_psi_is_a_warning(tmp_path: Path) -> None:
    assert kernel.check_pressure(tmp_path).status == "warn"
    assert kernel.check_pressure(host(tmp_path, {"proc/pressure/memory": "some"})).status == "ok"


def test_forbidden_user_namespaces_fail(tmp_path: Path) -> None:
    def check(sets: str = "cap_setgid cap_setuid") -> Finding:
        return kernel.check_user_namespaces(tmp_path, lambda unit: sets)

    assert check().status == "fail"
    host(tmp_path, {"proc/sys/user/max_user_namespaces": "0\n"})
    assert check().status == "fail"
    host(tmp_path, {"proc/sys/user/max_user_namespaces": "9000\n"})
    assert check().status == "ok"
    # A mitigation of vulnerabilities, as RHEL's advisories name it.
    host(tmp_path, {"proc/sys/user/max_net_namespaces": "0\n"})
    assert check().status == "fail" and "sysctl -w user.max_net_namespaces=65536," in check().mend
    host(tmp_path, {"proc/sys/user/max_net_namespaces": "9000\n"})
    assert check().status == "ok"
    host(tmp_path, {"proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n"})
    assert check().status == "warn" and "nbagent-zygote@.service" in check().found
    host(tmp_path, {"proc/sys/kernel/unprivileged_userns_clone": "0\n"})
    found = check()
    assert found.status == "fail"
    for unit in ("nbagent-launch.service", "nbagent-zygote@.service"):
        assert f"> /etc/systemd/system/{unit}.d/userns.conf" in found.mend
    assert check("cap_setuid cap_sys_admin").status == "ok"
    only = kernel.check_user_namespaces(tmp_path, lambda unit: "cap_sys_admin" if "launch" in unit else "")
    assert only.status == "fail" and "launch.service.d" not in only.mend


def test_the_units_that_create_user_namespaces_are_those_with_cap_setuid() -> None:
    units = Path(__file__).parents[2] / "units"
    mapping = {
        path.name for path in units.glob("nbagent*.service")
        if re.search(r"^CapabilityBoundingSet=.*CAP_SETUID", path.read_text(), re.MULTILINE)
    }
    assert mapping - {"nbagent-router.service", "nbagent-gateway.service"} == set(kernel.USERNS_UNITS)


def test_overlayfs_may_be_a_module(tmp_path: Path) -> None:
    host(tmp_path, {"proc/filesystems": "nodev\tproc\n", "proc/sys/kernel/osrelease": "6.1.0\n"})
    assert kernel.check_overlay(tmp_path).status == "fail"
    host(tmp_path, {"lib/modules/6.1.0/modules.dep": "kernel/fs/overlayfs/overlay.ko:\n"})
    assert kernel.check_overlay(tmp_path).status == "ok"
    host(tmp_path, {"proc/filesystems": "nodev\toverlay\n"})
    assert kernel.check_overlay(tmp_path).found == "in the kernel"


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ("", "ok"),
        ("30 21 0:30 / /proc/sys/fs/binfmt_misc rw - autofs systemd-1 rw\n", "ok"),
        ("30 21 0:30 / /proc/kcore ro - tmpfs tmpfs rw\n", "fail"),
        ("30 21 0:20 /sys /proc/sys ro - proc proc rw\n", "fail"),
        ("30 21 0:20 /sys /proc/sys ro - proc proc rw\n31 1 0:31 / /run/proc rw - proc proc rw\n", "ok"),
        ("30 1 0:30 / /processes rw shared:1 master:2 - tmpfs tmpfs rw\n", "ok"),
    ],
)
def test_mounts_over_proc_fail(tmp_path: Path, more: str, status: str) -> None:
    host(tmp_path, {"proc/self/mountinfo": MOUNT + more})
    assert kernel.check_proc(tmp_path).status == status
