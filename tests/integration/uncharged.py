# SPDX-License-Identifier: BSD-3-Clause
"""Ways in which a program can make the kernel hold memory, one function each. Runs inside slots, as a cell of a kernel.

`hold(name)` takes AMOUNT bytes of one kind, or as many as the kernel permits, and returns "held N" or the refusal as
text; `drop()` frees it. The caller on the host (test_uncharged.py) compares the growth of the kernel's memory with
the growth of the slot's cgroup. A try is bounded, because the kernel of a test host is the kernel of the whole machine.

Standard library only, and a single file, because its text is sent to a kernel as a cell.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import select
import signal
import socket
import struct
import tempfile
import threading
import time
import warnings

AMOUNT = 32 << 20
LIBC = ctypes.CDLL(None, use_errno=True)
KINDS = {}
HELD = contextlib.ExitStack()
warnings.simplefilter("ignore")  # fork() in a process with threads
CHUNK = bytes(60000)
SOCK_OPTIONS = {"SO_ATTACH_FILTER": 26, "SO_ATTACH_REUSEPORT_CBPF": 51}
SO_TIMESTAMPING, TX_SOFTWARE, SOFTWARE, ID, TX_SCHED, OPT_TSONLY = 37, 1 << 1, 1 << 4, 1 << 7, 1 << 8, 1 << 11


def kind(name, *arguments):
    """Registers a function as the way `name` to take memory."""
    def register(function):
        KINDS[name] = lambda: function(*arguments)
        return function
    return register


def open_socket(*triple):
    """A socket that `drop` closes, with a receive buffer as large as the kernel permits."""
    end = HELD.enter_context(socket.socket(*triple))
    end.setblocking(False)
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    return end


def raised(result):
    """Raises OSError for -1 of a C function."""
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def temporary_file(flags=os.O_RDWR):
    """A descriptor of an empty file without a name; `drop` closes it."""
    made, path = tempfile.mkstemp()
    fd = os.open(path, flags)
    os.close(made)
    os.unlink(path)
    HELD.callback(os.close, fd)
    return fd


def until_refused(step, size, most=AMOUNT):
    """Repeats a step that takes `size` bytes until `most` are taken or a buffer is full; the bytes taken."""
    taken = 0
    with contextlib.suppress(BlockingIOError):
        while taken < most:
            step()
            taken += size
    return taken


def children(function, count):
    """Runs `function` in `count` child processes, which stay until `drop`. Raises the first OSError of a child."""
    for _ in range(count):
        ready, report = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ready)
            try:
                os.write(report, str(function()).encode() or b"0")
            except OSError as error:
                os.write(report, f"-{error.errno}".encode())
            signal.pause()
            os._exit(0)
        os.close(report)
        HELD.callback(os.waitpid, pid, 0)
        HELD.callback(os.kill, pid, signal.SIGKILL)
        said = int(os.read(ready, 20))
        os.close(ready)
        if said < 0:
            raise OSError(-said, os.strerror(-said))
    return said


# --- sockets ---


def datagrams_of_netlink(protocol):
    receiver, sender = (open_socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) for _ in range(2))
    receiver.bind((0, 0))
    taken, to = 0, receiver.getsockname()[0]
    while taken < AMOUNT:
        try:
            sender.sendto(CHUNK, (to, 0))
            taken += len(CHUNK)
        except (BlockingIOError, ConnectionRefusedError):
            receiver = open_socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
            receiver.bind((0, 0))
            to = receiver.getsockname()[0]
            sender.sendto(CHUNK, (to, 0))
    return taken


for _number in range(23):
    kind(f"netlink {_number}", _number)(datagrams_of_netlink)


@kind("acknowledgements of netlink")
def acknowledgements_of_netlink():
    # An error's acknowledgement has the whole request, which here is of an unknown type.
    request = struct.pack("=IHHII", 16 + len(CHUNK), 0xFFF0, 0x5, 1, 0) + CHUNK

    def fill():
        end = open_socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        with contextlib.suppress(OSError):
            for _ in range(64):
                end.send(request)
    return until_refused(fill, 1 << 19)


@kind("datagrams of UDP")
def datagrams_of_udp():
    sender = open_socket(socket.AF_INET, socket.SOCK_DGRAM)

    def fill():
        receiver = open_socket(socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind(("127.0.0.1", 0))
        for _ in range(8):
            sender.sendto(CHUNK, receiver.getsockname())
    return until_refused(fill, 8 * len(CHUNK))


def error_queues_of_udp(by_option, only_stamps):
    flags = TX_SOFTWARE | TX_SCHED
    options = flags | SOFTWARE | (ID | OPT_TSONLY if only_stamps else 0)

    def fill():
        end = open_socket(socket.AF_INET, socket.SOCK_DGRAM)
        end.connect(peer.getsockname())
        if by_option:
            end.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, options)
        control = [] if by_option else [(socket.SOL_SOCKET, SO_TIMESTAMPING, struct.pack("I", flags))]
        for _ in range(8):
            end.sendmsg([CHUNK], control)
        ends.append(end)
    peer, ends = open_socket(socket.AF_INET, socket.SOCK_DGRAM), []
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that the peer's queue does not hold the data
    peer.bind(("127.0.0.1", 0))
    until_refused(fill, 8 * len(CHUNK))
    # The pages of these queues are in no counter of the kernel's memory, so their sizes are read from the sockets.
    inodes = {str(os.fstat(end.fileno()).st_ino) for end in ends}
    with open("/proc/net/udp") as table:
        queued = [line.split()[4].split(":")[1] for line in table if line.split()[9] in inodes]
    held = sum(int(text, 16) for text in queued)
    if not held:
        raise BlockingIOError(errno.EAGAIN, "nothing was queued")
    return held


kind("error queues of UDP by an option", True, False)(error_queues_of_udp)
kind("error queues of UDP by an option, time stamps only", True, True)(error_queues_of_udp)
kind("error queues of UDP by a control message", False, False)(error_queues_of_udp)


def streams(accepted):
    server = HELD.enter_context(socket.socket())
    with contextlib.suppress(OSError):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    server.bind(("127.0.0.1", 0))
    server.listen(1000)

    def fill():
        client = HELD.enter_context(socket.socket())
        client.settimeout(2)
        client.connect(server.getsockname())
        if accepted:
            HELD.enter_context(server.accept()[0])
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(8):
                client.send(CHUNK)
    return until_refused(fill, 8 * len(CHUNK))


kind("streams of TCP", True)(streams)
kind("streams of TCP that are not accepted", False)(streams)


@kind("connections of TCP that are not accepted")
def connections_that_are_not_accepted():
    def fill():
        server = HELD.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(4096)
        for _ in range(100):
            client = HELD.enter_context(socket.socket())
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(server.getsockname())
    return until_refused(fill, 400 << 10, AMOUNT // 2)


@kind("connections of TCP in TIME_WAIT")
def connections_in_time_wait():
    server = HELD.enter_context(socket.socket())
    server.bind(("0.0.0.0", 0))
    server.listen(100)
    port = server.getsockname()[1]
    for number in range(40_000):
        with socket.create_connection((f"127.0.0.{1 + number // 20_000}", port)):
            accepted = server.accept()[0]
        with accepted:
            accepted.recv(1)
    return 40_000 * 256


def corked_datagrams_of_udp(by_option):
    def fill():
        end = open_socket(socket.AF_INET, socket.SOCK_DGRAM)
        if by_option:
            end.setsockopt(socket.IPPROTO_UDP, 1, 1)  # UDP_CORK
        end.sendto(CHUNK, 0 if by_option else socket.MSG_MORE, ("127.0.0.1", 9))
    return until_refused(fill, len(CHUNK))


kind("corked datagrams of UDP by an option", True)(corked_datagrams_of_udp)
kind("corked datagrams of UDP by a flag", False)(corked_datagrams_of_udp)


@kind("datagrams of unix")
def datagrams_of_unix():
    def fill():
        one, _ = (HELD.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
        one.setblocking(False)
        one.send(CHUNK)
    return until_refused(fill, len(CHUNK))


@kind("descriptors in flight")
def descriptors_in_flight():
    taken = 0
    with contextlib.suppress(OSError), open("/dev/null") as file:  # ETOOMANYREFS: RLIMIT_NOFILE of them for each user
        while taken < AMOUNT:
            one, _ = (HELD.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    socket.send_fds(one, [b"x"], [file.fileno()] * 250)
                    taken += 250 * 8
    return taken


def socket_filters(option):
    instructions = (struct.pack("HBBI", 0x00, 0, 0, 0x12345678) * 4095) + struct.pack("HBBI", 0x06, 0, 0, 0)
    buffer = ctypes.create_string_buffer(instructions)
    program = struct.pack("HxxxxxxP", 4096, ctypes.addressof(buffer))

    def fill():
        end = open_socket(socket.AF_INET, socket.SOCK_DGRAM)
        if option == "SO_ATTACH_REUSEPORT_CBPF":
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            end.bind(("127.0.0.1", 0))
        end.setsockopt(socket.SOL_SOCKET, SOCK_OPTIONS[option], program)
    try:
        return until_refused(fill, 48 << 10)
    finally:
        del buffer


for _name in SOCK_OPTIONS:
    kind(_name, _name)(socket_filters)


@kind("memberships of multicast groups")
def memberships_of_multicast_groups():
    groups = iter(range(1 << 24))

    def fill():
        end = open_socket(socket.AF_INET, socket.SOCK_DGRAM)
        with contextlib.suppress(OSError):  # ENOBUFS: igmp_max_memberships
            for _ in range(20):
                group = struct.pack("=4s4si", struct.pack(">I", (239 << 24) + next(groups)), bytes(4), 1)
                end.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
    return until_refused(fill, 20 << 8, 16 << 20)


@kind("memberships of IPv6 groups")
def memberships_of_ipv6_groups():
    def fill():
        end = open_socket(socket.AF_INET6, socket.SOCK_DGRAM)
        for _ in range(300):
            group = bytes([0xFF, 1]) + os.urandom(14) + struct.pack("=I", 1)
            end.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
    return until_refused(fill, 300 * 256, 8 << 20)


def keys_of_tcp():
    def fill():
        end = HELD.enter_context(socket.socket())
        for number in range(50):
            address = struct.pack("=HH4s", socket.AF_INET, 0, struct.pack(">I", 0x0A000000 + number)) + bytes(120)
            end.setsockopt(socket.IPPROTO_TCP, 14, address + struct.pack("=HHI", 0, 8, 0) + bytes(80))
    return until_refused(fill, 50 * 200, 8 << 20)


kind("keys of TCP-MD5")(keys_of_tcp)


@kind("queues of errors")
def queues_of_errors():
    def fill():
        end = open_socket(socket.AF_INET, socket.SOCK_DGRAM)
        end.setsockopt(socket.IPPROTO_IP, socket.IP_RECVERR if hasattr(socket, "IP_RECVERR") else 11, 1)
        end.connect(("127.0.0.1", 9))
        for _ in range(500):
            with contextlib.suppress(ConnectionRefusedError):
                end.send(bytes(500))
    return until_refused(fill, 500 << 10, 8 << 20)


# --- files and descriptors ---


@kind("descriptors that poll waits for")
def descriptors_that_poll_waits_for():
    count = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 1 << 16) - 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 1,) * 2)
    fd = os.eventfd(0)
    HELD.callback(os.close, fd)
    HELD.callback(os.write, fd, bytes([1, *bytes(7)]))  # ends the waits
    waits = struct.pack("ihh", fd, select.POLLIN, 0) * count
    raised(LIBC.poll(waits, count, 0))
    for _ in range(AMOUNT // (72 * count) + 1):
        threading.Thread(target=LIBC.poll, args=(waits, count, -1), daemon=True).start()
    time.sleep(2)
    return AMOUNT


@kind("pipes")
def pipes():
    def fill():
        ends = os.pipe()
        for fd in ends:
            HELD.callback(os.close, fd)
        os.set_blocking(ends[1], False)
        os.write(ends[1], CHUNK)
    return until_refused(fill, len(CHUNK))


@kind("locks of file ranges")
def locks_of_file_ranges():
    count = 0
    while count < AMOUNT // 200:
        file = temporary_file()
        for number in range(500):
            lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 2 * number, 1, 0)
            fcntl.fcntl(file, fcntl.F_SETLK, lock)
        count += 500
    return count * 200


@kind("leases")
def leases():
    def fill():
        fd = temporary_file(os.O_RDONLY)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    return until_refused(fill, 1 << 10, 4 << 20)


@kind("watches of epoll")
def watches_of_epoll():
    fds = [os.eventfd(0) for _ in range(500)]
    for fd in fds:
        HELD.callback(os.close, fd)

    def fill():
        waiting = HELD.enter_context(select.epoll())
        for fd in fds:
            waiting.register(fd)
    return until_refused(fill, 500 * 200)


@kind("watches of inotify")
def watches_of_inotify():
    directory = HELD.enter_context(tempfile.TemporaryDirectory())
    for number in range(1000):
        with open(f"{directory}/{number}", "w"):
            pass
    count = 0
    for _ in range(100):
        fd = LIBC.inotify_init1(os.O_CLOEXEC)
        if fd < 0:
            break
        HELD.callback(os.close, fd)
        for number in range(1000):
            if LIBC.inotify_add_watch(fd, f"{directory}/{number}".encode(), 2) < 0:
                break
            count += 1
    return count * 100


@kind("events of inotify")
def events_of_inotify():
    directory = HELD.enter_context(tempfile.TemporaryDirectory())
    name = f"{directory}/{'n' * 200}"
    fds = [fd for fd in (LIBC.inotify_init1(os.O_CLOEXEC) for _ in range(20)) if fd >= 0]
    for fd in fds:
        HELD.callback(os.close, fd)
        raised(LIBC.inotify_add_watch(fd, directory.encode(), 0xFFF))
    for _ in range(3000):
        with open(name, "w"):
            pass
        os.unlink(name)
    return len(fds) * 3000 * 4 * 280


@kind("dentries")
def dentries():
    def fill():
        for number in range(1000):
            with contextlib.suppress(FileNotFoundError):
                os.stat(f"/usr/{os.getpid()}-{id(fill)}-{next(numbers)}-{number}")
    numbers = iter(range(1 << 20))
    return until_refused(fill, 1000 * 256)


@kind("attributes of files")
def attributes_of_files():
    def fill():
        file = temporary_file()
        for number in range(16):
            os.setxattr(file, f"user.{number}", bytes(255))
    return until_refused(fill, 16 << 8, 8 << 20)


def access_lists_of_files(count):
    # Version 2, and entries of tag, permissions, id: the owner, users, the group, the mask, others.
    entries = [(1, 7, -1), *[(2, 7, 1000)] * (count - 4), (4, 7, -1), (16, 7, -1), (32, 7, -1)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)

    def fill():
        os.setxattr(temporary_file(), "system.posix_acl_access", value)
    return until_refused(fill, 8 * count, min(AMOUNT, 16000 * 8 * count))


kind("access lists of files", 8191)(access_lists_of_files)
kind("short access lists of files", 31)(access_lists_of_files)


@kind("memory files")
def memory_files():
    def fill():
        fd = os.memfd_create("x")
        HELD.callback(os.close, fd)
        os.write(fd, bytes(1 << 20))
    return until_refused(fill, 1 << 20)


@kind("secret memory")
def secret_memory():
    fd = raised(LIBC.syscall(447, 0))
    HELD.callback(os.close, fd)
    os.ftruncate(fd, 8 << 20)
    with mmap.mmap(fd, 8 << 20) as pages:
        for offset in range(0, 8 << 20, 4096):
            pages[offset] = 1
    return 8 << 20


# --- processes ---


@kind("timers")
def timers():
    def fill():
        timer = ctypes.c_void_p()
        raised(LIBC.timer_create(1, None, ctypes.byref(timer)))
        HELD.callback(LIBC.syscall, 226, timer)
    with contextlib.suppress(OSError):
        until_refused(fill, 300)
    return 4096 * 300


@kind("timers of descriptors")
def timers_of_descriptors():
    def fill():
        HELD.callback(os.close, raised(LIBC.timerfd_create(1, 0)))
    with contextlib.suppress(OSError):
        return until_refused(fill, 1000)
    return 0


@kind("queued signals")
def queued_signals():
    number = signal.SIGRTMIN + 1

    def queue():
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})
        count = 0
        while count < 1 << 17 and LIBC.sigqueue(os.getpid(), number, 0) == 0:
            count += 1
        return count
    return children(queue, 1) * 80


@kind("message queues")
def message_queues():
    names = [b"/uncharged%d" % number for number in range(64)]
    HELD.callback(lambda: [LIBC.mq_unlink(name) for name in names])
    count = 0
    for name in names:
        queue = LIBC.mq_open(name, os.O_CREAT | os.O_RDWR | os.O_NONBLOCK, 0o600, None)
        if queue < 0:
            break
        HELD.callback(os.close, queue)
        while LIBC.mq_send(queue, bytes(8000), 8000, 0) == 0:
            count += 1
    return count * 8192


@kind("message queues of System V")
def message_queues_of_system_v():
    def fill():
        queue = raised(LIBC.msgget(0, 0o1600))
        HELD.callback(LIBC.msgctl, queue, 0, None)
        message = struct.pack("l", 1) + bytes(8000)
        while LIBC.msgsnd(queue, message, 8000, 0o4000) == 0:
            pass
    with contextlib.suppress(OSError):
        return until_refused(fill, 16384)
    return 0


@kind("semaphores of System V")
def semaphores_of_system_v():
    def fill():
        HELD.callback(LIBC.semctl, raised(LIBC.semget(0, 10000, 0o1600)), 0, 0)
    return until_refused(fill, 10000 * 64)


@kind("undo lists of System V semaphores")
def undo_lists_of_system_v_semaphores():
    identifier = raised(LIBC.semget(0, 16000, 0o1600))
    HELD.callback(LIBC.semctl, identifier, 0, 0)
    operation = struct.pack("Hhh", 0, 1, 0x1000)
    return children(lambda: raised(LIBC.semop(identifier, operation, 1)), 100) or 100 * 32000


@kind("memory policies")
def memory_policies():
    def fill():
        pages = mmap.mmap(-1, 4096 * 2000)
        HELD.callback(pages.close)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        nodes = ctypes.c_ulong(1)
        for number in range(0, 2000, 2):
            raised(LIBC.syscall(237, ctypes.c_ulong(start + 4096 * number), 4096, 2, ctypes.byref(nodes), 64, 0))
    return until_refused(fill, 1000 * 264, 8 << 20)


@kind("system call filters")
def system_call_filters():
    instructions = (struct.pack("HBBI", 0x00, 0, 0, 0x12345678) * 4090) + struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)

    def load():
        buffer = ctypes.create_string_buffer(instructions)
        program = struct.pack("HxxxxxxP", 4091, ctypes.addressof(buffer))
        for _ in range(6):
            raised(LIBC.prctl(22, 2, program, 0, 0))
        return 0
    children(load, 40)
    return 40 * 6 * (80 << 10)


@kind("threads")
def threads():
    waiting = threading.Event()
    HELD.callback(waiting.set)
    for _ in range(100):
        threading.Thread(target=waiting.wait, daemon=True).start()
    return 100 * 40000


def hold(name):
    """Takes memory of one kind. Returns "held BYTES", an estimate, or the refusal."""
    try:
        return f"held {KINDS[name]()}"
    except OSError as error:
        drop()
        return f"refused: {errno.errorcode.get(error.errno, error.errno)}"


def drop():
    """Frees it."""
    HELD.close()
