# SPDX-License-Identifier: BSD-3-Clause
"""Each check of `nbagent doctor`, on a host that consists of a few files in a temporary directory."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import FakeSupervisor

from archives import Archive
from nbagent import doctor
from nbagent.config import host_config
from nbagent.core import paths
from nbagent.core.proxies import HttpProxy
from nbagent.doctor import capacity, kernel, limits, network, services, system
from nbagent.doctor.finding import Finding
from nbagent.image import ids
from nbagent.image.store import ImageStore
from nbagent.policy import admission
from nbagent.wire import control

SETTINGS = host_config.HostConfig()
ROUTE_HEAD = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
MEMINFO = {"proc/meminfo": "MemTotal: 8912896 kB\n"}
MOUNT = "21 1 0:20 / /proc rw,nosuid - proc proc rw\n"


def host(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


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


@pytest.mark.parametrize(("blocks", "inodes", "status", "found"), [
    ((50, 100), (9, 10), "ok", "50 % of the blocks are free (50)"),
    ((4, 100), (9, 10), "warn", "4 % of the blocks are free (4), for images"),
    ((50, 100), (0, 1000), "fail", "0 % of the inodes are free (0), for images"),
    ((50, 100), (0, 0), "ok", "50 % of the blocks are free (50)"),  # btrfs
])
def test_a_file_system_without_room_is_found(
    tmp_path: Path, blocks: tuple[int, int], inodes: tuple[int, int], status: str, found: str
) -> None:
    def read(path: Path) -> os.statvfs_result:
        assert path == tmp_path / "var/lib/nbagent/images"
        return os.statvfs_result((4096, 4096, blocks[1], blocks[0], blocks[0], inodes[1], inodes[0], inodes[0], 0, 255))

    finding = capacity.check_room(tmp_path, paths.IMAGES, "images", read)
    assert (finding.status, finding.found) == (status, found)


def test_a_directory_that_does_not_exist_needs_no_room(tmp_path: Path) -> None:
    assert capacity.check_room(tmp_path, paths.IMAGES, "images").status == "ok"
    tmp_path.joinpath("var/lib/nbagent/images").mkdir(parents=True)
    found = capacity.check_room(tmp_path, paths.IMAGES, "images").found
    assert re.search(r"\d+ % of the (blocks|inodes) are free", found)


def test_the_use_of_processes_and_open_files_is_compared_with_their_limits(tmp_path: Path) -> None:
    limits = {"proc/sys/kernel/pid_max": "32768\n", "proc/sys/kernel/threads-max": "192000\n"}
    host(tmp_path, {**limits, "proc/loadavg": "1 1 1 3/1000 4711\n", "proc/sys/fs/file-nr": "5000\t0\t100000\n"})
    finding = capacity.check_use(tmp_path)
    assert (finding.status, finding.found) == (
        "ok", "1000 of 32768 processes and threads, 5000 of 100000 open files",
    )
    host(tmp_path, {"proc/loadavg": "1 1 1 3/30000 4711\n"})
    assert "nearly all processes and threads" in capacity.check_use(tmp_path).found
    host(tmp_path, {"proc/loadavg": "1 1 1 3/10 4711\n", "proc/sys/fs/file-nr": "90000\t0\t100000\n"})
    assert "nearly all open files" in capacity.check_use(tmp_path).found
    assert capacity.check_use(tmp_path / "elsewhere").status == "ok"


def test_a_file_of_the_journal_for_each_slot_is_a_warning(tmp_path: Path) -> None:
    assert capacity.check_journal(tmp_path).status == "ok"
    journal = tmp_path / "var/log/journal/0123"
    journal.mkdir(parents=True)
    for name in ("system.journal", "user-1000.journal", "user-1879048192@0a-0b.journal"):
        (journal / name).touch()
    assert capacity.check_journal(tmp_path).status == "ok"
    for uid in (ids.BASES.start, ids.BASES.start + 70_000):
        (journal / f"user-{uid}.journal").touch()
    finding = capacity.check_journal(tmp_path)
    assert finding.status == "warn" and finding.found.startswith("2 files of /var/log/journal are of slots")


def test_forbidden_user_namespaces_fail(tmp_path: Path) -> None:
    def check(sets: str = "cap_setgid cap_setuid") -> Finding:
        return kernel.check_user_namespaces(tmp_path, lambda unit: sets)

    assert check().status == "fail"
    host(tmp_path, {"proc/sys/user/max_user_namespaces": "0\n"})
    assert check().status == "fail"
    host(tmp_path, {f"proc/sys/user/max_{kind}_namespaces": "9000\n" for kind in kernel.NAMESPACES})
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


def test_an_inactive_unit_fails() -> None:
    assert services.check_unit("nbagent.service", lambda unit: "active").status == "ok"
    finding = services.check_unit("nbagent.service", lambda unit: "failed")
    assert (finding.status, finding.found) == ("fail", "failed")
    assert "journalctl" in finding.mend


def test_the_sockets_of_the_services_that_the_supervisor_uses_are_looked_at() -> None:
    unit = (Path(doctor.__file__).parents[2] / "units/nbagent.service").read_text()
    wanted = {name for line in re.findall(r"^Wants=(.*)", unit, re.M) for name in line.split() if ".socket" in name}
    # Its own two are tried by calls, and the network service where slots may have a network.
    own = {"nbagent.socket", "nbagent-check.socket", "nbagent-network.socket"}
    assert len(wanted) > len(own) and wanted - own <= set(doctor.UNITS)


def test_figures_of_the_supervisor_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    assert services.check_control(path).status == "fail"
    with FakeSupervisor(path) as supervisor:
        assert services.check_control(path).found == "0 claimed, 2 warm, 1000 available"
        supervisor.draining = True
        assert services.check_control(path).mend == "nbagent drain --off"


def test_a_port_without_a_server_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    finding = services.check_http("router", f"http://127.0.0.1:{port}/", "nbagent-router.service")
    assert finding.status == "fail"
    assert "nbagent-router.service" in finding.mend


@pytest.mark.parametrize(("mapping", "status"), [("", "ok"), (" (deleted)", "warn")])
def test_a_router_that_runs_replaced_libraries_is_a_warning(tmp_path: Path, mapping: str, status: str) -> None:
    assert services.check_router_libraries(tmp_path).status == "ok"
    maps = f"7f12a0000000-7f12a0001000 r-xp 00001000 fe:00 1  /usr/lib/libssl.so.3{mapping}\n"
    host(tmp_path, {"run/nbagent-router/pid": "77\n", "proc/77/maps": maps})
    assert services.check_router_libraries(tmp_path).status == status


def test_a_token_that_other_users_can_read_fails(tmp_path: Path) -> None:
    assert services.check_token(tmp_path, "token", "none may call").status == "warn"
    path = host(tmp_path, {"etc/nbagent/token": "x" * 43}) / "etc/nbagent/token"
    for mode, status in ((0o640, "ok"), (0o600, "ok"), (0o644, "fail"), (0o660, "fail")):
        path.chmod(mode)
        assert services.check_token(tmp_path, "token", "none may call").status == status
    path.write_text("short")
    path.chmod(0o640)
    assert services.check_token(tmp_path, "token", "none may call").status == "fail"


def test_an_empty_image_store_fails(tmp_path: Path) -> None:
    assert services.check_images(tmp_path).status == "fail"


@pytest.mark.parametrize(("act", "found"), [
    (lambda tree: None, "files are as they were added, by a sample: minimal"),
    (lambda tree: (tree / "files.json").unlink(),
     r"files are as they were added, by a sample: minimal \(added without checksums\)"),
    (lambda tree: (tree / "rootfs/usr/share/lab/main.js").write_bytes(b""),
     "files of image minimal have changed since it was added: 'usr/share/lab/main.js'$"),
    (lambda tree: shutil.rmtree(tree / "rootfs/usr"),
     "files of image minimal have changed since it was added: 'usr/share/lab/main.js' and 1 more"),
    (lambda tree: (tree / "image.json").write_text("{"), "image minimal cannot be read: .*image.json is damaged"),
    (lambda tree: (tree / "files.json").write_text("["), "image minimal cannot be read: .*files.json is damaged"),
    (lambda tree: shutil.rmtree(tree), "image minimal cannot be read: no image has the name 'minimal'"),
], ids=["whole", "old", "changed", "missing", "record", "checksums", "none"])
def test_an_image_whose_files_have_changed_fails(
    tmp_path: Path, act: Callable[[Path], object], found: str
) -> None:
    store = ImageStore(tmp_path / "var/lib/nbagent/images", chown=lambda *_, **__: None)
    image = store.add(Archive.with_image().save(tmp_path / "minimal.tar"), "minimal")
    act(image.root.parent)
    finding = services.check_images(tmp_path)
    assert re.match(found, finding.found), finding
    whole = found.startswith("files are as")
    assert (finding.status, "image remove minimal" in finding.mend) == (("ok", False) if whole else ("fail", True))


def test_memory_of_all_slots_is_compared_with_the_host(tmp_path: Path) -> None:
    host(tmp_path, {"proc/meminfo": "MemTotal:  8912896 kB\nSwapTotal: 1048576 kB\n"})  # 8.5 GiB
    promise = host_config.parse({"slots": {"overcommit": 4.0}})
    assert capacity.capacity_of(tmp_path, promise) == 34
    assert capacity.check_memory(tmp_path, promise).status == capacity.check_memory(tmp_path, SETTINGS).status == "ok"
    greedy = host_config.parse({"slots": {"capacity": 500, "overcommit": 4.0}})
    assert capacity.check_memory(tmp_path, greedy).status == "warn"
    large = host_config.parse({"slots": {"memory": "16G", "memory_max": "16G"}})
    assert capacity.check_memory(tmp_path, large).status == "fail"


@pytest.mark.parametrize("memory_kb", [2 << 20, 25_165_824, 64 << 20, 1 << 40])
@pytest.mark.parametrize("slots", [{}, {"capacity": 7}, {"memory": "300M", "overcommit": 1.5}, {"memory": "4G"}])
def test_capacity_is_the_one_of_admission(tmp_path: Path, memory_kb: int, slots: dict[str, object]) -> None:
    host(tmp_path, {"proc/meminfo": f"MemTotal: {memory_kb} kB\n"})
    settings = host_config.parse({"slots": slots, "host": {"memory_reserve": "1G"}})
    wanted = settings.slots
    expected = admission.most(memory_kb << 10, settings.host.memory_reserve, wanted.memory)
    if wanted.capacity is not None:
        expected = wanted.capacity
    elif wanted.overcommit is not None:
        expected = admission.promised(memory_kb << 10, wanted.memory, wanted.overcommit)
    assert capacity.capacity_of(tmp_path, settings) == expected
    assert capacity.check_memory(tmp_path, settings).status in ("ok", "fail")
    assert f"{expected} slots" in capacity.check_memory(tmp_path, settings).found or memory_kb == 2 << 20


ZRAM = "/dev/zram0    partition    1048572    0    100\n"


@pytest.mark.parametrize(
    ("areas", "status", "found"),
    [("", "ok", "systemd-zram-generator"), (ZRAM, "ok", "1G in zram; idle slots are compressed"),
     ("/dev/sda2  partition  1048572  0  -2\n" + ZRAM, "warn", "/dev/sda2 may be on a disk"),
     ("/swapfile  file  1048572  0  -2\n", "warn", "/swapfile may be on a disk")],
)
def test_slots_are_compressed_only_if_all_swap_is_in_zram(tmp_path: Path, areas: str, status: str, found: str) -> None:
    total = 1048576 if areas else 0
    host(tmp_path, {
        "proc/meminfo": f"MemTotal: 8912896 kB\nSwapTotal: {total} kB\n", "proc/swaps": "Filename Type\n" + areas,
        "sys/block/zram0/comp_algorithm": "lzo [lz4]\n", "sys/fs/cgroup/cgroup.controllers": "memory\n",
    })
    finding = capacity.check_swap(tmp_path, SETTINGS)
    assert finding.status == status and found in finding.found
    assert bool(finding.mend) == (status == "warn")
    # If slots are never compressed, any swap is right.
    assert capacity.check_swap(tmp_path, host_config.parse({"cull": {"compress": "never"}})).status == "ok"
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").unlink()
    assert "slots do not use" in capacity.check_swap(tmp_path, SETTINGS).found or not areas


def test_a_kernel_limit_that_is_too_low_for_the_capacity_is_a_warning(tmp_path: Path) -> None:
    limit = capacity.LIMITS[0]
    settings = host_config.parse({"slots": {"capacity": 1000}})
    host(tmp_path, {"proc/sys/kernel/pid_max": "32768\n", **MEMINFO})
    finding = capacity.check_limit(tmp_path, limit, settings)
    assert (finding.status, finding.name) == ("warn", "kernel.pid_max")
    assert finding.mend.startswith("sysctl -w kernel.pid_max=68096")
    host(tmp_path, {"proc/sys/kernel/pid_max": "4194304\n"})
    assert capacity.check_limit(tmp_path, limit, settings).status == "ok"
    assert capacity.check_limit(tmp_path, capacity.LIMITS[-1], settings).found == "not in use"


def test_file_max_is_judged_by_what_users_open(tmp_path: Path) -> None:
    (limit,) = (known for known in capacity.LIMITS if known.each_bytes)
    settings = host_config.parse({"slots": {"capacity": 1305, "memory_max": "4G"}})
    # The value of a machine with 24 GiB, for a host that is a container of it.
    host(tmp_path, {"proc/sys/fs/file-max": "2466177\n", **MEMINFO})
    finding = capacity.check_limit(tmp_path, limit, settings)
    assert finding.status == "ok" and finding.found.endswith("may take 22369621")
    host(tmp_path, {"proc/sys/fs/file-max": f"{2**63 - 1}\n"})
    finding = capacity.check_limit(tmp_path, limit, settings)
    assert finding.status == "ok" and finding.found.endswith("open files")
    host(tmp_path, {"proc/sys/fs/file-max": "300000\n"})
    finding = capacity.check_limit(tmp_path, limit, settings)
    assert finding.status == "warn" and "too few for 1305 slots" in finding.found


def test_a_refused_configuration_does_not_stop_the_other_checks(tmp_path: Path) -> None:
    path = tmp_path / "nbagent.toml"
    path.write_text("[api]\nworkres = 1\n")
    findings = doctor.examine(path, "http://127.0.0.1:1")
    assert findings[0].status == "fail" and "workers" in findings[0].found
    assert len(findings) > 15


def test_a_check_without_permission_is_a_warning(tmp_path: Path) -> None:
    def check_secret() -> Finding:
        raise PermissionError(13, "Permission denied")

    finding = doctor._guarded(check_secret)
    assert (finding.name, finding.status) == ("secret", "warn")
    assert "root" in finding.mend


@pytest.mark.parametrize(("error", "mend"), [
    (OSError(errno.ENOSPC, "No space left on device"), "delete files of the full file system"),
    (OSError(errno.EIO, "Input/output error"), "errors of the disk"),
    (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "processes"),
    (subprocess.TimeoutExpired(["nft"], 3.0), "as root|--reinstall"),
])
def test_a_check_that_a_fault_of_the_host_stops_names_its_remedy(error: Exception, mend: str) -> None:
    def check_files() -> Finding:
        raise error

    finding = doctor._guarded(check_files)
    assert finding.status == "warn" and str(error) in finding.found and re.search(mend, finding.mend)


def test_users_of_services_must_exist() -> None:
    sysusers = (Path(__file__).parents[2] / "packaging/nbagent.sysusers").read_text()
    assert services.USERS.keys() == set(re.findall(r"^u (\S+)", sysusers, re.M))
    units = Path(__file__).parents[2] / "units"
    for user, names in services.USERS.items():
        assert f"\nUser={user}\n" in (units / names[-1]).read_text()
    assert services.check_users(services.USERS, lambda user: True).status == "ok"
    finding = services.check_users(services.USERS, lambda user: user != "nbagent-router")
    assert finding.status == "fail" and "missing: nbagent-router; " in finding.found
    assert finding.mend == "systemd-sysusers nbagent.conf; then systemctl restart nbagent-router.service"
    # The DNS update has its user, and does not run on this host.
    assert doctor._users(SETTINGS) == ["nbagent", "nbagent-router"]
    assert doctor._users(host_config.parse({"dns": {"server": "192.0.2.53", "zone": "x.example"}}))[-1] == "nbagent-dns"
    assert system.has_user("root") and not system.has_user("no such user")


@pytest.mark.parametrize(("error", "text"), [
    (subprocess.TimeoutExpired(["journalctl"], 10.0), "no response within 10 s"),
    (OSError("Failed to connect to /run/systemd/journal/io.systemd.journal: Connection refused"), "refused"),
])
def test_a_journal_that_writes_nothing_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def sync() -> None:
        raise error

    assert services.check_journald(lambda: None).status == "ok"
    monkeypatch.setattr(services.os, "geteuid", lambda: 0)
    finding = services.check_journald(sync)
    assert finding.status == "warn" and text in finding.found
    assert finding.mend.startswith("systemctl restart systemd-journald")
    # The socket is root's.
    monkeypatch.setattr(services.os, "geteuid", lambda: 1000)
    assert services.check_journald(sync).mend == "run nbagent doctor as root"


def test_the_resolver_of_slots_must_respond() -> None:
    assert "not in use" in network.check_resolver("192.0.2.1").found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))

        def respond() -> None:
            question, client = server.recvfrom(512)
            server.sendto(question, client)

        thread = threading.Thread(target=respond)
        thread.start()
        assert network.check_resolver("127.0.0.1", server.getsockname()[1]).status == "ok"
        thread.join()
        port = server.getsockname()[1]
    finding = network.check_resolver("127.0.0.1", port)
    assert finding.status == "fail" and finding.mend.startswith("systemctl restart nbagent-dns")


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


def test_a_check_whose_file_is_missing_names_the_package_to_root(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_files() -> Finding:
        raise FileNotFoundError(2, "No such file or directory", "/usr/lib/nbagent/router.conf")

    for uid, mend in ((0, "apt install --reinstall nbagent"), (1000, "run nbagent doctor as root")):
        monkeypatch.setattr(doctor.os, "geteuid", lambda uid=uid: uid)
        assert mend in doctor._guarded(check_files).mend


def test_host_names_of_slots_must_resolve() -> None:
    names = []

    def resolve(name: str) -> list[str]:
        names.append(name)
        if len(names) > 1:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ["192.0.2.7", "2001:db8::7"]

    good = network.check_wildcard("nb.example.org", resolve)
    assert (good.status, good.found) == ("ok", "*.nb.example.org resolves to 192.0.2.7, 2001:db8::7")
    bad = network.check_wildcard("nb.example.org", resolve)
    assert bad.status == "fail" and "Name or service not known" in bad.found and "*.nb.example.org" in bad.mend
    assert len(set(names)) == 2 and all(name.endswith(".nb.example.org") for name in names)


def test_addresses_come_from_the_systems_resolver() -> None:
    assert system.addresses_of("127.0.0.1") == ["127.0.0.1"]
    with pytest.raises(OSError):
        system.addresses_of("not a name")


def test_a_network_without_a_default_route_is_a_warning(tmp_path: Path) -> None:
    assert network.check_network(tmp_path, SETTINGS).found == "slots have no network"
    opened = host_config.parse({"network": {"allow": ["none", "internet"]}})
    assert network.check_network(tmp_path, opened).status == "warn"
    host(tmp_path, {"proc/net/route": ROUTE_HEAD + "eth0\t00000000\t02050505\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"})
    found = network.check_network(tmp_path, opened)
    assert found.status == "ok" and "IPv6 would require" in found.found


NOTHING = "0" * 32
ROUTE6 = f"{NOTHING} 00 {NOTHING} 00 {'2a' + '0' * 30} 00000400 00000003 00000000 00000003     eth6\n"
FORWARDING6 = "proc/sys/net/ipv6/conf/all/forwarding"


def test_a_host_with_ipv6_only_has_a_network_if_it_forwards(tmp_path: Path) -> None:
    opened = host_config.parse({"network": {"allow": ["none", "internet"]}})
    host(tmp_path, {"proc/net/route": ROUTE_HEAD, "proc/net/ipv6_route": ROUTE6, FORWARDING6: "0\n"})
    found = network.check_network(tmp_path, opened)
    assert found.status == "warn" and "does not forward IPv6" in found.found
    assert found.mend.startswith("sysctl -w net.ipv6.conf.eth6.accept_ra=2 net.ipv6.conf.all.forwarding=1")
    host(tmp_path, {FORWARDING6: "1\n"})
    found = network.check_network(tmp_path, opened)
    assert (found.status, found.mend) == ("ok", "") and "over IPv6 only" in found.found
    # A firewall that drops IPv4, which the host does not have, is no fault, but the resolver of slots has IPv4.
    assert firewall(tmp_path, rules(chain("ip", "filter", "f", **FORWARD, policy="drop"))).status == "ok"
    drops6 = rules(chain("ip6", "filter", "f", **FORWARD, policy="drop"))
    assert "IPv6 connections" in firewall(tmp_path, drops6).found
    closed = rules(chain("ip", "filter", "i", type="filter", hook="input", prio=0, policy="drop"))
    assert "queries of slots" in firewall(tmp_path, closed).found


PROXIED = {"network": {"allow": ["none", "internet"], "proxy": "10.1.0.8:3128"}}


def test_a_host_whose_only_way_out_is_a_proxy_has_a_network(tmp_path: Path) -> None:
    settings = host_config.parse(PROXIED)
    to_proxy = "eth1\t0000010A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n"
    host(tmp_path, {"proc/net/route": ROUTE_HEAD + to_proxy})
    found = network.check_network(tmp_path, settings)
    assert (found.status, found.found) == ("ok", "slots may reach the internet by the proxy 10.1.0.8:3128 only")
    closed = chain("inet", "filter", "f", **FORWARD, policy="drop")
    assert network.check_firewall(tmp_path, settings.network, rules(closed)).status == "warn"
    accepts = [
        rule("inet", "filter", "f", match(IIF, "nb-*"), match(field("ip", "daddr"), "10.1.0.8"),
             match(field("tcp", "dport"), 3128), match({"meta": {"key": "oifname"}}, "eth1"), ACCEPT),
        rule("inet", "filter", "f", match({"ct": {"key": "state"}}, ["established", "related"], "in"), ACCEPT),
    ]
    assert network.check_firewall(tmp_path, settings.network, rules(closed, *accepts)).status == "ok"


@pytest.mark.parametrize(("response", "archives", "status", "text"), [
    (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", [], "ok", "status 503 for http://nbagent.invalid/"),
    (b"HTTP/1.1 403 Forbidden\r\n\r\n", [], "ok", "status 403"),
    (b"HTTP/1.1 403 Forbidden\r\n\r\n", ["http://data.example/a/"], "warn", "refuse http://data.example/a/"),
    (b"HTTP/1.1 200 OK\r\n\r\n", ["http://data.example/a/"], "ok", "status 200 for http://data.example/a/"),
    (b"HTTP/1.1 407 Who\r\n\r\n", [], "fail", "requires a login"),
    (b"HTTP/1.1 403 Filtered\r\n\r\n", ["https://data.example/a/"], "fail", "Tunnel connection failed: 403 Filtered"),
    (b"SSH-2.0-OpenSSH\r\n", [], "fail", "no response"),
])
def test_the_proxy_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, response: bytes, archives: list[str], status: str, text: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        def respond() -> None:
            with server.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(response)

        thread = threading.Thread(target=respond)
        thread.start()
        settings = host_config.parse(PROXIED | {"claims": {"archives": archives}})
        proxy = HttpProxy("127.0.0.1", server.getsockname()[1])
        assert network.check_proxy(tmp_path, settings, proxy).found.endswith("which slots do not reach")
        monkeypatch.setattr(network, "_is_own", lambda *_: False)
        found = network.check_proxy(tmp_path, settings, proxy)
        thread.join()
    assert found.status == status and text in found.found, found
    assert bool(found.mend) == (status != "ok")


def test_a_proxy_that_slots_or_the_host_do_not_reach_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = host_config.parse(PROXIED)
    assert "does not forward IPv6" in network.check_proxy(tmp_path, settings, HttpProxy("2001:db8::8", 3128)).found
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(network, "_is_own", lambda *_: False)
    found = network.check_proxy(tmp_path, settings, HttpProxy("127.0.0.1", port))
    assert found.status == "fail" and "Connection refused" in found.found


def rules(*items: dict[str, Any], text: str = "") -> Callable[[], tuple[str, str]]:
    """A ruleset with our table and `items`."""
    document = [{"table": {"family": "inet", "name": "nbagent"}}, *items]
    return lambda: (json.dumps({"nftables": document}), text)


def chain(family: str, table: str, name: str, **more: Any) -> dict[str, Any]:
    return {"chain": {"family": family, "table": table, "name": name, **more}}


def rule(family: str, table: str, name: str, *statements: dict[str, Any]) -> dict[str, Any]:
    return {"rule": {"family": family, "table": table, "chain": name, "handle": 1, "expr": list(statements)}}


def match(left: dict[str, Any], right: object, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def field(protocol: str, name: str) -> dict[str, Any]:
    return {"payload": {"protocol": protocol, "field": name}}


def firewall(root: Path, found: Callable[[], tuple[str, str]]) -> Finding:
    if not (root / "proc/net/route").exists():
        host(root, {"proc/net/route": ROUTE_HEAD + "eth0\t00000000\t02050505\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"})
    return network.check_firewall(root, host_config.NetworkSettings(), found)


IIF, OIF = {"meta": {"key": "iifname"}}, {"meta": {"key": "oifname"}}
FORWARD: dict[str, Any] = {"type": "filter", "hook": "forward", "prio": 0}
INPUT: dict[str, Any] = {"type": "filter", "hook": "input", "prio": 0}
ACCEPT: dict[str, Any] = {"accept": None}
DROP: dict[str, Any] = {"drop": None}
REJECT: dict[str, Any] = {"reject": None}
F, G = ("inet", "fw", "f"), ("inet", "fw", "g")
STATES = {"key": {"ct": {"key": "state"}}, "data": {"set": [["established", ACCEPT], ["invalid", DROP]]}}
ESTABLISHED = rule(*F, {"vmap": STATES})
OPEN, CLOSED = chain(*F, **FORWARD, policy="accept"), chain(*F, **FORWARD, policy="drop")


@pytest.mark.parametrize(
    ("items", "status", "mend"),
    [
        ([chain("ip", "filter", "FORWARD", **FORWARD, policy="accept")], "ok", ""),
        ([chain("ip", "filter", "FORWARD", **FORWARD, policy="drop")], "warn",
         'nft insert rule ip filter FORWARD iifname "nb-*" accept'),
        ([chain("inet", "fw", "in", **INPUT, policy="drop")], "warn",
         'nft insert rule inet fw in iifname "nb-*" udp dport 53 accept'),
        # The last rule rejects, and the policy accepts, as in firewalld.
        ([OPEN, rule(*F, REJECT)], "warn", "nft insert rule inet fw f"),
        # A rule that names the interfaces of slots, but rejects their packets.
        ([OPEN, rule(*F, match(IIF, "nb-*"), REJECT)], "warn", "nft insert"),
        ([CLOSED, chain(*G), rule(*F, match(IIF, "nb-*"), {"jump": {"target": "g"}}), rule(*G, ACCEPT), ESTABLISHED],
         "ok", ""),
        ([CLOSED, chain(*G), rule(*F, {"jump": {"target": "g"}}), rule(*G, {"return": None}), ESTABLISHED], "warn", ""),
        # One direction, and both.
        ([CLOSED, rule(*F, match(IIF, "nb-*"), ACCEPT)], "warn", ""),
        ([CLOSED, rule(*F, match(OIF, "nb-*"), ACCEPT), rule(*F, match(IIF, {"set": ["eth1", "nb-*"]}), ACCEPT)],
         "ok", ""),
        # A rate is not decided.
        ([CLOSED, ESTABLISHED, rule(*F, {"limit": {"rate": 3, "per": "minute"}}, ACCEPT)], "warn", ""),
        # Ports, ranges, other protocols and other interfaces.
        ([CLOSED, ESTABLISHED, rule(*F, match(field("tcp", "dport"), {"set": [80, {"range": [440, 450]}]}),
                                    match(IIF, "eth0", "!="), ACCEPT)], "ok", ""),
        ([CLOSED, ESTABLISHED, rule(*F, match(field("udp", "dport"), 443), ACCEPT)], "warn", ""),
        ([OPEN, rule(*F, match(field("ip", "saddr"), {"prefix": {"addr": "198.18.0.0", "len": 15}}), DROP)],
         "warn", ""),
        ([OPEN, rule(*F, match(field("ip6", "saddr"), "fd00::1"), DROP), rule(*F, match(IIF, "eth1"), DROP),
          rule(*F, match({"meta": {"key": "l4proto"}}, "icmp"), DROP)], "ok", ""),
        ([chain("inet", "nbagent", "f", **FORWARD, policy="drop")], "ok", ""),
    ],
)
def test_a_table_that_drops_packets_of_slots_is_a_warning(
    tmp_path: Path, items: list[dict[str, Any]], status: str, mend: str
) -> None:
    finding = firewall(tmp_path, rules(*items))
    assert finding.status == status, finding
    assert finding.mend.startswith(mend)


def test_a_fault_of_the_host_is_a_failure_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def __init__(self, *_: object) -> None:
            pass

        def call(self, _: object) -> dict[str, object]:
            return {"claimed": 0, "warm": 1, "available": 0, "faults": {"router": "no response"}, "draining": False,
                    "pools": {}}

    monkeypatch.setattr(control, "ControlClient", Client)
    finding = services.check_control(tmp_path / "control.sock")
    assert finding.status == "fail" and "router: no response" in finding.found
    assert finding.mend.startswith("systemctl restart nbagent-router")


def test_every_part_of_the_host_that_is_tried_has_a_remedy_and_a_metric(tmp_path: Path) -> None:
    from nbagent.api import metrics

    with FakeSupervisor(tmp_path / "control.sock") as fake:
        parts = fake._host.supervisor.health._tries.keys()
    assert parts == services.FAULTS.keys() == set(metrics.PARTS)


def test_a_start_is_tried_by_the_supervisor(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    assert services.check_start(path).status == "fail"
    with FakeSupervisor(path) as fake:
        finding = services.check_start(path)
        assert finding.status == "ok" and finding.found.startswith("by exec in ")
        fake._host.open_error = TimeoutError()
        finding = services.check_start(path)
        assert finding.status == "fail" and finding.mend.startswith("systemctl restart nbagent-launch")
        assert services.check_zygotes(path).status == "ok"


def test_a_host_without_our_table_fails(tmp_path: Path) -> None:
    assert firewall(tmp_path, lambda: ('{"nftables": []}', "")).status == "fail"


@pytest.mark.parametrize(("program", "queries", "ipv6", "mend"), [
    ("firewalld", True, True, "firewall-cmd --permanent --zone=trusted --add-interface=nb-+ && firewall-cmd --reload"),
    ("ufw", True, True, "ufw route allow in on nb-+ && ufw allow in on nb-+ to any port 53"),
    # Docker has no rules for IPv6 in this version, and accepts packets to the host.
    ("docker", False, False,
     "iptables -I DOCKER-USER -i nb-+ -j ACCEPT; iptables -I DOCKER-USER -o nb-+ -m conntrack "),
    # Both policies accept and the last rules reject, as in the rules of iptables-services and of cloud images.
    ("iptables", True, False, "iptables -t filter -I FORWARD -i nb-+ -j ACCEPT; iptables -t filter -I FORWARD -o nb-+"),
])
def test_rulesets_of_firewalls_are_judged_before_and_after_the_remedy(
    tmp_path: Path, program: str, queries: bool, ipv6: bool, mend: str
) -> None:
    """The rulesets are those of Debian 12's packages, before and after the commands were run."""
    host(tmp_path, {
        "proc/sys/net/ipv6/conf/all/forwarding": "1\n", "proc/net/ipv6_route": f"{'0' * 32} 00 x x x x x x x eth0\n",
    })
    before, after = (firewall(tmp_path, captured(name)) for name in (program, f"{program}-mended"))
    assert before.status == "warn" and "IPv4 connections of slots" in before.found
    assert ("queries" in before.found, "IPv6" in before.found) == (queries, ipv6)
    assert before.mend.startswith(mend)
    assert after.status == "ok", after


