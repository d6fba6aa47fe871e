# SPDX-License-Identifier: BSD-3-Clause
"""The part of `make chaos` that runs on the host, as root: carries out faults, and counts what there is.

    python3 -u inside.py        one JSON request a line on standard input, one JSON response a line

    {"do": "begin" or "end", "kind": str, "target": str}       a fault of plan.py
    {"do": "census"}                                            everything of nbagent on the host, by kind
    {"do": "load"}                                              use of the processes of nbagent, by unit

Standard library only.
"""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

RUN, SLOTS, JOURNALS = Path("/run"), Path("/run/nbagent/slots"), Path("/var/log/journal")
PID_MAX, FILE_MAX = Path("/proc/sys/kernel/pid_max"), Path("/proc/sys/fs/file-max")
# Services whose descriptors, memory and tasks are counted.
SERVICES = ("nbagent", "nbagent-api", "nbagent-router", "nbagent-units", "nbagent-launch", "nbagent-network")
CGROUPS = ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup")
# Other processes write to a file system between the reading of its use and the setting of its limit.
FILL_TRIES = 20
# Left for the processes of the host itself.
FREE_DESCRIPTORS, FREE_TASKS = 3, 2
FREE_MEMORY = 64 << 10
# Files that other processes may close before there is one for another process.
FREED_FILES = 300
# journald allocates its files in steps of 8 MiB.
JOURNAL_BYTES, ENTRY_BYTES = 32 << 20, 32 << 10
# dbus-daemon accepts 64 connections whose peers have not authenticated, each for 30 s, and its queue has the others.
BUS, BUS_CONNECTIONS = "/run/dbus/system_bus_socket", 500
# PID 1 accepts 4,096 connections and closes further ones. It accepts all that are in its queue, which takes a while.
MANAGER, MANAGER_ACCEPTED, MANAGER_CONNECTIONS, ACCEPTED_S = "/run/systemd/private", 4000, 9000, 900.0
CHANGES = "mkdir,mkdirat,rename,renameat,renameat2,rmdir,symlink,symlinkat,unlink,unlinkat"
# By strace(1). Every third opening fails too, so that files are neither read nor made at times.
INJECTED = {
    "input/output errors": (f"{CHANGES}:error=EIO", "openat:error=EIO:when=3+3"),
    "slow files": (f"{CHANGES},openat:delay_enter=50ms",),
    "failed allocations": ("brk,mmap,mremap:error=ENOMEM",),
}
# Commands of another program that change the slots' network.
NETWORK = {
    "the rules of nftables": "nft flush ruleset",
    "the elements of slots": "nft flush set inet nbagent slots4; nft flush set inet nbagent refused4",
    "the flags and routes of slots": """for link in $(ip -o link | grep -o 'nb-[0-9a-z]\\{12\\}'); do
        ip link set $link down arp on; ip route flush dev $link; done""",
}
STEPS_S = {"an hour ahead": 3600, "an hour back": -3600, "ten years ahead": 10 * 365 * 86400}


def run(*argv):
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    return done.stdout


def unit_of(pid):
    """The last unit in the cgroup of a process; "" when it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            number, names, path = line.split(":", 2)
            if names == "name=systemd" or (number == "0" and path != "/"):
                return path.rstrip("/").rpartition("/")[2]
    return ""


def processes():
    """All processes of the host by unit."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (unit := unit_of(entry)):
            found.setdefault(unit, []).append(int(entry))
    return found


def command(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def parent(pid):
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def zombies():
    """Processes that have ended and that a service of nbagent has not reaped."""
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                unit = unit_of(parent(entry))
                found += [f"{entry} of {unit}"] if unit.startswith("nbagent") and unit.endswith(".service") else []
    return found


def zygotes():
    return [unit for unit in processes() if unit.startswith("nbagent-zygote@")]


def warm():
    """The first process of a slot that is warm by its record, [] when there is none."""
    for file in SLOTS.glob("*/slot.json"):
        with contextlib.suppress(OSError, ValueError):
            slot = json.loads(file.read_text())
            if slot["state"] == "warm":
                return [slot["pid"]]
    return []


def targets(target):
    """The processes of a target of plan.py."""
    found = processes()
    if target == "all services of nbagent at once":
        return [pid for name in SERVICES for pid in found.get(f"{name}.service", [])]
    if target == "the first process of a warm slot":
        return warm()
    if target == "one worker of the router":
        pids = found.get("nbagent-router.service", [])
        return [pid for pid in pids if parent(pid) in pids][:1]
    if target.startswith("zygote"):
        pids = [pid for unit in found if unit.startswith("nbagent-zygote@") for pid in found[unit]]
        services = [pid for pid in pids if "zygote_service" in command(pid) and parent(pid) not in pids]
        return {"zygote": pids, "zygote-service": services}.get(target, [pid for pid in pids if pid not in services])
    return found.get(target, [])


def send(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return pids


def limit_descriptors(target):
    """Lets processes open few descriptors more than they have open; returns the former limits."""
    before = {}
    for pid in targets(target):
        with contextlib.suppress(OSError):
            used = set(map(int, os.listdir(f"/proc/{pid}/fd")))
            soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            # The limit is one of numbers, and numbers below that of the last descriptor may be free.
            unused = [number for number in range(len(used) + FREE_DESCRIPTORS + 1) if number not in used]
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(hard, unused[FREE_DESCRIPTORS]), hard))
            before[pid] = (soft, hard)
    return before


