# SPDX-License-Identifier: BSD-3-Clause
"""Isolation of a slot: attempts of a hostile program in it (walls.py), with each step of the sandbox and without it."""

import base64
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from wheels import wheel

HERE = Path(__file__).parent
WALLS = (HERE / "walls.py").read_text()
HALVES = ["a-word-of-", "the-host-7f3a"]
WORD, SOCKET, FILE = "".join(HALVES), "nbagent-decoy", "/etc/nbagent-decoy"
SHM_KEY = 0x6E6261
# Objects of the host that a slot must not reach: a process with an abstract socket and shared memory, a file.
DECOY = f"""
import ctypes, os, socket
os.environ["DECOY"] = "{WORD}"
libc = ctypes.CDLL(None)
segment = libc.shmget({SHM_KEY}, 4096, 0o1666)
server = socket.socket(socket.AF_UNIX)
server.bind("\\0{SOCKET}")
server.listen()
with open("{FILE}", "w") as file:
    file.write("{WORD}\\n")
os.chmod("{FILE}", 0o644)
print(os.getpid(), flush=True)
input()
libc.shmctl(segment, 0, None)
os.unlink("{FILE}")
"""
# Steps without which a slot lacks a feature or fails to start, but no attempt succeeds.
FURNITURE = {
    # A mount namespace that is owned by another user namespace is a slave: it receives the host's mounts and never
    # propagates any (mount_namespaces(7)). The step only keeps later mounts of the host out, until Detach.
    "PrivateMounts",
    "Directory", "Bind tmp", "Bind var/tmp", "Tmpfs dev", "Devices", "Bind dev/shm", "Bind dev/home", "DevPts", "Link",
    "UserPackages", "Home", "Tmpfs run/jupyter", "Loopback", "SystemFiles", "OwnCgroup", "LimitFile",
}