@pytest.mark.parametrize(("extensions", "text", "verdict", "status"), [
    (["comment"], " counter packets 0 bytes 0 drop", DROP, "warn"),
    ([], "counter packets 0 bytes 0 reject with tcp reset", {"xt": {"type": "target", "name": "REJECT"}}, "warn"),
    (["multiport"], "meta l4proto tcp tcp dport { 80, 400-500 } drop", DROP, "warn"),
    (["multiport"], "meta l4proto tcp tcp dport { 80, 8000-8010 } drop", DROP, "ok"),
    (["multiport"], "meta l4proto tcp tcp dport != { 80, 8000-8010 } drop", DROP, "warn"),
    (["comment", "conntrack"], " ct state new drop", DROP, "warn"),
    (["state"], "ct state invalid,untracked drop", DROP, "ok"),
    (["addrtype", "conntrack"], "fib daddr type local ct state new drop", DROP, "ok"),
    # Not decided.
    (["conntrack", "conntrack"], "ct status dnat ct state new drop", DROP, "ok"),
    (["physdev"], "xt match physdev drop", DROP, "ok"),
])
def test_extensions_of_iptables_are_judged(
    tmp_path: Path, extensions: list[str], text: str, verdict: dict[str, Any], status: str
) -> None:
    table = ("ip", "filter", "FORWARD")
    expressions = [{"xt": {"type": "match", "name": name}} for name in extensions]
    items = [chain(*table, **FORWARD, policy="accept"), rule(*table, *expressions, {"counter": {}}, verdict)]
    listing = f"table ip filter {{\n\tchain FORWARD {{\n\t\t{text} # handle 1\n\t}}\n}}\n"
    finding = firewall(tmp_path, rules(*items, text=listing))
    assert finding.status == status, finding
    if finding.mend:
        assert finding.mend.startswith("iptables -t filter -I FORWARD -i nb-+ -j ACCEPT; ")


