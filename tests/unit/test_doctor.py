"""Each check of the doctor, shown a host that a test made of a few files."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from fake_supervisor import FakeSupervisor

from nbagent import doctor
from nbagent.config import host_config

SETTINGS = host_config.HostConfig()
MOUNT = "21 1 0:20 / /proc rw,nosuid - proc proc rw\n"


def host(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_host_without_systemd_is_told(tmp_path: Path) -> None:
    finding = doctor.check_pid1(host(tmp_path, {"proc/1/comm": "sh\n"}))
    assert (finding.status, finding.found) == ("fail", "PID 1 is sh")
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert doctor.check_pid1(tmp_path).status == "ok"


@pytest.mark.parametrize(
    ("text", "status"),
    [("systemd 252 (252.39-1~deb12u1)", "ok"), ("systemd 257 (257.8)", "ok"),
     ("systemd 247 (247.3)", "fail"), ("", "fail")],
)
def test_an_old_systemd_is_told(text: str, status: str) -> None:
    assert doctor.check_systemd_version(lambda: text).status == status


def test_the_cgroup_hierarchy_is_told(tmp_path: Path) -> None:
    assert doctor.check_cgroups(tmp_path).status == "fail"
    (tmp_path / "sys/fs/cgroup/memory").mkdir(parents=True)
    assert doctor.check_cgroups(tmp_path).found.startswith("v1")
    (tmp_path / "sys/fs/cgroup/unified").mkdir()
    assert doctor.check_cgroups(tmp_path).found.startswith("hybrid")
    host(tmp_path, {"sys/fs/cgroup/cgroup.controllers": "cpu memory pids"})
    assert doctor.check_cgroups(tmp_path) == doctor.Finding("cgroups", "ok", "v2")


def test_a_missing_controller_is_told(tmp_path: Path) -> None:
    host(tmp_path, {"sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids\n"})
    finding = doctor.check_controllers(tmp_path)
    assert finding.status == "fail"
    assert "memory" in finding.found and "cgroup_enable=memory" in finding.mend
    (tmp_path / "sys/fs/cgroup/memory").mkdir()
    assert doctor.check_controllers(tmp_path).status == "ok"


def test_pressure_that_is_not_measured_is_told(tmp_path: Path) -> None:
    assert doctor.check_pressure(tmp_path).status == "warn"
    assert doctor.check_pressure(host(tmp_path, {"proc/pressure/memory": "some"})).status == "ok"


def test_forbidden_user_namespaces_are_told(tmp_path: Path) -> None:
    assert doctor.check_user_namespaces(tmp_path).status == "fail"
    host(tmp_path, {"proc/sys/user/max_user_namespaces": "0\n"})
    assert doctor.check_user_namespaces(tmp_path).status == "fail"
    host(tmp_path, {"proc/sys/user/max_user_namespaces": "9000\n"})
    assert doctor.check_user_namespaces(tmp_path).status == "ok"
    host(tmp_path, {"proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1\n"})
    assert "root only" in doctor.check_user_namespaces(tmp_path).found


def test_overlayfs_is_found_as_a_module_too(tmp_path: Path) -> None:
    host(tmp_path, {"proc/filesystems": "nodev\tproc\n", "proc/sys/kernel/osrelease": "6.1.0\n"})
    assert doctor.check_overlay(tmp_path).status == "fail"
    host(tmp_path, {"lib/modules/6.1.0/modules.dep": "kernel/fs/overlayfs/overlay.ko:\n"})
    assert doctor.check_overlay(tmp_path).status == "ok"
    host(tmp_path, {"proc/filesystems": "nodev\toverlay\n"})
    assert doctor.check_overlay(tmp_path).found == "in the kernel"


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
def test_a_covered_proc_is_told(tmp_path: Path, more: str, status: str) -> None:
    host(tmp_path, {"proc/self/mountinfo": MOUNT + more})
    assert doctor.check_proc(tmp_path).status == status


def test_a_unit_that_is_not_active_is_told() -> None:
    assert doctor.check_unit("nbagent.service", lambda unit: "active").status == "ok"
    finding = doctor.check_unit("nbagent.service", lambda unit: "failed")
    assert (finding.status, finding.found) == ("fail", "failed")
    assert "journalctl" in finding.mend


def test_the_supervisor_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    assert doctor.check_control(path).status == "fail"
    with FakeSupervisor(path) as supervisor:
        assert doctor.check_control(path).found == "0 claimed, 2 warm, 1000 available"
        supervisor.draining = True
        assert doctor.check_control(path).mend == "nbagent drain --off"


def test_a_port_where_nothing_answers_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    finding = doctor.check_answer("router", f"http://127.0.0.1:{port}/", "nbagent-router.service")
    assert finding.status == "fail"
    assert "nbagent-router.service" in finding.mend


def test_a_token_that_others_can_read_is_told(tmp_path: Path) -> None:
    assert doctor.check_token(tmp_path, "token", "none may call").status == "warn"
    path = host(tmp_path, {"etc/nbagent/token": "x" * 43}) / "etc/nbagent/token"
    for mode, status in ((0o640, "ok"), (0o600, "ok"), (0o644, "fail"), (0o660, "fail")):
        path.chmod(mode)
        assert doctor.check_token(tmp_path, "token", "none may call").status == status
    path.write_text("short")
    path.chmod(0o640)
    assert doctor.check_token(tmp_path, "token", "none may call").status == "fail"


def test_an_empty_image_store_is_told(tmp_path: Path) -> None:
    assert doctor.check_images(tmp_path).status == "fail"
    host(tmp_path, {"var/lib/nbagent/images/names/minimal": ""})
    assert doctor.check_images(tmp_path).found == "minimal"


def test_memory_is_held_against_what_is_promised(tmp_path: Path) -> None:
    host(tmp_path, {"proc/meminfo": "MemTotal:  8912896 kB\nSwapTotal: 1048576 kB\n"})  # 8.5 GiB
    assert doctor.capacity_of(tmp_path, SETTINGS) == 32
    assert doctor.check_memory(tmp_path, SETTINGS).status == "ok"
    greedy = host_config.parse({"slots": {"capacity": 500}})
    assert doctor.check_memory(tmp_path, greedy).status == "warn"
    large = host_config.parse({"slots": {"memory": "16G", "memory_max": "16G"}})
    assert doctor.check_memory(tmp_path, large).status == "fail"


ZRAM = "/dev/zram0    partition    1048572    0    100\n"


@pytest.mark.parametrize(
    ("areas", "status", "says"),
    [("", "ok", "systemd-zram-generator"), (ZRAM, "ok", "1G in memory; slots are compressed"),
     ("/dev/sda2  partition  1048572  0  -2\n" + ZRAM, "warn", "/dev/sda2 may lead to a disk"),
     ("/swapfile  file  1048572  0  -2\n", "warn", "/swapfile may lead to a disk")],
)
def test_what_keeps_slots_from_being_compressed_is_told(tmp_path: Path, areas: str, status: str, says: str) -> None:
    total = 1048576 if areas else 0
    host(tmp_path, {
        "proc/meminfo": f"MemTotal: 8912896 kB\nSwapTotal: {total} kB\n", "proc/swaps": "Filename Type\n" + areas,
        "sys/block/zram0/comp_algorithm": "lzo [lz4]\n", "sys/fs/cgroup/cgroup.controllers": "memory\n",
    })
    finding = doctor.check_swap(tmp_path, SETTINGS)
    assert finding.status == status and says in finding.found
    assert bool(finding.mend) == (status == "warn")
    # Where slots are never compressed, swap is the host's own business.
    assert doctor.check_swap(tmp_path, host_config.parse({"cull": {"compress": "never"}})).status == "ok"
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").unlink()
    assert "for the host" in doctor.check_swap(tmp_path, SETTINGS).found or not areas


def test_a_kernel_limit_below_what_the_slots_need_is_told(tmp_path: Path) -> None:
    limit = doctor.LIMITS[0]
    settings = host_config.parse({"slots": {"capacity": 1000}})
    host(tmp_path, {"proc/sys/kernel/pid_max": "32768\n"})
    finding = doctor.check_limit(tmp_path, limit, settings)
    assert (finding.status, finding.name) == ("warn", "kernel.pid_max")
    assert finding.mend.startswith("sysctl -w kernel.pid_max=68096")
    host(tmp_path, {"proc/sys/kernel/pid_max": "4194304\n"})
    assert doctor.check_limit(tmp_path, limit, settings).status == "ok"
    assert doctor.check_limit(tmp_path, doctor.LIMITS[-1], settings).found == "not in use"


def test_open_files_are_enough_when_one_slot_cannot_hold_them_all(tmp_path: Path) -> None:
    (limit,) = (known for known in doctor.LIMITS if known.each_bytes)
    settings = host_config.parse({"slots": {"capacity": 100, "memory_max": "1G"}})
    host(tmp_path, {"proc/sys/fs/file-max": "2000000\n"})
    assert doctor.check_limit(tmp_path, limit, settings).status == "warn"
    host(tmp_path, {"proc/sys/fs/file-max": f"{2**63 - 1}\n"})
    assert doctor.check_limit(tmp_path, limit, settings).status == "ok"


def test_a_refused_configuration_does_not_stop_the_others(tmp_path: Path) -> None:
    path = tmp_path / "nbagent.toml"
    path.write_text("[api]\nworkres = 1\n")
    findings = doctor.examine(path, "http://127.0.0.1:1")
    assert findings[0].status == "fail" and "workers" in findings[0].found
    assert len(findings) > 15


def test_what_cannot_be_seen_is_a_warning(tmp_path: Path) -> None:
    def check_secret() -> doctor.Finding:
        raise PermissionError(13, "Permission denied")

    finding = doctor._guarded(check_secret)
    assert (finding.name, finding.status) == ("secret", "warn")
    assert "root" in finding.mend


def test_names_of_slots_that_do_not_resolve_are_told() -> None:
    asked = []

    def resolve(name: str) -> list[str]:
        asked.append(name)
        if len(asked) > 1:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ["192.0.2.7", "2001:db8::7"]

    good = doctor.check_wildcard("nb.example.org", resolve)
    assert (good.status, good.found) == ("ok", "*.nb.example.org is 192.0.2.7, 2001:db8::7")
    bad = doctor.check_wildcard("nb.example.org", resolve)
    assert bad.status == "fail" and "Name or service not known" in bad.found and "*.nb.example.org" in bad.mend
    assert len(set(asked)) == 2 and all(name.endswith(".nb.example.org") for name in asked)


def test_the_resolver_is_the_systems() -> None:
    assert doctor.addresses_of("127.0.0.1") == ["127.0.0.1"]
    with pytest.raises(OSError):
        doctor.addresses_of("not a name")


def test_a_network_without_a_way_out_is_told(tmp_path: Path) -> None:
    assert doctor.check_network(tmp_path, SETTINGS).found == "slots have none"
    opened = host_config.parse({"network": {"allow": ["none", "internet"]}})
    assert doctor.check_network(tmp_path, opened).status == "warn"
    head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    host(tmp_path, {"proc/net/route": head + "eth0\t00000000\t02050505\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"})
    found = doctor.check_network(tmp_path, opened)
    assert found.status == "ok" and "IPv6 would take" in found.found


OURS = "table inet nbagent {\n\tchain forward {\n\t\ttype filter hook forward priority filter; policy accept;\n\t}\n}\n"
CHAIN = "\tchain %s {\n\t\ttype filter hook %s priority filter; policy %s;\n\t}\n"


@pytest.mark.parametrize(
    ("other", "status", "mend"),
    [
        ("table ip filter {\n" + CHAIN % ("FORWARD", "forward", "accept") + "}\n", "ok", ""),
        ("table ip filter {\n" + CHAIN % ("FORWARD", "forward", "drop") + "}\n", "warn",
         'nft insert rule ip filter FORWARD iifname "nb-*" accept'),
        ("table inet fw {\n" + CHAIN % ("in", "input", "drop") + "}\n", "warn",
         'nft insert rule inet fw in iifname "nb-*" udp dport 53 accept'),
        ('table inet fw {\n\tchain ours {\n\t\tiifname "nb-*" accept\n\t}\n' + CHAIN % ("f", "forward", "drop") + "}\n",
         "ok", ""),
    ],
)
def test_a_firewall_that_would_drop_what_slots_send_is_told(other: str, status: str, mend: str) -> None:
    finding = doctor.check_firewall(lambda: OURS + other)
    assert finding.status == status
    assert finding.mend.startswith(mend)
    assert doctor.check_firewall(lambda: other).status == "fail"
