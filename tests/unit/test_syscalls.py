# SPDX-License-Identifier: BSD-3-Clause
"""The system call filter: compared with the default of containers, and loaded into a real process."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import seccomp as libseccomp

from nbagent.linux import mounts, openat2, seccomp
from nbagent.sandbox import syscalls
from nbagent.supervisor import sandbox_specs

# Podman's default, derived from Docker's, in Debian's golang-github-containers-common.
CONTAINERS_DEFAULT = Path("/usr/share/containers/seccomp.json")


# The filters of a slot's processes, in base64: an exec'd slot has one, a forked slot the zygote's and one more.
FILTERS = {
    "exec": lambda: [sandbox_specs.syscall_filter()],
    "fork": lambda: [sandbox_specs.forking_filter(), sandbox_specs.forked_filter()],
}


def allowed_in_containers():
    """The calls permitted to a container without capabilities, some of them for certain arguments only."""
    rules = json.loads(CONTAINERS_DEFAULT.read_text())["syscalls"]
    return {
        name
        for rule in rules
        if rule["action"] == "SCMP_ACT_ALLOW" and not (rule.get("includes") or {}).get("caps")
        for name in rule["names"]
    }


def test_the_filter_permits_no_more_than_a_containers():
    permitted = {*syscalls.ALLOWED, *(name for name, _ in syscalls.EQUAL), *syscalls.WITHOUT}
    assert len(permitted) > 250
    assert permitted - allowed_in_containers() == set()


def test_dangerous_calls_are_refused():
    dangerous = {"io_uring_setup", "unshare", "setns", "mount", "keyctl", "add_key", "bpf", "perf_event_open",
               "userfaultfd", "clone3", "open_by_handle_at", "kexec_load", "init_module", "io_setup"}
    assert not dangerous & {*syscalls.ALLOWED, *(name for name, _ in syscalls.EQUAL), *syscalls.WITHOUT}


def test_no_call_is_both_allowed_and_refused():
    assert not set(syscalls.ALLOWED) & set(syscalls.REFUSED)
    assert len(set(syscalls.ALLOWED)) == len(syscalls.ALLOWED)


PROGRAM = """
import base64, ctypes, os, resource, socket, sys, threading
sys.path.insert(0, sys.argv[1])
from nbagent.linux import mounts, openat2, seccomp
from nbagent.linux.process import PR_SET_NO_NEW_PRIVS, prctl
prctl(PR_SET_NO_NEW_PRIVS, 1)
for program in sys.stdin.read().split():
    seccomp.load(base64.b64decode(program))
libc = ctypes.CDLL(None, use_errno=True)
def errno_of(call):
    try:
        result = call()
    except OSError as error:
        return error.errno
    return ctypes.get_errno() if result == -1 else 0
