# SPDX-License-Identifier: BSD-3-Clause
"""The test hosts themselves, on which every other integration test relies.

Two nspawn hosts run side by side for the whole file. Nothing here is about nbagent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from testhost_driver import Host, ending
from testhost_driver.entry import start_ticks
from testhost_driver.errors import BadArgument, CommandFailed, CommandTimedOut, NoSuchHost

TESTHOST = Path(__file__).resolve().parents[1] / "testhost"
NAMES = (f"tt-{os.getpid() % 100000}-a", f"tt-{os.getpid() % 100000}-b")

# A minimal slot, as root in the host: a user namespace whose ids the parent writes, in it a child with every
# other namespace, an overlay over a directory of the host's own overlay, a fresh /proc, and a pivot into it.
# The lower layer must have no mount below it: the kernel refuses to clone a path with locked children, so `/`
# itself will not do.
MINIMAL_SLOT = r"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def ok(result, what):
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what)
def mount(source, target, kind, flags, data):
    words = [word.encode() if word else None for word in (source, target, kind)]
    ok(libc.mount(*words, ctypes.c_ulong(flags), data.encode() if data else None), f"mount {target}")
NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
ready, go = os.pipe(), os.pipe()
child = os.fork()
if not child:
    ok(libc.unshare(NEWUSER), "unshare user")
    os.write(ready[1], b"x"); os.read(go[0], 1)
    os.setgroups([]); os.setresgid(0, 0, 0); os.setresuid(0, 0, 0)
    ok(libc.unshare(NEWNS | NEWPID | NEWIPC | NEWUTS | NEWNET | NEWCGROUP), "unshare")
    if os.fork():
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
    mount(None, "/", None, 0x4000 | 0x40000, None)
    mount("tmpfs", "/mnt", "tmpfs", 0, "size=64m")
    for name in ("upper", "work", "root"):
        os.mkdir(f"/mnt/{name}")
    mount("tmpfs", "/mnt/root", "tmpfs", 0, None)
    for name in ("usr", "proc"):
        os.mkdir(f"/mnt/root/{name}")
    for name in ("bin", "lib", "lib64"):
        os.symlink(f"usr/{name}", f"/mnt/root/{name}")
    mount("overlay", "/mnt/root/usr", "overlay", 0,
          "lowerdir=/usr,upperdir=/mnt/upper,workdir=/mnt/work,userxattr")
    mount("proc", "/mnt/root/proc", "proc", 0xe, None)
    os.chdir("/mnt/root")
    ok(libc.syscall(155, b".", b"."), "pivot_root")
    ok(libc.umount2(b".", 2), "umount")
    os.chdir("/")
    with open("/usr/written", "w") as file:
        file.write("by a slot")
    print(*(name for name in os.listdir("/proc") if name.isdigit()), os.path.exists("/usr/bin/python3"))
    raise SystemExit
os.read(ready[0], 1)
for name in ("uid_map", "gid_map"):
    with open(f"/proc/{child}/{name}", "w") as file:
        file.write("0 100000 65536")
os.write(go[1], b"x")
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

SERVER = r"""
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("listening", flush=True)
while True:
    connection, peer = server.accept()
    with connection:
        connection.sendall(f"{socket.gethostname()} {peer[0]}".encode())