def restore_descriptors(before):
    for pid, limits in before.items():
        with contextlib.suppress(OSError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def limit_tasks(unit):
    """Sets TasksMax= of a unit to little more than it has."""
    now = run("systemctl", "show", "-P", "TasksCurrent", unit).strip()
    most = int(now) + FREE_TASKS if now.isdecimal() else 1
    run("systemctl", "set-property", "--runtime", unit, f"TasksMax={most}")
    return most


def limit_memory(unit):
    """Sets MemoryMax= of a unit to little more than it has."""
    now = run("systemctl", "show", "-P", "MemoryCurrent", unit).strip()
    most = int(now) + FREE_MEMORY if now.isdecimal() else FREE_MEMORY
    run("systemctl", "set-property", "--runtime", unit, f"MemoryMax={most}")
    return most


def inject(target, changes, *options):
    """Starts strace, which changes system calls of the processes of a target and of their children."""
    pids = targets(target)
    if not pids:
        return None
    calls = [part for text in changes for part in ("-e", f"inject={text}")]
    traced = ",".join(dict.fromkeys(text.partition(":")[0] for text in changes))
    argv = ["strace", "-f", "-qq", "-o", "/dev/null", *options, "-e", f"trace={traced}", *calls]
    process = subprocess.Popen([*argv, *(part for pid in pids for part in ("-p", str(pid)))], stderr=subprocess.DEVNULL)
    until_s = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < until_s and not all(map(is_traced, pids)):
        time.sleep(0.02)
    # It ends at once when it may not trace them.
    return process if process.poll() is None else None


def is_traced(pid):
    """Whether a process is traced, or has ended."""
    with contextlib.suppress(OSError):
        return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()
    return True


def refuse_nftables():
    """Lets commands of nftables by the network service fail, as when the kernel has no memory for them."""
    unit = "nbagent-network.service"
    pid, = targets(unit)
    own = {os.readlink(f"/proc/{pid}/fd/{entry}") for entry in os.listdir(f"/proc/{pid}/fd")}
    for line in Path(f"/proc/{pid}/net/netlink").read_text().splitlines()[1:]:
        _, protocol, _, groups, *_, inode = line.split()
        # The other socket of this protocol, NETLINK_NETFILTER, is for notifications.
        if protocol == "12" and not int(groups, 16) and (path := f"socket:[{inode}]") in own:
            return inject(unit, ("sendmsg,sendto:error=ENOBUFS",), "-P", path)
    return None


def connect_to_bus():
    """Opens connections to dbus-daemon, and sends nothing over them. Raises RuntimeError if it serves another."""
    found = []
    for _ in range(BUS_CONNECTIONS):
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        found.append(connection)
        # The queue may be full.
        with contextlib.suppress(OSError):
            connection.connect(BUS)
    with socket.socket(socket.AF_UNIX) as another, contextlib.suppress(TimeoutError, BlockingIOError):
        another.settimeout(1)
        another.connect(BUS)
        another.sendall(b"\0AUTH EXTERNAL 30\r\n")
        raise RuntimeError(f"dbus-daemon sends {another.recv(100)}")
    return found


def response_of(connection):
    """The first bytes of the other end, none when it has closed the connection. Raises TimeoutError."""
    try:
        return connection.recv(100)
    except ConnectionError:
        return b""


def connect_to_manager():
    """Opens connections to PID 1 until it closes another at once. Raises RuntimeError.

    It closes those that do not authenticate after 90 s.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    found, until_s = [], time.monotonic() + ACCEPTED_S
    while len(found) < MANAGER_CONNECTIONS and time.monotonic() < until_s:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(1)
        try:
            connection.connect(MANAGER)
        except (BlockingIOError, TimeoutError):  # the queue is full
            connection.close()
            time.sleep(0.1)
            continue
        found.append(connection)
        with contextlib.suppress(OSError):
            connection.sendall(b"\0AUTH EXTERNAL 30\r\nBEGIN\r\n")
        if len(found) > MANAGER_ACCEPTED:
            with contextlib.suppress(TimeoutError):
                if not response_of(connection):
                    return found
    raise RuntimeError(f"PID 1 has closed none of {len(found)} connections")


def step_clock(seconds):
    """Sets the wall clock of the machine."""
    time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)
    return seconds


def limit_ids():
    """Leaves no id to new processes. Since Linux 6.14 each pid namespace has a limit of its own, of at least 301."""
    before = PID_MAX.read_text()
    # systemd-nspawn has mounted it read-only.
    run("mount", "-o", "remount,bind,rw", "/proc/sys")
    PID_MAX.write_text("301")
    return before


def flood_journal():
    """Sends entries until journald has used up what it has allocated of its file system."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.connect("/run/systemd/journal/socket")
        for _ in range(JOURNAL_BYTES // ENTRY_BYTES):
            # Random, because journald compresses; without a line break, which needs another form.
            journal.sendall(b"MESSAGE=" + os.urandom(ENTRY_BYTES // 2).hex().encode() + b"\n")


def fill(target):
    """Lowers the limits of a tmpfs to what it has, which takes no memory. Returns it, its former size and inodes.

    The kernel refuses limits below what it has by then. Raises RuntimeError.
    """
    path, page = target.rpartition(" ")[2], resource.getpagesize()
    before = os.statvfs(path)
    for _ in range(FILL_TRIES):
        status = os.statvfs(path)
        blocks = (status.f_blocks - status.f_bfree) * status.f_frsize // page
        # The unused part of the last pages of files remains.
        limit = f"size={(blocks + 1) * page}"
        if not target.startswith("blocks"):
            limit = f"nr_inodes={status.f_files - status.f_ffree + 1}"
        run("mount", "-o", f"remount,{limit}", path)
        after = os.statvfs(path)
        if (after.f_blocks, after.f_files) != (before.f_blocks, before.f_files):
            return path, before.f_blocks * before.f_frsize, before.f_files
    raise RuntimeError(f"the limits of {path} were not lowered")


def empty(before):
    path, size, inodes = before
    run("mount", "-o", f"remount,size={size},nr_inodes={inodes}", path)


def limit_files():
    """Leaves no open file to processes without CAP_SYS_ADMIN, on the whole machine."""
    used, _, before = Path("/proc/sys/fs/file-nr").read_text().split()
    FILE_MAX.write_text(str(int(used) - FREED_FILES))
    return before


class Faults:
    """The faults that last."""

    def __init__(self):
        self.held = {}

    def begin(self, kind, target):
        """Returns what was hit."""
        if kind == "kill":
            return send(targets(target), signal.SIGKILL)
        if kind == "freeze":
            self.held["freeze"] = send(targets(target), signal.SIGSTOP)
            return self.held["freeze"]
        if kind == "freeze PID 1":
            # Its own SIGSTOP has no effect on it. strace does not let it return from its system call.
            self.held[kind] = inject(target, ("epoll_wait:delay_exit=600s",))
            return self.held[kind] and self.held[kind].args[-1]
        if kind == "restart":
            return run("systemctl", "restart", target)
        if kind == "reload":
            return run("systemctl", "daemon-reload") if "systemd" in target else run("systemctl", "reload", target)
        if kind == "reexec":
            return run("systemctl", "daemon-reexec")
        if kind == "full":
            self.held["full"] = fill(target)
            if target == "blocks of /var":
                flood_journal()
            return self.held["full"]
        if kind == "descriptors":
            self.held["descriptors"] = limit_descriptors(target)
            return list(self.held["descriptors"])
        if kind == "tasks":
            self.held["tasks"] = target
            return limit_tasks(target)
        if kind == "memory":
            self.held["memory"] = target
            return limit_memory(target)
        if kind == "ids":
            self.held["ids"] = limit_ids()
            return self.held["ids"]
        if kind == "open files":
            self.held[kind] = limit_files()
            return self.held[kind]
        if kind == "nftables":
            self.held[kind] = refuse_nftables()
            return self.held[kind] and self.held[kind].args[-1]
        if kind == "connections":
            self.held[kind] = connect_to_manager() if target == "PID 1" else connect_to_bus()
            return len(self.held[kind])
        if kind == "network":
            return run("sh", "-c", NETWORK[target])
        if kind in INJECTED:
            self.held[kind] = inject(target, INJECTED[kind])
            return self.held[kind] and self.held[kind].args[-1]
        if kind == "clock":
            self.held["clock"] = step_clock(STEPS_S[target])
            return self.held["clock"]
        raise ValueError(kind)

    def end(self, kind):
        held = self.held.pop(kind, None)
        if kind == "freeze":
            send(held, signal.SIGCONT)
        elif kind == "full":
            empty(held)
        elif kind == "descriptors":
            restore_descriptors(held)
        elif kind == "tasks":
            most = {"nbagent.slice": "infinity"}.get(held, "8192")
            run("systemctl", "set-property", "--runtime", held, f"TasksMax={most}")
            run("systemctl", "revert", held)
        elif kind == "memory":
            run("systemctl", "set-property", "--runtime", held, "MemoryMax=infinity")
            run("systemctl", "revert", held)
        elif kind == "ids":
            PID_MAX.write_text(held)
        elif kind == "open files":
            FILE_MAX.write_text(held)
        elif kind == "connections":
            for connection in held:
                connection.close()
        elif kind == "clock":
            step_clock(-held)
        elif isinstance(held, subprocess.Popen):
            held.terminate()
            held.wait(30)


def cgroups():
    """The cgroups of slots and zygotes by name."""
    names = set()
    for tree in CGROUPS:
        # Without an error for a cgroup that is removed meanwhile, as os.walk() does it.
        for path, directories, _ in os.walk(tree):
            if ".slice" in path and "nbagent" in path:
                names.update(name for name in directories if name.startswith("nbagent-zygote@")
                             or (name.startswith("nbagent-") and name.endswith(".scope")))
    return sorted(names)


def records():
    found = {}
    for directory in SLOTS.iterdir():
        if not directory.is_dir():
            continue
        try:
            slot = json.loads((directory / "slot.json").read_text())
            found[directory.name] = {
                "state": slot["state"], "key": slot.get("key"), "pid": slot.get("pid"),
                "uid": [slot["id_base"], slot["uid"]], "addresses": slot.get("addresses"),
                "memory": slot["limits"]["memory_bytes"],
            }
        except (OSError, ValueError, KeyError):
            found[directory.name] = None
    return found


def namespaces():
    """The number of namespaces of each kind in which processes are."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            for kind in ("mnt", "net", "pid", "ipc", "uts", "user", "cgroup"):
                with contextlib.suppress(OSError):
                    found.setdefault(kind, set()).add(os.readlink(f"/proc/{entry}/ns/{kind}"))
    return {kind: len(those) for kind, those in found.items()}


def descriptors():
    """The number of open descriptors of each service, of all of its processes."""
    found, by_unit = {}, processes()
    for name in SERVICES:
        total = 0
        for pid in by_unit.get(f"{name}.service", []):
            with contextlib.suppress(OSError):
                total += len(os.listdir(f"/proc/{pid}/fd"))
        found[name] = total
    return found


def kinds_of_descriptors(pid):
    found = {}
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            link = re.sub(r"\d+", "N", os.readlink(f"/proc/{pid}/fd/{entry}"))
            link = re.sub(r"/slots/[a-zN-]+", "/slots/SLOT", link)
            found[link] = found.get(link, 0) + 1
    return found


def network():
    """Faults of the network of slots: rules, elements of open slots, flags and routes of interfaces."""
    found, rules = [], run("nft", "list", "table", "inet", "nbagent")
    found += [f"no {text}" for text in ("iifname \"nb-*\" masquerade", "10.0.0.0/8") if text not in rules]
    for link in json.loads(run("ip", "-j", "-details", "link", "show") or "[]"):
        state, *addresses = (link.get("ifalias") or "").split() or [""]
        if not link["ifname"].startswith("nb-") or state not in ("internet", "closed"):
            continue
        routes = run("ip", "route", "show", "dev", link["ifname"])
        for address in (address for address in addresses if ":" not in address):
            found += [f"no route to {address}"] if address not in routes else []
            is_open = f'"{link["ifname"]}" . {address}' in rules
            found += [f"{state} {link['ifname']} has element: {is_open}"] if is_open != (state == "internet") else []
        found += [f"flags of {link['ifname']}"] if not {"UP", "NOARP"} <= set(link["flags"]) else []
    return found


def census():
    scopes = run("systemctl", "list-units", "--all", "--plain", "--no-legend", "nbagent-*.scope")
    by_unit = processes()
    mine = {}
    for unit, pids in by_unit.items():
        if unit.startswith("nbagent"):
            mine[unit] = len(pids)
    supervisor = [pid for pid in by_unit.get("nbagent.service", []) if "nbagent.supervisor" in command(pid)]
    strays = [
        f"{pid} in {unit}: {text}" for unit, pids in by_unit.items() for pid in pids
        if not unit.startswith("nbagent") and re.search(r"nbagent\.(runtime|content)|jupyter", text := command(pid))
    ]
    links = [line.split()[1].partition("@")[0].rstrip(":") for line in run("ip", "-o", "link").splitlines()]
    return {
        "records": records(),
        "files": sorted(str(path.relative_to(SLOTS)) for path in SLOTS.glob("*") if not path.is_dir()),
        "half": sorted(str(path.relative_to(SLOTS)) for path in SLOTS.glob("*/*.new")),
        "scopes": sorted(line.split()[0] for line in scopes.splitlines()),
        "cgroups": cgroups(),
        "processes": mine,
        "strays": strays,
        "zombies": zombies(),
        "journals": sorted(path.name for path in JOURNALS.glob("*/user-*.journal")),
        "mounts": [
            line.split()[4] for line in Path("/proc/1/mountinfo").read_text().splitlines() if "/nbagent" in line
        ],
        "links": sorted(link for link in links if link.startswith("nb-")),
        "network": network(),
        "netns": run("ip", "netns", "list").split(),
        "namespaces": namespaces(),
        "descriptors": descriptors(),
        "supervisor": kinds_of_descriptors(supervisor[0]) if supervisor else {},
        "stored": run("systemctl", "show", "-P", "NFileDescriptorStore", "nbagent.service").strip(),
        "failed": run("systemctl", "list-units", "--failed", "--plain", "--no-legend", "nbagent*").splitlines(),
        "transient": sorted(
            path.name for tree in ("/run/systemd/transient", "/run/systemd/system.control")
            for path in Path(tree).glob("nbagent*")
        ),
        "units": int(run("systemctl", "show", "-P", "NNames").strip() or 0),
    }


def load():
    """Memory, tasks and descriptors by service, and counts of the host."""
    found, by_unit = {}, processes()
    for name in SERVICES:
        rss = tasks = files = 0
        for pid in by_unit.get(f"{name}.service", []):
            with contextlib.suppress(OSError, ValueError):
                # Not PSS, which grows while processes of a fork write to pages that they shared.
                text = Path(f"/proc/{pid}/status").read_text()
                rss += int(re.search(r"^VmRSS:\s+(\d+)", text, re.M)[1])
                tasks += len(os.listdir(f"/proc/{pid}/task"))
                files += len(os.listdir(f"/proc/{pid}/fd"))
        found[name] = {"rss_kib": rss, "tasks": tasks, "descriptors": files}
    pid1 = Path("/proc/1/status").read_text()
    found["pid 1"] = {
        "rss_kib": int(re.search(r"VmRSS:\s+(\d+)", pid1)[1]), "descriptors": len(os.listdir("/proc/1/fd")),
    }
    status = os.statvfs(RUN)
    # journald bounds its own files.
    journal = list((RUN / "log").rglob("*"))
    journal_kib = sum(path.stat().st_blocks for path in journal) // 2
    found["host"] = {
        "cgroups": sum(1 for tree in CGROUPS for _ in Path(tree).glob("**/nbagent*")),
        "mounts": len(Path("/proc/1/mountinfo").read_text().splitlines()),
        # Without those of the last sessions, whose number is bounded.
        "run_files": status.f_files - status.f_ffree - len(journal) - len(os.listdir("/run/nbagent/sessions")),
        "run_kib": (status.f_blocks - status.f_bfree) * status.f_frsize // 1024 - journal_kib,
        "processes": sum(map(len, by_unit.values())),
        "units": int(run("systemctl", "show", "-P", "NNames").strip() or 0),
    }
    return found


def main():
    faults = Faults()
    try:
        serve(faults)
    finally:
        # A run that was interrupted leaves none behind for the next run on this host.
        for kind in list(faults.held):
            faults.end(kind)


def serve(faults):
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "begin":
                result = faults.begin(request["kind"], request["target"])
            elif request["do"] == "end":
                result = faults.end(request["kind"])
            else:
                result = {"census": census, "load": load}[request["do"]]()
            response = {"ok": result}
        except Exception:
            response = {"error": traceback.format_exc()}
        print(json.dumps(response), flush=True)


if __name__ == "__main__":
    main()