"""


def after_filters(expression, filters):
    """The errno of a call in a process that has the filters; 0 for success."""
    top = str(Path(seccomp.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"{PROGRAM}print(errno_of(lambda: {expression}))", top],
        input=" ".join(filters).encode(), capture_output=True, check=True,
    )
    return int(done.stdout)


@pytest.mark.parametrize("launch", FILTERS)
@pytest.mark.parametrize(("expression", "expected"), [
    ("libc.setns(-1, 0)", errno.EPERM),
    ("libc.unshare(0x10000000)", errno.EPERM),
    ("libc.mount(b'x', b'/mnt', b'tmpfs', 0, None)", errno.EPERM),
    ("libc.syscall(425, 8, None)", errno.ENOSYS),  # io_uring_setup
    ("libc.syscall(250, 0, 0)", errno.EPERM),  # keyctl
    ("libc.syscall(323, 0)", errno.EPERM),  # userfaultfd
    ("libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)", errno.ENOSYS),  # clone with CLONE_NEWUSER
    ("socket.socket(40, 1)", errno.ENOSYS),  # AF_VSOCK
    ("socket.socket(38, 5)", errno.ENOSYS),  # AF_ALG
    ("socket.socket(17, 3)", errno.ENOSYS),  # AF_PACKET
    *((f"socket.socket({family}, socket.{kind}, {protocol}).close() or 0", 0) for family in (2, 10)
      for kind, protocol in (("SOCK_STREAM", 0), ("SOCK_STREAM", 6), ("SOCK_DGRAM", 0), ("SOCK_DGRAM", 17))),
    ("socket.socket(2, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC).close() or 0", 0),
    ("[end.close() for end in socket.socketpair(1, 5)] and 0", 0),
    ("socket.socketpair(16, 3)", errno.ENOSYS),
    ("socket.socketpair(1, 1, 17)", errno.EPROTONOSUPPORT),
    # MPTCP, UDP-Lite, SCTP, DCCP, ICMP, a raw socket, and a type and a protocol with high bits that the kernel ignores.
    *((f"socket.socket({family}, {kind}, {protocol})", errno.EPROTONOSUPPORT) for family in (2, 10)
      for kind, protocol in ((1, 262), (2, 136), (1, 132), (6, 33), (2, 1), (2, 58), (3, 1), (3, 255), (5, 132))),
    ("libc.syscall(41, 2, 2, ctypes.c_ulong(136 | 1 << 32))", errno.EPROTONOSUPPORT),
    *((f"socket.socket(16, 3, {protocol})", errno.EOPNOTSUPP) for protocol in range(23)),
    # SO_ATTACH_FILTER and its like, SO_TIMESTAMPING, SO_ZEROCOPY, TCP_MD5SIG, TCP_ULP; of IPv6 a flow label, groups.
    *((f"socket.socket(10, {kind}).setsockopt({level}, {option}, bytes(32))", errno.ENOPROTOOPT)
      for kind, level, option in (
          (2, 1, 26), (2, 1, 50), (2, 1, 51), (2, 1, 52), (2, 1, 37), (2, 1, 65), (1, 1, 60), (1, 6, 14), (1, 6, 31),
          (2, 41, 32), (2, 41, 20), (2, 41, 42), (2, 41, 46), (2, 41, 48), (2, 41, 27))),
    ("libc.syscall(54, 0, 1, ctypes.c_ulong(26 | 1 << 32), bytes(16), 16)", errno.ENOPROTOOPT),
    ("socket.socket(2, 1).setsockopt(1, socket.SO_REUSEADDR, 1) or 0", 0),
    ("socket.socket(2, 1).setsockopt(6, socket.TCP_NODELAY, 1) or 0", 0),
    ("socket.socket(10, 1).setsockopt(41, socket.IPV6_V6ONLY, 1) or 0", 0),
    ("(end := socket.socket(2, 2)).setsockopt(0, 11, 1) or end.getsockopt(0, 11)", 0),  # IP_RECVERR: no effect
    ("os.posix_fadvise(-1, 0, 0, os.POSIX_FADV_DONTNEED) or 0", 0),  # no effect
    ("os.posix_fadvise(-1, 0, 0, os.POSIX_FADV_WILLNEED) or 0", errno.EBADF),
    ("os.sync() or 0", 0),
    ("libc.syncfs(-1)", 0),
    ("libc.syscall(237, 0, 4096, 0, None, 0, 0)", errno.EPERM),  # mbind
    # Requests for which the kernel loads a module, the first also with high bits, which the kernel ignores.
    *((f"libc.ioctl(socket.socket(2, 1).fileno(), ctypes.c_ulong({request}), bytes(64))", errno.EPERM)
      for request in (0x8940, 0x8940 | 1 << 32, 0x8982, 0x8983, 0x89a0, 0x89a2)),
    ("libc.ioctl(os.openpty()[1], 0x5423, bytes(4))", errno.EPERM),  # TIOCSETD to N_TTY, which it is
    ("len(os.ttyname(os.openpty()[1])) and 0", 0),
    ("libc.syscall(9, 0, 2 << 20, 3, 0x40022, -1, 0)", errno.EPERM),  # mmap with MAP_HUGETLB
    ("libc.syscall(9, 0, 2 << 20, 3, 0x40022 | 21 << 26, -1, 0)", errno.EPERM),  # and with the size of pages
    ("libc.syscall(9, 0, 2 << 20, 3, 0x22, -1, 0) and 0", 0),
    ("libc.memfd_create(b'x', 4)", errno.EPERM),  # MFD_HUGETLB
    ("libc.shmget(0, 4096, 0o5600)", errno.EPERM),  # SHM_HUGETLB
    ("libc.syscall(28, 0, 0, 12)", errno.EPERM),  # madvise with MADV_MERGEABLE
    ("libc.syscall(28, 0, 0, 4)", 0),
    ("libc.prctl(62, 1, 0, 0, 0)", errno.EPERM),  # PR_SCHED_CORE
    ("libc.prctl(67, 1, 0, 0, 0)", errno.EPERM),  # PR_SET_MEMORY_MERGE
    ("libc.setxattr(b'/none', b'user.x', bytes(255), 255, 0)", errno.ENOENT),
    # A size above 32 bits too.
    *((f"libc.{name}({file}, b'user.x', bytes(256), ctypes.c_ulong({size}), 0)", errno.EOPNOTSUPP)
      for name, file in (("setxattr", "b'/none'"), ("lsetxattr", "b'/none'"), ("fsetxattr", 99))
      for size in (256, 1 << 32)),
    *((f"libc.{name}(0, {count}, 0, 0, 0)", errno.EINVAL)
      for name in ("poll", "ppoll") for count in (1025, 60000, 1 << 31)),
    ("libc.poll((ctypes.c_ulong * 1024)(*[0xffffffff] * 1024), 1024, 0)", 0),
    ("libc.syscall(23, 1025, 0, 0, 0, bytes(16))", errno.EINVAL),  # select
    ("libc.syscall(270, 20000, 0, 0, 0, bytes(16), 0)", errno.EINVAL),  # pselect6
    ("libc.syscall(23, 1024, 0, 0, 0, bytes(16))", 0),
    ("libc.syscall(270, 1024, 0, 0, 0, bytes(16), 0)", 0),
    # With MSG_MORE.
    ("socket.socket(2, 2).sendto(b'x', 0x8000, ('127.0.0.1', 9))", errno.EOPNOTSUPP),
    ("socket.socket(2, 2).sendmsg([b'x'], [], 0xc000, ('127.0.0.1', 9))", errno.EOPNOTSUPP),
    ("libc.syscall(307, 99, 0, 0, 0x8000)", errno.EOPNOTSUPP),  # sendmmsg
    ("socket.socket(2, 2).setsockopt(17, 1, 1)", errno.ENOPROTOOPT),  # UDP_CORK
    ("(ends := socket.socketpair())[0].send(b'x') and 0", 0),
    ("libc.prctl(22, 2, 0, 0, 0)", errno.EINVAL),
    ("libc.syscall(317, 1, 0, None)", errno.EINVAL),  # seccomp
    ("os.system('true')", 0),
    ("threading.Thread(target=print, args=('',), kwargs={'end': ''}).start() or 0", 0),
    ("os.memfd_create('x')", 0),
    ("resource.setrlimit(resource.RLIMIT_CORE, (0, 0))", errno.ENOSYS),
    ("libc.syscall(160, 4, (ctypes.c_ulong * 2)())", errno.ENOSYS),  # setrlimit
    ("libc.syscall(302, 0, ctypes.c_ulong(4 | 1 << 32), (ctypes.c_ulong * 2)(), None)", errno.ENOSYS),  # prlimit64
    ("resource.getrlimit(resource.RLIMIT_CORE) and 0", 0),
    ("resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)) or 0", 0),
    ("libc.syscall(206, 1, (ctypes.c_ulong * 1)())", errno.ENOSYS),  # io_setup
])
def test_the_errno_of_a_filtered_call(expression, expected, launch):
    assert after_filters(expression, FILTERS[launch]()) == expected


def test_a_zygotes_filter_permits_setns_but_not_mount():
    assert after_filters("libc.setns(-1, 0)", [sandbox_specs.forking_filter()]) == errno.EBADF
    filters = [sandbox_specs.forking_filter()]
    assert after_filters("libc.mount(b'x', b'/mnt', b'tmpfs', 0, None)", filters) == errno.EPERM


# Calls that arm64 does not have, each with the one by which its C library does the same.
WITHOUT_ON_ARM64 = {
    "access": "faccessat", "alarm": "setitimer", "chmod": "fchmodat", "chown": "fchownat", "creat": "openat",
    "dup2": "dup3", "epoll_create": "epoll_create1", "epoll_ctl_old": "epoll_ctl", "epoll_wait": "epoll_pwait",
    "epoll_wait_old": "epoll_pwait", "eventfd": "eventfd2", "fork": "clone", "futimesat": "utimensat",
    "getdents": "getdents64", "getpgrp": "getpgid", "inotify_init": "inotify_init1", "lchown": "fchownat",
    "link": "linkat", "lstat": "newfstatat", "mkdir": "mkdirat", "mknod": "mknodat", "open": "openat",
    "pause": "ppoll", "pipe": "pipe2", "poll": "ppoll", "readlink": "readlinkat", "rename": "renameat",
    "rmdir": "unlinkat", "select": "pselect6", "signalfd": "signalfd4", "stat": "newfstatat", "symlink": "symlinkat",
    "time": "clock_gettime", "unlink": "unlinkat", "utime": "utimensat", "utimes": "utimensat", "vfork": "clone",
}
# Of x86 only: registers of threads.
OF_X86 = {"arch_prctl", "get_thread_area", "set_thread_area"}


def test_programs_on_arm64_may_do_the_same():
    permitted = {*syscalls.ALLOWED, *(name for name, _ in syscalls.EQUAL), *syscalls.WITHOUT}
    arm64 = {name for name in permitted if libseccomp.resolve_syscall(libseccomp.Arch.AARCH64, name) >= 0}
    assert permitted - arm64 == {*WITHOUT_ON_ARM64, *OF_X86}
    assert set(WITHOUT_ON_ARM64.values()) <= arm64


def test_numbers_of_system_calls_are_those_of_libseccomp():
    for machine, arch in (("x86_64", libseccomp.Arch.X86_64), ("aarch64", libseccomp.Arch.AARCH64)):
        assert mounts._NR_PIVOT_ROOT[machine] == libseccomp.resolve_syscall(arch, "pivot_root")
        assert libseccomp.resolve_syscall(arch, "openat2") == openat2._NR_OPENAT2