"""


def traces() -> dict[str, set[str]]:
    """Everything that a host could leave behind on this machine."""
    mounts = {line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()}
    netns = {entry.name for entry in Path("/run/netns").iterdir()} if Path("/run/netns").exists() else set()
    cgroups = {str(path) for path in Path("/sys/fs/cgroup").glob("**/testhost-*")}
    state = {str(path) for path in Path("/var/lib/nbagent-testhost").glob("*/*")}
    commands = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                commands.add(f"{entry.name} {(entry / 'cmdline').read_bytes().decode(errors='replace')}")
            except OSError:
                pass
    found = {"mounts": mounts, "netns": netns, "cgroups": cgroups, "state": state, "processes": commands}
    # Other hosts may start and end meanwhile, so that only names of these hosts count.
    return {
        what: {item for item in items if any(name in item for name in NAMES)} for what, items in found.items()
    }


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Host, Host]]:
    ending.take_signals()  # which Host.up can do in the main thread only
    with ThreadPoolExecutor() as pool:
        hosts = list(pool.map(lambda name: Host.up(name=name), NAMES))
    yield hosts[0], hosts[1]
    for host in hosts:
        host.down()
    assert not any(traces().values()), traces()


@pytest.fixture
def host(pair: tuple[Host, Host]) -> Host:
    return pair[0]


@contextlib.contextmanager
def serve(host: Host, port: int) -> Iterator[subprocess.Popen[str]]:
    """A server inside that sends its host's name and the client's address; it ends with the context."""
    with host.popen(["python3", "-c", SERVER, port], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "listening\n"
        try:
            yield server
        finally:
            server.kill()


def read_all(connection: socket.socket) -> str:
    with connection:
        return b"".join(iter(lambda: connection.recv(4096), b"")).decode()


def command_line(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TESTHOST, *arguments], check=False, capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


# --- hosts ---


def test_two_hosts_run_side_by_side_with_systemd_as_pid_1(pair: tuple[Host, Host]) -> None:
    for host in pair:
        assert host.run(["systemctl", "is-system-running"]).stdout.strip() == "running"
        assert host.run(["hostname"]).stdout.strip() == host.name
        assert host.run(["cat", "/proc/1/comm"]).stdout.strip() == "systemd"
    pair[0].run(["touch", "/etc/only-here"])
    assert pair[1].run(["test", "-e", "/etc/only-here"], check=False).returncode == 1


def test_up_of_a_healthy_host_changes_nothing(host: Host) -> None:
    boot = host.run(["cat", "/proc/sys/kernel/random/boot_id"]).stdout
    said: list[str] = []
    again = Host.up(name=host.name, say=said.append)
    assert said == [f"{host.name} is up already (nspawn, bookworm)"]
    assert again.run(["cat", "/proc/sys/kernel/random/boot_id"]).stdout == boot


def test_a_host_that_was_killed_is_cleared_and_made_anew(pair: tuple[Host, Host]) -> None:
    host = pair[1]
    host.run(["touch", "/root/before"])
    leader = host._state.leader
    assert leader is not None
    os.kill(leader.pid, 9)
    deadline = time.monotonic() + 10
    while command_line("list").stdout.split(host.name)[1].split()[0] != "dead":
        assert time.monotonic() < deadline
    with pytest.raises(NoSuchHost, match="not running any more"):
        host.run(["true"])
    assert command_line("exec", host.name, "--", "true").returncode == 1
    said: list[str] = []
    host = Host.up(name=host.name, say=said.append)
    assert said[0] == f"{host.name} has ended; clearing its remains"
    assert host.run(["test", "-e", "/root/before"], check=False).returncode == 1


def test_down_leaves_nothing_behind() -> None:
    name = NAMES[0][:-1] + "c"
    host = Host.up(name=name)
    with serve(host, 7001) as server:
        port = host.forward(7001, 0)
        assert read_all(socket.create_connection(("127.0.0.1", port))) == f"{name} 127.0.0.1"
        host.down()
        server.wait(10)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert not Path(f"/run/netns/testhost-{name}").exists()
    assert not Path(f"/var/lib/nbagent-testhost/hosts/{name}").exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/testhost-{name}"))
    assert name not in Path("/proc/self/mountinfo").read_text()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and start_ticks(
            int(entry.name)
        ):  # a zombie is for the machine's init to reap
            assert f"testhost-{name}" not in (entry / "cgroup").read_text(), (entry / "cmdline").read_text()
    host.down()  # a second call is no error


# A program that has made a host and a network, as the chaos runs and the benchmarks do.
PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from testhost_driver import Host
from testhost_driver.lan import Lan
with Lan(sys.argv[2]) as lan:
    host = Host.up(name=sys.argv[2])
    print("made", file=sys.stderr, flush=True)
    while True: time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("number", "command", "until"),
    [
        (signal.SIGINT, [TESTHOST, "up", "--name"], "booting"),
        (signal.SIGTERM, ["/usr/bin/python3", "-c", PROGRAM, TESTHOST.parent], "made"),
    ],
    ids=["an interrupt of a command in the background", "the end of a program"],
)
def test_an_end_by_a_signal_removes_what_was_made(number: int, command: list[object], until: str) -> None:
    name = NAMES[0][:-1] + "d"
    argv = [str(word) for word in (*command, name)]
    # As in the background of a shell without job control, which ignores SIGINT.
    background = ["/bin/sh", "-c", "trap '' INT; exec \"$@\"", "sh", *argv]
    with subprocess.Popen(background, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while until not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        process.send_signal(number)
        said += process.stderr.read()
        assert process.wait() in (128 + number, -signal.SIGINT)
    assert f"host {name}" in said and "removing" in said, said
    assert not Path(f"/run/netns/testhost-{name}").exists() and not Path(f"/run/netns/testhost-lan-{name}").exists()
    assert not Path(f"/var/lib/nbagent-testhost/hosts/{name}").exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/testhost-{name}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "No_Good"}, "1 to 16 of a-z"),
        ({"name": "a" * 17}, "1 to 16 of a-z"),
        ({"driver": "docker"}, "one of nspawn, vm"),
        ({"suite": "buster"}, "one of bookworm, trixie"),
        ({"memory": "lots"}, "for example 4G"),
        ({"cpus": 0}, "1 to 64"),
    ],
)
def test_wrong_arguments_are_named_with_the_expected_value(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        Host.up(**options)  # type: ignore[arg-type]


def test_a_host_that_reboots_has_its_disk_and_a_new_boot(pair: tuple[Host, Host]) -> None:
    host = pair[1]
    boot_id = ["cat", "/proc/sys/kernel/random/boot_id"]
    before = host.run(boot_id).stdout
    host.run(["sh", "-c", "echo kept >/var/kept; echo gone >/run/gone"])
    host.run(["systemctl", "reboot"], check=False)
    host.boot_again()
    assert host.run(boot_id).stdout != before
    assert host.run(["cat", "/var/kept"]).stdout == "kept\n"
    assert host.run(["ls", "/run/gone"], check=False).returncode == 2


# --- commands ---


def test_exec_passes_status_streams_and_signals(host: Host) -> None:
    done = command_line("exec", host.name, "--", "sh", "-c", "cat; echo to-err >&2; exit 7", input="to-out\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "to-out\n", "to-err\n")
    assert host.run(["sh", "-c", "kill -9 $$"], check=False).returncode == 137
    assert host.run(["cat"], input=b"\x00\xff", text=False).stdout == b"\x00\xff"
    assert host.run(["printf", "%s|", "a b", "$HOME", "*"]).stdout == "a b|$HOME|*|"


def test_a_failed_command_shows_both_of_its_streams(host: Host) -> None:
    with pytest.raises(CommandFailed, match=r"(?s)status 3.*stdout\nthis.*stderr\nthat"):
        host.run(["sh", "-c", "echo this; echo that >&2; exit 3"])


def test_a_command_that_takes_too_long_is_ended_inside_too(host: Host) -> None:
    with pytest.raises(CommandTimedOut, match=r"(?s)so far.*ended after"):
        host.run(["bash", "-c", "echo so far; exec -a too-long sleep 987"], timeout=1)
    assert host.run(["pgrep", "-f", "too-long sleep"], check=False).stdout == ""


def test_exec_costs_milliseconds(host: Host) -> None:
    def best(argv: list[object]) -> float:
        times = []
        for _ in range(10):
            started = time.monotonic()
            subprocess.run([str(word) for word in argv], check=True)
            times.append(time.monotonic() - started)
        return min(times)

    overhead_s = best([TESTHOST, "exec", host.name, "--", "true"]) - best(
        ["/usr/bin/python3", "-IS", "-c", "pass"]
    )
    assert overhead_s < 0.030


def test_commands_are_in_a_unit_of_their_own(host: Host) -> None:
    assert (
        ":name=systemd:/system.slice/testhost-exec.service" in host.run(["cat", "/proc/self/cgroup"]).stdout
    )


def test_copies_go_both_ways_as_cp_does_it(host: Host, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep/script").write_text("#!/bin/sh\necho ran\n")
    (tree / "deep/script").chmod(0o755)
    (tree / "link").symlink_to("deep/script")
    host.copy_in(tree, "/root/new")  # no such directory: it becomes that
    host.copy_in([tree, tree / "deep/script"], "/root/new")  # a directory: into it
    assert host.run(["/root/new/tree/link"]).stdout == "ran\n"
    assert host.run(["/root/new/script"]).stdout == "ran\n"
    host.copy_out("/root/new/tree", tmp_path / "back")
    assert os.access(tmp_path / "back/deep/script", os.X_OK)
    assert os.readlink(tmp_path / "back/link") == "deep/script"
    done = command_line("cp", f"{host.name}:/etc/hostname", f"{host.name}:/etc/debian_version", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hostname").read_text().strip() == host.name
    with pytest.raises(CommandFailed, match="No such file"):
        host.copy_out("/no/such", tmp_path)
    with pytest.raises(BadArgument, match="no such file"):
        host.copy_in(tmp_path / "none", "/root/")


# --- ports ---


def test_connections_come_from_loopback_inside(pair: tuple[Host, Host]) -> None:
    # The same port in both: each has a network of its own.
    with serve(pair[0], 7002), serve(pair[1], 7002):
        for host in pair:
            assert read_all(host.connect(7002)) == f"{host.name} 127.0.0.1"
            port = host.forward(7002, 0)
            assert read_all(socket.create_connection(("127.0.0.1", port))) == f"{host.name} 127.0.0.1"
        assert pair[0].forward(7002, port_of(pair[0])) == port_of(pair[0])  # again: the same one
    # The killed process is the entry into the host; the server itself ends a moment later.
    refused, deadline = False, time.monotonic() + 10
    while not refused and time.monotonic() < deadline:
        try:
            pair[0].connect(7002).close()
        except ConnectionResetError:
            pass  # it was in the queue of the listening socket when the server ended
        except ConnectionRefusedError:
            refused = True
    assert refused


def port_of(host: Host) -> int:
    return host._state.forwards[-1].machine_port


def test_many_threads_connect_at_once_and_stay_in_their_own_namespace(host: Host) -> None:
    before = os.readlink("/proc/self/ns/net")
    with serve(host, 7003), ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: read_all(host.connect(7003)), range(100)))
    assert set(answers) == {f"{host.name} 127.0.0.1"}
    assert {
        os.readlink(f"/proc/self/task/{thread.native_id}/ns/net") for thread in threading.enumerate()
    } == {before}


def test_a_port_in_use_is_an_error(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = command_line("forward", host.name, f"7004:{taken.getsockname()[1]}")
    assert done.returncode == 2
    assert "in use" in done.stderr


# --- limits and namespaces ---


def test_memory_max_kills(host: Host) -> None:
    limit = ["systemd-run", "--scope", "--quiet", "-p", "MemoryMax=100M"]
    eat = ["python3", "-c", "bytearray(300 << 20)"]
    assert host.run([*limit, *eat], check=False).returncode == 137
    assert host.run(eat).returncode == 0


def test_tasks_max_refuses_the_fork(host: Host) -> None:
    fork = "import os\nfor _ in range(20):\n if not os.fork(): os.execvp('sleep', ['sleep', '3'])"
    limit = ["systemd-run", "--scope", "--quiet", "-p", "TasksMax=8"]
    assert "BlockingIOError" in host.run([*limit, "python3", "-c", fork], check=False).stderr


def test_cpu_weight_divides_one_processor(host: Host) -> None:
    """Two busy scopes on one processor, weights 1:4, and what each of them got in the same second and a half."""
    spin = (
        "import os, sys, time; os.sched_setaffinity(0, {0}); begin = float(sys.argv[1])\n"
        "time.sleep(max(0, begin - time.monotonic())); used = time.process_time()\n"
        "while time.monotonic() < begin + 1.5: pass\n"
        "print(time.process_time() - used)"
    )
    scope = ["systemd-run", "--scope", "--quiet", "--slice=weights.slice"]
    begin = time.monotonic() + 2  # by the clock of machine and host; both have started by then
    busy = [
        host.popen(
            [*scope, "-p", f"CPUWeight={weight}", "python3", "-c", spin, begin], stdout=subprocess.PIPE, text=True
        )
        for weight in (50, 200)
    ]
    small, large = (float(process.communicate()[0]) for process in busy)
    assert 2.5 < large / small < 6


def test_a_minimal_slot_works_without_capabilities_on_the_host(host: Host) -> None:
    done = host.run(["python3", "-c", MINIMAL_SLOT])
    assert done.stdout.split() == ["1", "True"]
    assert host.run(["test", "-e", "/usr/written"], check=False).returncode == 1


def test_a_package_installs_without_a_network(host: Host, tmp_path: Path) -> None:
    control = tmp_path / "probe/DEBIAN/control"
    control.parent.mkdir(parents=True)
    control.write_text(
        "Package: testhost-probe\nVersion: 1\nArchitecture: all\nMaintainer: test <test@localhost>\n"
        "Description: proves that apt resolves from what is installed\n"
        "Depends: python3-flask, nginx, gunicorn\n"
    )
    subprocess.run(
        ["dpkg-deb", "--build", tmp_path / "probe", tmp_path / "probe.deb"], check=True, capture_output=True
    )
    host.copy_in(tmp_path / "probe.deb", "/root/")
    host.run(["apt-get", "install", "-y", "/root/probe.deb"])
    host.run(["apt-get", "purge", "-y", "testhost-probe"])