def captured(name: str) -> Callable[[], tuple[str, str]]:
    below = Path(__file__).parent / "rulesets"
    return rules(*json.loads((below / f"{name}.json").read_text()), text=(below / f"{name}.nft").read_text())


@pytest.mark.parametrize(("cpus", "slots", "threads"), [
    (2, {}, "up to 2 threads each"), (16, {}, "up to 16 threads each"),
    (64, {}, "up to 16 threads each; one for each of 64 processors requires slots.tasks = 1024"),
    (64, {"tasks": 1024}, "up to 64 threads each"), (64, {"cpu_quota": "200%"}, "up to 2 threads each"),
    (256, {"cpu_quota": "1/2"}, "up to 16 threads each; one for each of 128 processors requires slots.tasks = 2048"),
])
def test_the_threads_that_tasks_suffice_for_are_named(cpus: int, slots: dict[str, object], threads: str) -> None:
    found = capacity.check_tasks(cpus, host_config.parse({"slots": slots}))
    assert found.status == "ok" and found.found.endswith(threads)


def test_tasks_that_are_too_few_for_a_kernel_with_libraries_are_named() -> None:
    assert capacity.check_tasks(64, host_config.parse({"slots": {"tasks": 28}})).status == "ok"
    found = capacity.check_tasks(64, host_config.parse({"slots": {"tasks": 27}}))
    assert (found.status, found.mend) == ("warn", "raise slots.tasks to 28")
