# SPDX-License-Identifier: BSD-3-Clause
"""Attempts of a hostile program to leave a slot, each against one barrier. Runs inside slots, under an image's Python.

An attempt is a generator: it yields a description of what succeeded, and nothing when the barrier held.
`tried(decoys)` runs all of them. The decoys are objects of the host that the test made:

    {"abstract": name of an abstract socket, "shm": key of a System V segment, "pid": a process, "file": a path,
     "word": a word in that file and in that process's environment, in two halves so that this text does not match,
     "hostname": the host's, "storage": the slot's storage in bytes}

Standard library only, and a single file, because its text is also sent to a kernel as a cell.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import socket
import stat

LIBC = ctypes.CDLL(None, use_errno=True)
TRIES = []
IO_SETUP, IO_DESTROY = 206, 207
NAMESPACE_BITS = {
    "mnt": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
    "pid": 0x20000000, "net": 0x40000000,
}


def attempt(function):
    """Adds an attempt to the list."""
    TRIES.append(function)
    return function


def call(number, *arguments):
    """A system call by its number on x86_64; its errno, or 0 for success."""
    ctypes.set_errno(0)
    result = LIBC.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments))
    return ctypes.get_errno() if result == -1 else 0


def refused(code):
    """Whether an errno means that the call is not permitted or not implemented, not that its arguments are invalid."""
    return code in (
        errno.EPERM, errno.ENOSYS, errno.EACCES, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.ENOPROTOOPT
    )


def text(path):
    """A file's text; "" when it cannot be read."""
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def mounts():
    """(mount point, file system type, source, options) of every mount in this mount namespace."""
    found = []
    for line in text("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, source, options = after.split(" ", 2)
        found.append((before.split()[4], kind, source, before.split()[5] + "," + options))
    return found


def numbered():
    """The pids in /proc."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


# --- credentials ---


@attempt
def to_be_root_of_the_host(decoys):
    ranges = [line.split() for line in text("/proc/self/uid_map").splitlines()]
    if not ranges or any(int(outside) < 65536 for _, outside, _ in ranges):
        yield f"ids of the host: {ranges}"


@attempt
def to_be_root_of_the_slot(decoys):
    if os.getuid() == 0 or os.getgid() == 0 or 0 in os.getgroups():
        yield f"uid {os.getuid()}, gid {os.getgid()}, groups {os.getgroups()}"
    for name, change in (("setuid", os.setuid), ("setgid", os.setgid)):
        try:
            change(0)
            yield f"{name}(0)"
        except OSError:
            pass


@attempt
def to_hold_a_capability(decoys):
    for line in text("/proc/self/status").splitlines():
        if line.startswith("Cap") and int(line.split()[1], 16):
            yield line


@attempt
def to_gain_by_a_setuid_file(decoys):
    if "NoNewPrivs:\t1" not in text("/proc/self/status"):
        yield "no_new_privs is not set"
    for point, kind, _, options in mounts():
        if kind in ("overlay", "tmpfs") and "nosuid" not in options.split(","):
            yield f"{point} is not nosuid"


@attempt
def to_be_unfiltered(decoys):
    if "Seccomp:\t2" not in text("/proc/self/status"):
        yield "no seccomp filter"


# --- system calls ---


@attempt
def to_make_a_namespace(decoys):
    for name, bit in NAMESPACE_BITS.items():
        child = os.fork()
        if child == 0:
            os._exit(0 if refused(call(272, bit)) else 1)  # unshare
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            yield name
    stack = ctypes.create_string_buffer(65536)
    top = ctypes.c_void_p(ctypes.addressof(stack) + 65536)
    entry = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: 0)
    pid = LIBC.clone(entry, top, NAMESPACE_BITS["user"] | signal.SIGCHLD, None)
    if pid > 0:
        os.waitpid(pid, 0)
        yield "clone with CLONE_NEWUSER"


@attempt
def to_make_a_system_call_that_nobody_needs(decoys):
    unneeded = {
        "io_uring_setup": 425, "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298,
        "userfaultfd": 323, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "setns": 308,
        "open_by_handle_at": 304, "name_to_handle_at": 303, "kexec_load": 246, "init_module": 175,
        "finit_module": 313, "delete_module": 176, "swapon": 167, "reboot": 169, "syslog": 103, "acct": 163,
        "quotactl": 179, "sethostname": 170, "settimeofday": 164, "fanotify_init": 300, "kcmp": 312, "iopl": 172,
        "ioperm": 173, "fsopen": 430, "open_tree": 428, "move_mount": 429, "mount_setattr": 442, "vhangup": 153,
        "clone3": 435, "lookup_dcookie": 212, "move_pages": 279, "vmsplice": 278,
    }
    # Invalid arguments, so that a call that passes the filter fails with another errno than the filter's.
    through = [name for name, number in unneeded.items() if not refused(call(number, -1, -1, -1, -1, -1))]
    if through:
        yield ", ".join(through)


@attempt
def to_open_a_socket_of_a_rare_family(decoys):
    for name, family, kind in (("AF_VSOCK", 40, 1), ("AF_ALG", 38, 5), ("AF_PACKET", 17, 3), ("AF_KEY", 15, 3),
                               ("AF_XDP", 44, 3), ("AF_RDS", 21, 5), ("AF_TIPC", 30, 5), ("AF_BLUETOOTH", 31, 3)):
        code = call(41, family, kind, 0)
        if not refused(code):
            yield f"{name}: {errno.errorcode.get(code, 'opened')}"
    # Raw sockets need CAP_NET_RAW.
    if not refused(call(41, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)):
        yield "SOCK_RAW"


@attempt
def to_open_a_socket_of_a_rare_protocol(decoys):
    # The kernel's answer to a protocol that it does not have is also that of the filter.
    for family in (socket.AF_INET, socket.AF_INET6):
        for name, kind, protocol in (("MPTCP", 1, 262), ("SCTP", 1, 132), ("DCCP", 6, 33), ("UDP-Lite", 2, 136),
                                     ("ICMP", 2, 1), ("ICMPv6", 2, 58), ("SMC", 1, 256)):
            if not refused(call(41, family, kind, protocol)):
                yield name
    for protocol in range(32):
        if not refused(call(41, socket.AF_NETLINK, socket.SOCK_RAW, protocol)):
            yield f"netlink {protocol}"
    if not refused(call(53, 30, 5, 0, ctypes.addressof(ctypes.create_string_buffer(8)))):
        yield "a pair of TIPC"


@attempt
def to_make_the_kernel_compile_a_socket_filter(decoys):
    instruction = ctypes.create_string_buffer(b"\x06\0\0\0\0\0\0\0")
    program = ctypes.create_string_buffer(ctypes.c_ulong(1).value.to_bytes(8, "little")
                                          + ctypes.addressof(instruction).to_bytes(8, "little"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        for name, option in (("SO_ATTACH_FILTER", 26), ("SO_ATTACH_REUSEPORT_CBPF", 51)):
            for high in (0, 1 << 32):
                if not refused(call(54, end.fileno(), 1, option | high, ctypes.addressof(program), 16)):
                    yield f"{name} {high:#x}"


@attempt
def to_make_the_kernel_compile_a_system_call_filter(decoys):
    # EFAULT is the kernel's errno for this pointer.
    if call(157, 22, 2, 8) == errno.EFAULT or call(317, 1, 0, 8) == errno.EFAULT:
        yield "seccomp"


@attempt
def to_queue_copies_of_sent_datagrams(decoys):
    # On a kernel on which the setting is one for the host, a test host in a network namespace of its own lacks it.
    if not os.path.exists("/proc/sys/net/core/tstamp_allow_data"):
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end, socket.socket(end.family, end.type) as peer:
        peer.bind(("127.0.0.1", 0))
        with contextlib.suppress(OSError):  # without loopback, and when nothing was queued
            end.connect(peer.getsockname())
            # SO_TIMESTAMPING with SOF_TIMESTAMPING_TX_SCHED and _TX_SOFTWARE
            end.sendmsg([b"x"], [(socket.SOL_SOCKET, 37, (1 << 8 | 1 << 1).to_bytes(4, "little"))])
            if end.recvmsg(100, 100, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT):
                yield "by a control message"


@attempt
def to_keep_many_connections_in_time_wait(decoys):
    limit = text("/proc/sys/net/ipv4/tcp_max_tw_buckets")
    if not limit or int(limit) > 4096:
        yield f"tcp_max_tw_buckets is {limit.strip()}"


@attempt
def to_fill_the_hosts_table_of_connections_past(decoys):
    if text("/proc/sys/net/ipv4/tcp_no_metrics_save").strip() != "1":
        yield "10,000 closed connections between addresses of loopback made 10,000 entries"


@attempt
def to_have_the_kernel_load_a_module(decoys):
    # TIOCSETD to the line discipline that a terminal has; SIOCGIFBR and SIOCSIFVLAN of sockets, by an invalid pointer.
    with contextlib.ExitStack() as opened, contextlib.suppress(OSError):  # without a terminal
        terminals = os.openpty()
        for fd in terminals:
            opened.callback(os.close, fd)
        if not refused(call(16, terminals[1], 0x5423, ctypes.addressof(ctypes.c_int(0)))):
            yield "a line discipline"
    with socket.socket() as end:
        for name, request in (("bridges", 0x8940), ("VLANs", 0x8983)):
            if not refused(call(16, end.fileno(), request, 8)):
                yield name


@attempt
def to_take_the_hosts_huge_pages(decoys):
    # mmap(2) with MAP_HUGETLB, memfd_create(2) with MFD_HUGETLB, shmget(2) with SHM_HUGETLB
    name = ctypes.create_string_buffer(b"huge")
    for number, *arguments in ((9, 0, 2 << 20, 3, 0x40022, -1, 0), (319, ctypes.addressof(name), 4),
                               (29, 0, 2 << 20, 0o5600)):
        if not refused(call(number, *arguments)):
            yield f"call {number}"


@attempt
def to_have_memory_compared_with_that_of_virtual_machines(decoys):
    if not refused(call(28, 0, 0, 12)) or not refused(call(157, 67, 1, 0, 0, 0)):
        yield "KSM"


@attempt
def to_keep_threads_of_a_core_idle(decoys):
    # PR_SCHED_CORE_CREATE for this thread; ENODEV on a processor without such threads.
    if not refused(call(157, 62, 1, 0, 0, 0)):
        yield "a cookie of core scheduling"


@attempt
def to_make_the_kernel_hold_memory_that_is_not_charged(decoys):
    # poll(2) of an invalid pointer; a datagram with MSG_MORE; a long attribute of a file that does not exist.
    if call(7, 8, 1025, 0) == errno.EFAULT:
        yield "poll"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        if not refused(call(44, end.fileno(), 0, 0, socket.MSG_MORE, 0, 0)):
            yield "MSG_MORE"
    name = ctypes.create_string_buffer(b"user.x")
    if not refused(call(188, ctypes.addressof(name), ctypes.addressof(name), ctypes.addressof(name), 256, 0)):
        yield "setxattr"


@attempt
def to_set_a_memory_policy(decoys):
    if not refused(call(237, 0, 4096, 0, 0, 0, 0)) or not refused(call(238, 0, 0, 0)):
        yield "mbind or set_mempolicy"


@attempt
def to_fill_the_hosts_table_of_flow_labels(decoys):
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as end:
        if not refused(call(54, end.fileno(), 41, 32, 0, 32)):
            yield "IPV6_FLOWLABEL_MGR"


@attempt
def to_make_a_device(decoys):
    path = f"/tmp/device-{os.getpid()}"
    for kind, number in ((stat.S_IFBLK, os.makedev(8, 0)), (stat.S_IFCHR, os.makedev(1, 1))):
        try:
            os.mknod(path, kind | 0o666, number)
            os.unlink(path)
            yield f"mknod {number:#x}"
        except OSError:
            pass


@attempt
def to_dump_core_on_the_host(decoys):
    # Only with the limit 1 the kernel writes no file and starts no program of core_pattern (core(5)).
    if resource.getrlimit(resource.RLIMIT_CORE) != (1, 1):
        yield f"RLIMIT_CORE is {resource.getrlimit(resource.RLIMIT_CORE)}"
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        yield "RLIMIT_CORE can be set"
    except OSError:
        pass


@attempt
def to_use_up_the_hosts_asynchronous_io(decoys):
    context = ctypes.c_ulong()
    if not call(IO_SETUP, 1, ctypes.addressof(context)):
        call(IO_DESTROY, context.value)
        yield "io_setup"


@attempt
def to_use_up_the_hosts_terminals(decoys):
    with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
        for _ in range(100):
            opened.callback(os.close, os.open("/dev/ptmx", os.O_RDWR))
        yield "100 terminals"


@attempt
def to_open_files_without_end(decoys):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 1 << 16:
        yield f"RLIMIT_NOFILE is {resource.getrlimit(resource.RLIMIT_NOFILE)}"


@attempt
def to_be_spared_by_the_oom_killer(decoys):
    for pid in numbered():
        with contextlib.suppress(OSError, ValueError):
            before = int(text(f"/proc/{pid}/oom_score_adj"))
            if before < 0 and pid == os.getpid():
                yield f"oom_score_adj is {before}"
            with open(f"/proc/{pid}/oom_score_adj", "w") as file:
                file.write("-1")
            yield f"oom_score_adj of pid {pid} was {before} and is -1"


# --- other processes ---


@attempt
def to_see_a_process_of_the_host(decoys):
    for pid in numbered():
        if "".join(decoys["word"]) in text(f"/proc/{pid}/cmdline") + text(f"/proc/{pid}/environ"):
            yield f"pid {pid}"
    if "systemd" in text("/proc/1/comm") or len(numbered()) > 60:
        yield f"{len(numbered())} processes, the first is {text('/proc/1/comm').strip()}"


@attempt
def to_signal_or_trace_a_process_of_the_host(decoys):
    if decoys["pid"] in numbered():
        yield f"pid {decoys['pid']} is here"
    for pid in (decoys["pid"], 1):
        # PTRACE_ATTACH
        if LIBC.ptrace(16, pid, None, None) == 0:
            LIBC.ptrace(17, pid, None, None)
            yield f"traced {pid}"
    try:
        os.kill(decoys["pid"], 0)
        yield f"signalled {decoys['pid']}"
    except OSError:
        pass


@attempt
def to_look_into_the_first_process(decoys):
    for name in ("root", "cwd", "exe", "environ", "mem", "maps", "fd"):
        path = f"/proc/1/{name}"
        try:
            if name in ("environ", "mem", "maps"):
                with open(path, "rb") as file:
                    file.read(1)
            elif name == "fd":
                os.listdir(path)
            else:
                os.stat(path + "/." if name != "exe" else path)
            yield path
        except OSError:
            pass


@attempt
def to_connect_to_an_abstract_socket_of_the_host(decoys):
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect("\0" + decoys["abstract"])
            yield "connected"
        except OSError:
            pass
    if decoys["abstract"] in text("/proc/net/unix"):
        yield "listed"


@attempt
def to_find_shared_memory_of_the_host(decoys):
    if LIBC.shmget(decoys["shm"], 0, 0) >= 0:
        yield "shmget"
    if str(decoys["shm"]) in text("/proc/sysvipc/shm").split():
        yield "listed"


@attempt
def to_use_a_network_of_the_host(decoys):
    # if_nameindex(3) needs netlink, which the filter refuses.
    names = {line.partition(":")[0].strip() for line in text("/proc/net/dev").splitlines()[2:]}
    if names - {"lo"} - set(decoys.get("interfaces", ())):
        yield f"interfaces {sorted(names)}"
    for line in text("/proc/net/tcp").splitlines()[1:] + text("/proc/net/tcp6").splitlines()[1:]:
        port = int(line.split()[1].rsplit(":", 1)[1], 16)
        if port in (9000, 9001, 8000):
            yield f"port {port} is listed"


@attempt
def to_learn_the_hosts_name_and_cgroup(decoys):
    if socket.gethostname() == decoys["hostname"]:
        yield "its hostname"
    for line in text("/proc/self/cgroup").splitlines():
        if line.split(":", 2)[2] != "/":
            yield f"its cgroup {line}"


# --- files, mounts and devices ---


@attempt
def to_read_a_file_of_the_host(decoys):
    for top in ("", "/..", "/../..", "/proc/self/root/..", "/proc/1/root", "/proc/self/cwd/../../../.."):
        if "".join(decoys["word"]) in text(top + decoys["file"]):
            yield top + decoys["file"]
    for path in ("/etc/nbagent/token", "/etc/shadow", "/run/nbagent/control.sock", "/run/nbagent/slots",
                 "/run/systemd/private", "/run/dbus/system_bus_socket", "/var/lib/nbagent", "/etc/machine-id"):
        if os.path.exists(path) and (os.access(path, os.R_OK) or path.startswith(("/run", "/var"))):
            yield path


@attempt
def to_find_a_mount_of_the_host(decoys):
    users = [line.split(":") for line in text("/etc/passwd").splitlines()]
    home = next(user[5] for user in users if user[2] == str(os.getuid()))
    # The storage's directory of the home is at /dev/home until the step Home.
    expected = ("/", "/tmp", "/var/tmp", home, "/dev", "/dev/home", "/dev/pts", "/dev/shm", "/proc", "/run/jupyter",
                "/run/nbagent/lib/nbagent", "/sys", "/sys/devices/system/cpu/online", "/sys/fs/cgroup")
    points = [point for point, _, _, _ in mounts()]
    strange = [
        point for point in points
        if point not in expected and not point.startswith("/proc/")
        and not (point.startswith("/dev/") and os.path.exists(point) and stat.S_ISCHR(os.stat(point).st_mode))
    ]
    if strange:
        yield ", ".join(strange[:5])
    for point in set(expected):
        if points.count(point) > 1:
            yield f"{point} covers another mount"


@attempt
def to_write_to_the_image_or_the_code(decoys):
    for point, kind, _, options in mounts():
        if point.startswith("/run/nbagent") and "ro" not in options.split(","):
            yield f"{point} is writable"
        if point == "/" and kind != "overlay":
            yield "the root is no overlay"
        if point == "/" and "ro" not in options.split(","):
            yield "the root is writable"


@attempt
def to_share_inodes_with_other_slots(decoys):
    # The root of a file system of the slot's own is "/", that of a bind mount a path in the file system of the host.
    for line in text("/proc/self/mountinfo").splitlines():
        root, point = line.split()[3:5]
        kind = line.partition(" - ")[2].split()[0]
        storage = kind == "tmpfs" and root in ("/home", "/tmp", "/shm", "/var-tmp")
        # Files of an overlay of the slot's own.
        limits = kind == "overlay" and root in ("/meminfo", "/online")
        own = kind in ("proc", "devpts") or storage or limits
        if root != "/" and not own and not stat.S_ISCHR(os.stat(point).st_mode):
            yield f"{point} is {root}"


@attempt
def to_evict_a_file_of_the_image_from_the_page_cache(decoys):
    def from_disk():
        return int(dict(line.split(": ") for line in text("/proc/self/io").splitlines())["read_bytes"])

    with open(os.__file__, "rb", buffering=0) as file:
        file.read()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = from_disk()
        file.seek(0)
        file.read()
        if from_disk() > before:
            yield os.__file__


@attempt
def to_write_the_hosts_disks(decoys):
    # With an invalid descriptor the kernel would fail with EBADF.
    if call(306, -1) != 0:
        yield "syncfs"


@attempt
def to_fill_more_than_the_slots_storage(decoys):
    for path in filter(os.path.exists, ("/", "/tmp", "/var/tmp", "/home/jovyan", "/run/jupyter", "/dev/shm", "/dev")):
        status = os.statvfs(path)
        if status.f_blocks * status.f_frsize > decoys["storage"]:
            yield f"{path} has {status.f_blocks * status.f_frsize} bytes"
        if status.f_files > decoys["storage"] // 4096 or not status.f_files:
            yield f"{path} has {status.f_files} inodes"


@attempt
def to_read_about_the_host_in_proc(decoys):
    for path in ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/latency_stats",
                 "/proc/interrupts"):
        if os.path.exists(path) and not stat.S_ISCHR(os.stat(path).st_mode):
            yield path
    for path in ("/proc/acpi", "/proc/scsi", "/proc/asound"):
        if os.path.isdir(path) and os.listdir(path):
            yield path


@attempt
def to_change_the_hosts_kernel(decoys):
    for path in ("/proc/sys", "/proc/irq", "/proc/bus", "/proc/fs"):
        if os.path.exists(path) and not os.statvfs(path).f_flag & os.ST_RDONLY:
            yield f"{path} is not read-only"
    if os.path.exists("/proc/sysrq-trigger") and not stat.S_ISCHR(os.stat("/proc/sysrq-trigger").st_mode):
        yield "/proc/sysrq-trigger"
    # A copy of the processors' files, and the slot's own cgroup.
    for path, known in (("/sys", {"devices", "fs"}), ("/sys/devices", {"system"}), ("/sys/fs", {"cgroup"}),
                        ("/sys/devices/system", {"cpu", "node"})):
        if os.path.isdir(path) and not set(os.listdir(path)) <= known:
            yield path
    for path in ("/sys", "/sys/fs/cgroup"):
        if os.path.isdir(path) and os.listdir(path) and not os.statvfs(path).f_flag & os.ST_RDONLY:
            yield f"{path} is not read-only"


@attempt
def to_find_a_device_that_is_not_everybodys(decoys):
    allowed = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)}
    for directory, _, names in os.walk("/dev"):
        for name in names:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            if stat.S_ISBLK(status.st_mode):
                yield path
            number = (os.major(status.st_rdev), os.minor(status.st_rdev))
            if stat.S_ISCHR(status.st_mode) and number not in allowed and number[0] != 136:
                yield path


@attempt
def to_use_a_descriptor_that_was_left_open(decoys):
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("/") and not target.startswith(
            ("/dev/null", "/dev/pts", "/proc/", "/memfd:nbagent-", "/home/", "/tmp/", "/usr/", "/dev/urandom")
        ):
            yield f"{name} is {target}"
        if target.startswith("socket:"):
            with socket.socket(fileno=os.dup(int(name))) as held:
                try:
                    peer = held.getpeername() if held.family == socket.AF_UNIX else ""
                except OSError:
                    continue  # it listens
                # The journal receives the slot's output and sends nothing.
                if peer and "journal" not in str(peer):
                    yield f"{name} is connected to {peer}"


@attempt
def to_inherit_the_hosts_environment(decoys):
    for name in ("NOTIFY_SOCKET", "LISTEN_FDS", "WATCHDOG_USEC", "INVOCATION_ID", "JOURNAL_STREAM",
                 "CREDENTIALS_DIRECTORY"):
        if name in os.environ:
            yield name
    if any("".join(decoys["word"]) in value for value in os.environ.values()):
        yield "the decoy"


def tried(decoys):
    """{name of an attempt: what succeeded, or None}"""
    results = {}
    for function in TRIES:
        try:
            results[function.__name__] = next(function(decoys), None)
        except Exception as error:
            results[function.__name__] = f"the attempt raised {error!r}"
    return results


def report(decoys):
    """Writes `tried` as JSON to descriptor 3, which is the listening socket in a slot."""
    os.write(3, json.dumps(tried(decoys)).encode())