@pytest.fixture(scope="module")
def decoys(shared):
    """The decoys on the shared host, in the form that walls.py takes."""
    with shared.host.popen(
        ["env", f"DECOY={WORD}", "python3", "-c", DECOY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        pid = int(process.stdout.readline())
        yield {
            "abstract": SOCKET, "shm": SHM_KEY, "pid": pid, "file": FILE, "word": HALVES,
            "hostname": shared.run("hostname").strip(), "storage": 256 << 20,
        }
        process.stdin.write("\n")
        process.stdin.flush()
        process.wait(10)


@pytest.fixture(scope="module")
def variants(shared, decoys):
    """The result of a sandbox for each step that was left out, or that failed (unwalled.py)."""
    shared.host.copy_in([str(HERE / "unwalled.py")], "/root/")
    done = shared.host.run(
        ["python3", "-I", "/root/unwalled.py", "minimal", json.dumps(decoys)], input=WALLS, timeout=300
    )
    shared.run("rm", "/root/unwalled.py")
    return json.loads(done.stdout)


def test_no_attempt_succeeds_in_a_kernel_of_a_claimed_slot(agent, decoys):
    with agent.open().kernel() as kernel:
        assert tried(kernel, decoys) == {}


def test_no_attempt_succeeds_in_a_program_in_the_sandbox(variants):
    assert variants["whole"] == {"failed": None, "through": {}, "left": []}


def test_each_step_is_necessary(variants):
    """Without any one step, an attempt succeeds or the slot does not start."""
    open_walls = {}
    for name, found in variants.items():
        if name.startswith("without ") and name.removeprefix("without ") not in FURNITURE:
            open_walls[name] = found["failed"] or found["through"] or found["through"] is None
    assert len(open_walls) >= 15
    assert [name for name, what in open_walls.items() if not what] == []


def test_steps_that_do_not_isolate(variants):
    for name in FURNITURE:
        found = variants[f"without {name}"]
        assert found["failed"] or found["through"] == {}, (name, found)


def test_a_failed_step_is_reported_and_nothing_of_earlier_steps_remains(variants):
    failing = {name: found for name, found in variants.items() if name.startswith("fails after ")}
    assert len(failing) >= 29
    for name, found in failing.items():
        assert found["failed"]["step"] == "a step that is refused", (name, found)
        assert found["failed"]["text"] == "[Errno 1] Operation not permitted"
        assert found["through"] is None and found["left"] == [], (name, found)


def test_no_symbolic_link_in_an_image_leads_a_step_to_the_host(variants):
    hostile = {name: found for name, found in variants.items() if name.startswith("link ")}
    assert len(hostile) >= 85
    for name, found in hostile.items():
        # The image has no program, so that every start fails, at the latest with exec.
        assert found["failed"] and found["through"] is None and found["left"] == [], (name, found)
    assert sum(found["failed"]["step"] == "exec" for found in hostile.values()) > 20


def test_no_variant_leaves_anything_on_the_host(variants):
    assert {name: found["left"] for name, found in variants.items() if found["left"]} == {}


# Decoys made in a slot's kernel, which another slot must not reach.
NEIGHBOUR = f"""
import ctypes, json, os, socket, subprocess, sys
subprocess.Popen(["sleep", "600"], env={{"DECOY": "{WORD}"}})
segment = ctypes.CDLL(None).shmget({SHM_KEY}, 4096, 0o1666)
server = socket.socket(socket.AF_UNIX)
server.bind("\\0{SOCKET}")
server.listen()
for path in ("/tmp/decoy", "/dev/shm/decoy"):
    with open(path, "w") as file:
        file.write("{WORD}\\n")
    os.chmod(path, 0o666)
print(json.dumps([os.getpid(), socket.gethostname()]))
"""


def tried(kernel, decoys):
    """{name: result} of the attempts that succeed in a kernel."""
    # Python warns about fork() in a process with threads, on the stream that has the result.
    quiet = "import warnings\nwarnings.simplefilter('ignore')\n"
    result = kernel.run(f"{quiet}{WALLS}\nprint(json.dumps(tried({decoys!r})))")
    assert result.status == "ok", result
    return {name: what for name, what in json.loads(result.stream).items() if what is not None}


def test_a_slot_reaches_nothing_of_another_slot(agent, decoys):
    one, other = agent.open(), agent.open()
    with one.kernel() as owner, other.kernel() as neighbour:
        pid, hostname = json.loads(owner.run(NEIGHBOUR).stream)
        sought = decoys | {"hostname": hostname, "file": "/tmp/decoy", "pid": pid + 1000}
        # The slot that made the decoys reaches them, so the attempts are able to detect them.
        found = tried(owner, sought | {"pid": pid})
        assert set(found) >= {
            "to_connect_to_an_abstract_socket_of_the_host", "to_find_shared_memory_of_the_host",
            "to_see_a_process_of_the_host", "to_signal_or_trace_a_process_of_the_host",
            "to_read_a_file_of_the_host", "to_learn_the_hosts_name_and_cgroup",
        }
        assert tried(neighbour, sought) == {}
        assert tried(neighbour, sought | {"file": "/dev/shm/decoy"}) == {}


# Defined in the kernels of two slots.
INODES = r"""
import ctypes, fcntl, json, os, struct
libc = ctypes.CDLL(None)
PATHS = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "ptmx", "shm", "pts")] + [
    "/", "/dev", "/etc", "/etc/os-release", "/etc/passwd", "/tmp", "/proc", "/proc/sys", "/proc/fs", "/proc/version",
    os.path.realpath("/usr/bin/python3"), os.path.dirname(os.__file__), os.__file__, "/run/nbagent/lib/nbagent",
    "/run/nbagent/lib/nbagent/core", "/run/nbagent/lib/nbagent/core/model.py",
]
def watch():
    global watches, names
    watches = libc.inotify_init1(os.O_NONBLOCK)
    names = {libc.inotify_add_watch(watches, path.encode(), 0xfff): path for path in PATHS}
def seen():
    found = set()
    try:
        while True:
            data = os.read(watches, 1 << 16)
            while data:
                watch, _, _, length = struct.unpack_from("iIII", data)
                found.add(names[watch])
                data = data[16 + length:]
    except BlockingIOError:
        return sorted(found)
def opened():
    for path in PATHS:
        os.close(os.open(path, os.O_RDONLY))
held = []
def locked():
    refused = []
    for path in PATHS:
        held.append(os.open(path, os.O_RDONLY))
        try:
            fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refused.append(path)
    return sorted(refused)
def leased():
    taken = []
    for path in ("/etc/os-release", os.__file__, "/run/nbagent/lib/nbagent/core/model.py"):
        held.append(os.open(path, os.O_RDONLY))
        try:
            fcntl.fcntl(held[-1], fcntl.F_SETLEASE, fcntl.F_RDLCK)
            taken.append(path)
        except OSError:
            pass
    return taken
"""
# Bound from the /dev of the zygote's unit, because only root of the host makes device files
# (packaging/docs/security.md).
SHARED_DEVICES = ["/dev/full", "/dev/null", "/dev/random", "/dev/urandom", "/dev/zero"]


def test_slots_share_no_inodes_but_those_of_devices(agent):
    def evaluate(kernel, code):
        result = kernel.run(code)
        assert result.status == "ok", result
        return json.loads(result.stream) if result.stream else None

    agent.wait_warm()
    with agent.open().kernel() as one, agent.open().kernel() as other:
        for kernel in (one, other):
            evaluate(kernel, INODES)
        evaluate(one, "watch(); opened()")
        own = evaluate(one, "print(json.dumps(seen()))")
        evaluate(other, "opened()")
        # The host's own devices are others than those of the zygote's unit.
        agent.run("sh", "-c", "head -qc1 /dev/null /dev/zero /usr/lib/python3/dist-packages/nbagent/core/model.py")
        assert evaluate(one, "print(json.dumps(seen()))") == SHARED_DEVICES
        assert len(own) >= len(SHARED_DEVICES) + 10  # so the watches work
        assert evaluate(one, "print(json.dumps(locked()))") == []
        assert evaluate(other, "print(json.dumps(locked()))") == SHARED_DEVICES
        assert evaluate(one, "print(json.dumps(leased()))") == []


# Each process of a slot, by its role, and what another process of the same user can do to it.
INSPECT = r"""
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
def memory(pid, address):
    buffer = ctypes.create_string_buffer(8)
    local, remote = (Vector(at, 8) for at in (ctypes.addressof(buffer), address))
    return libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) == 8
def descriptor(pid):
    fd = libc.syscall(434, pid, 0)
    taken = libc.syscall(438, fd, 0, 0)
    if taken >= 0:
        os.close(taken)
    os.close(fd)
    return taken >= 0
def traced(pid):
    # PTRACE_SEIZE; the end of this process detaches it.
    return libc.ptrace(0x4206, pid, None, None) == 0
def able(pid, address):
    child = os.fork()
    if child == 0:
        found = [memory(pid, address), descriptor(pid), traced(pid)]
        os._exit(sum(bit << number for number, bit in enumerate(found)))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [name for number, name in enumerate(("memory", "descriptors", "ptrace")) if status & 1 << number]
address = id(sys)
init, fork_server, server, *_ = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
print(json.dumps({
    "init": able(1, address), "fork server": able(fork_server, address), "server": able(server, address),
    "kernel": able(os.getpid(), address),
}))
"""


def test_processes_of_a_slot_trace_each_other_but_not_init_and_the_fork_server(agent):
    """Server and kernels run the code of one user with one id; init and the fork server are not dumpable."""
    with agent.open().kernel() as kernel:
        result = kernel.run(f"import warnings\nwarnings.simplefilter('ignore')\n{INSPECT}")
        assert result.status == "ok", result
        found = json.loads(result.stream)
    both = ["memory", "descriptors", "ptrace"]
    assert found == {"init": [], "fork server": [], "server": both, "kernel": both}


EVIL = r"""
set -eu
mkdir -p /root/evil/etc /root/evil/home/jovyan /root/evil/tmp /root/evil/proc /root/evil/dev /root/evil/run
cd /root/evil
cp -a --parents /usr/bin/python3.11 /usr/lib/python3.11 .
rm -rf usr/lib/python3.11/test usr/lib/python3.11/sitecustomize.py
libraries=$(ldd /usr/bin/python3.11 /usr/lib/python3.11/lib-dynload/_ctypes*.so | grep -o '/[^ :]*[.]so[^ :]*')
cp -L --parents $(printf '%s\n' "$libraries" | sort -u) .
printf 'python = "/usr/bin/python3.11"\nhome = "/home/jovyan"\nuser = "jovyan"\n' > etc/nbagent-image.toml
cat > usr/lib/python3.11/sitecustomize.py
chmod -R go+rX .
tar -C /root/evil -cf /root/evil.tar .
rm -rf /root/evil
"""


def test_a_malicious_image_is_isolated(agent, decoys):
    """Its sitecustomize runs before any code of nbagent, in every Python process of the image."""
    for pattern in (
        r"slot \S+ did not start: the slot's program ended", r"pool evil pauses ", r"^nbagent-\S+\.scope: Failed",
        r"zygote evil:\S+ failed", r"^nbagent-zygote@evil:\S+: (Failed|Main process exited)",
    ):
        agent.expect(pattern)
    hostile = f"{WALLS}\nprint('TRIED ' + json.dumps(tried({decoys!r})), flush=True)\n"
    agent.run("sh", "-c", EVIL, input=hostile)
    try:
        agent.run("nbagent", "image", "add", "--name", "evil", "/root/evil.tar")
        agent.run("systemctl", "reload", "nbagent.service")

        def reports():
            """The attempts of the zygote, and of the slot that is exec'd because the zygote failed."""
            lines = [e for e in agent.journal("_TRANSPORT=stdout") if str(e["MESSAGE"]).startswith("TRIED ")]
            found = {e["_SYSTEMD_UNIT"].endswith(".service"): e["MESSAGE"] for e in lines}
            return found if len(found) == 2 else None

        found = agent.wait(reports, "the attempts of the image")
    finally:
        agent.run("nbagent", "image", "remove", "evil", check=False)
        agent.run("rm", "-f", "/root/evil.tar")
        agent.run("systemctl", "reload", "nbagent.service")
    tries = {zygote: json.loads(line.removeprefix("TRIED ")) for zygote, line in found.items()}
    through = {zygote: {n: what for n, what in each.items() if what is not None} for zygote, each in tries.items()}
    assert len(tries[True]) == len(tries[False]) >= 25
    assert through[False] == {}
    # A zygote has the privileges that forking a slot needs, and no others: packaging/docs/security.md.
    assert through[True] == {
        "to_be_root_of_the_slot": "uid 0, gid 0, groups []", "to_hold_a_capability": "CapPrm:\t00000000002401c0",
        "to_make_a_system_call_that_nobody_needs": "setns",
        "to_make_the_kernel_compile_a_system_call_filter": "seccomp",
    }


PROFILE = "nbagent-slots"
# Each succeeds for root of the host, in the host's namespaces and without a filter, so that the profile refuses it.
REFUSED_BY_PROFILE = {
    "a mount": "mount -t tmpfs none /mnt && umount /mnt",
    "a kernel setting": "value=$(cat /proc/sys/vm/swappiness); echo $value > /proc/sys/vm/swappiness",
    "a file of sysfs": "value=$(cat /sys/class/net/lo/mtu); echo $value > /sys/class/net/lo/mtu",
    "a capability": "touch /run/owned; chown 1:1 /run/owned",
    "a signal to a process of the host": "/bin/kill -s 0 1",
    "the environment of a process of the host": "cat /proc/1/environ > /dev/null",
    "a raw socket": "python3 -ISc 'import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)'",
    "a packet socket": "python3 -ISc 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)'",
    "another profile": "echo changeprofile man_groff > /proc/thread-self/attr/apparmor/current",
    "no profile": "echo changeprofile unconfined > /proc/thread-self/attr/apparmor/current",
}
# The usual acts of a notebook: programs, output by /dev/stdout, ps, sockets, a package, multiprocessing, files.
USUAL = """
import json, multiprocessing, os, socket, subprocess, sys, tempfile
def output_of(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return [done.returncode, (done.stdout + done.stderr)[-300:]]
def label():
    return open("/proc/self/attr/current").read().strip()
found = {"kernel": label(), "child": output_of("cat", "/proc/self/attr/current"), "ps": output_of("ps", "-ef")[0]}
found["stdout"] = output_of("sh", "-c", "echo through > /dev/stdout")
with multiprocessing.get_context("spawn").Pool(1) as pool:
    found["spawned"] = pool.apply(abs, (-5,))
ends = socket.socketpair()
ends[0].send(b"unix")
found["sockets"] = ends[1].recv(10).decode()
with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
    with server.accept()[0] as accepted:
        client.send(b"tcp")
        found["sockets"] += accepted.recv(10).decode()
with tempfile.TemporaryFile() as file:
    found["file"] = file.write(b"x" * 5000)
found["pip"] = output_of(sys.executable, "-m", "pip", "install", "--no-index", "--user", WHEEL)
found["imported"] = output_of(sys.executable, "-c", "import tiny_answer; print(tiny_answer.ANSWER)")
print(json.dumps(found))
"""


def labels(agent, slot):
    """The AppArmor label of each process of a slot. A login shell starts processes that end at once."""
    files = " ".join(f"/proc/{pid}/attr/current" for pid in agent.processes(slot))
    shown = agent.run("sh", "-c", f"for file in {files}; do cat $file; done 2> /dev/null; true")
    return shown.replace("\0", "").splitlines()


def denials(agent):
    """The kernel's entries about refusals of the profile."""
    return agent.run("sh", "-c", f"journalctl -k -o cat | grep DENIED | grep {PROFILE}; true")


def test_apparmor_confines_the_processes_of_slots_on_a_host_that_has_it(any_agent):
    """On the virtual machines, whose kernels are those of Debian."""
    agent = any_agent
    findings = json.loads(agent.host.run(["nbagent", "doctor", "--json"], check=False).stdout)
    finding = next(finding for finding in findings if finding["name"] == "AppArmor")
    if agent.host.driver != "vm":
        assert finding["status"] == "ok", finding
        return
    assert (finding["status"], finding["found"]) == ("ok", f"profile {PROFILE} is enforced in slots")
    before, (name, content) = denials(agent), wheel()
    agent.wait_warm()
    notebook = agent.open(files={name: {"base64": base64.b64encode(content).decode()}})
    with notebook.kernel() as kernel:
        result = kernel.run(USUAL.replace("WHEEL", repr(name)), timeout=600)
        assert result.status == "ok", result
        usual = json.loads(result.stream)
        terminal = notebook.post("api/terminals")["name"]
        agent.wait(lambda: notebook.get(f"api/terminals/{terminal}"), "the terminal")
        # The slot's init, fork server, server, kernel, and the shell of the terminal.
        found = agent.wait(lambda: len(all_of := labels(agent, notebook.slot)) >= 5 and all_of, "five processes")
        assert set(found) == {f"{PROFILE} (enforce)"}
    assert usual["kernel"] == f"{PROFILE} (enforce)" and usual["child"] == [0, f"{PROFILE} (enforce)\n"], usual
    assert (usual["ps"], usual["stdout"], usual["spawned"]) == (0, [0, "through\n"], 5), usual
    assert (usual["sockets"], usual["file"], usual["imported"]) == ("unixtcp", 5000, [0, "42\n"]), usual
    # The kernel logged no refusal, so that nothing of the above met the profile.
    assert denials(agent) == before
    script = "\n".join(
        f"sh -c {shlex.quote(tried)} >&2; echo $?; aa-exec -p {PROFILE} -- sh -c {shlex.quote(tried)} >&2; echo $?"
        for tried in REFUSED_BY_PROFILE.values()
    )
    codes = list(map(int, agent.run("sh", "-c", script).split()))
    assert dict(zip(REFUSED_BY_PROFILE, codes[::2], strict=True)) == dict.fromkeys(REFUSED_BY_PROFILE, 0)
    assert [name for name, code in zip(REFUSED_BY_PROFILE, codes[1::2], strict=True) if code == 0] == []
    shown = agent.run("aa-exec", "-p", PROFILE, "--", "cat", "/proc/self/attr/current")
    assert shown.strip() == f"{PROFILE} (enforce)"


# Runs a program whose first four bytes are of no format; the last two are in the name of the module.
UNKNOWN_FORMAT = """
import os, tempfile
def run_unknown(name):
    path = tempfile.mkdtemp() + "/program"
    with open(path, "wb") as file:
        file.write(b"\\xa1\\xb2" + name)
    os.chmod(path, 0o755)
    try:
        os.posix_spawn(path, [path], {})
    except OSError as error:
        return error.errno
"""


def test_the_kernel_starts_no_modprobe_for_a_slot(any_agent):
    """On the virtual machines, because other hosts share the kernel of this machine."""
    agent = any_agent
    state = agent.host.run(["systemctl", "is-active", "nbagent-modules.service"], check=False).stdout
    if agent.host.driver != "vm":
        assert state == "inactive\n"
        return
    assert state == "active\n"
    agent.run("sh", "-ec", """
        printf '#!/bin/sh\necho "$@" >> /root/requested\nexec /sbin/modprobe "$@"\n' > /root/modprobe
        chmod 755 /root/modprobe; touch /root/requested; echo /root/modprobe > /proc/sys/kernel/modprobe""")
    agent.wait_warm()
    notebook = agent.open()
    try:
        with notebook.kernel() as kernel:
            assert kernel.run(UNKNOWN_FORMAT).status == "ok"
            # Of the host, whose requests the kernel serves.
            assert agent.run("python3", "-c", f"{UNKNOWN_FORMAT}\nprint(run_unknown(bytes([0xc0, 0xd0])))") == "8\n"
            assert kernel.run("run_unknown(bytes([0xc1, 0xd1]))").text == "8"
            agent.run("systemctl", "stop", "nbagent-modules.service")
            assert kernel.run("run_unknown(bytes([0xc2, 0xd2]))").text == "8"
            agent.run("systemctl", "start", "nbagent-modules.service")
            assert kernel.run("run_unknown(bytes([0xc3, 0xd3]))").text == "8"
        requested = agent.run("cat", "/root/requested").split()
        assert [word for word in requested if word.startswith("binfmt")] == ["binfmt-d0c0", "binfmt-d2c2"]
    finally:
        agent.run("sh", "-c", "echo /sbin/modprobe > /proc/sys/kernel/modprobe; rm /root/modprobe /root/requested")
        agent.run("systemctl", "start", "nbagent-modules.service")


# Commands that would leave the sandbox or gain privileges; the image has the programs from Debian.
TOOLS = (
    "unshare --user true", "unshare --map-root-user --mount true", "unshare --net true", "nsenter -t 1 --all true",
    "mount -t tmpfs none /mnt", "mount --bind / /mnt", "umount /proc", "chroot / true", "dmesg", "swapon /dev/null",
    "su root -c true", "setpriv --reuid 0 true", "hostname other", "date -s 2020-01-01", "mknod /tmp/sda b 8 0",
    "renice -n -5 -p 1", "chown root /tmp", "fallocate -l 2T /tmp/big", "sysctl -w kernel.panic=1",
    "cat /dev/mem", "cat /proc/kcore", "prlimit --nofile=1048576 true",
)


def test_no_privileged_command_succeeds(agent):
    with agent.open().kernel() as kernel:
        result = kernel.run(f"""
import json, shutil, subprocess
found = {{}}
for line in {TOOLS!r}:
    if shutil.which(line.split()[0]):
        done = subprocess.run(line.split(), capture_output=True, text=True, timeout=30)
        found[line] = [done.returncode, done.stderr.strip()[-100:]]
found["setpriv"] = subprocess.run(["setpriv", "--dump"], capture_output=True, text=True).stdout
print(json.dumps(found))""")
        tools = json.loads(result.stream)
        privileges = dict(line.split(": ", 1) for line in tools.pop("setpriv").splitlines())
        # kill(2) succeeds, but PID 1 of a pid namespace receives no SIGKILL from inside it.
        assert kernel.run("import os; os.kill(1, 9); 6 * 7").text == "42"
    assert len(tools) >= 16
    assert [line for line, (code, _) in tools.items() if code == 0] == []
    assert privileges["no_new_privs"] == "1"
    for name in ("Inheritable capabilities", "Ambient capabilities", "Capability bounding set"):
        assert privileges[name] == "[none]", privileges
