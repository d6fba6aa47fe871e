# SPDX-License-Identifier: BSD-3-Clause
"""The system calls that a slot's processes may make.

An allow-list of the calls that an unprivileged program needs: a shell, a compiler, a notebook. A test checks that it
permits nothing that the default of Docker and podman refuses to a container without capabilities, by the list in
Debian's containers-common. It is narrower: it refuses the calls that those lists permit, or permit with a capability
that a process would hold in a new user namespace (namespaces, mounts, keyrings, file handles), and io_setup(2),
because fs.aio-max-nr is one number for the whole host, which one process can exhaust.

Standard library only; the supervisor compiles the filter.
"""

from __future__ import annotations

import errno
from typing import Tuple

from nbagent.linux.seccomp import Conditions, Group

INT = 0xFFFFFFFF

ALLOWED = """
    accept accept4 access adjtimex alarm arch_prctl bind brk capget capset chdir chmod chown
    clock_adjtime clock_getres clock_gettime clock_nanosleep close close_range connect copy_file_range creat dup
    dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait
    epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate
    fchdir fchmod fchmodat fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork
    fremovexattr fsetxattr fstat fstatfs fsync ftruncate futex futimesat get_mempolicy
    get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer
    getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage
    getsid getsockname getsockopt gettid gettimeofday getuid getxattr inotify_add_watch inotify_init
    inotify_init1 inotify_rm_watch ioctl ioprio_get
    ioprio_set kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lgetxattr link
    linkat listen listxattr llistxattr lremovexattr lseek lsetxattr lstat madvise membarrier memfd_create
    memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mprotect mq_getsetattr mq_notify
    mq_open mq_timedreceive mq_timedsend mq_unlink mremap msgctl msgget msgrcv msgsnd msync munlock
    munlockall munmap nanosleep newfstatat open openat openat2 pause pidfd_getfd pidfd_open pidfd_send_signal
    pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64 preadv preadv2
    process_mrelease process_vm_readv process_vm_writev pselect6 ptrace pwrite64 pwritev pwritev2 read readahead
    readlink readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages removexattr rename renameat renameat2
    restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
    rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
    sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity
    sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop
    sendfile sendmmsg sendmsg sendto set_robust_list set_thread_area set_tid_address setfsgid
    setfsuid setgid setgroups setitimer setpgid setpriority setregid setresgid setresuid setreuid
    setsid setsockopt setuid setxattr shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4
    splice stat statfs statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time
    timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime
    timerfd_settime times tkill truncate umask uname unlink unlinkat utime utimensat utimes vfork wait4 waitid
    write writev
""".split()

# Refused with EPERM, as the kernel itself refuses them to a process without privileges. A call that is in neither list
# fails with ENOSYS, as on a kernel that does not have it, so that programs use their fallback: glibc uses clone(2)
# when clone3(2), whose flags are in memory that a filter cannot read, is missing.
REFUSED = dict.fromkeys(
    """
    acct add_key bpf chroot delete_module fanotify_init finit_module fsconfig fsmount fsopen fspick init_module
    ioperm iopl kcmp kexec_file_load kexec_load keyctl lookup_dcookie mbind mount mount_setattr move_mount
    move_pages migrate_pages name_to_handle_at open_by_handle_at open_tree perf_event_open pivot_root quotactl
    reboot request_key set_mempolicy sethostname setdomainname setns settimeofday clock_settime swapoff swapon
    syslog umount2 unshare userfaultfd vhangup vmsplice
    """.split(),
    errno.EPERM,
)

_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_UNAME26 = 0x0020000
_RLIMIT_CORE, _RLIMITS = 4, 16
_NOT_CORE = tuple(sorted({*range(_RLIMITS)} - {_RLIMIT_CORE}))
# Permitted only when the argument with this index, from 0, has one of these values. No AF_VSOCK, AF_ALG or AF_PACKET.
# personality(2) may query, and set PER_LINUX, PER_LINUX32 and UNAME26 (setarch(8)). RLIMIT_CORE cannot be changed:
# prlimit(2) may query it, with a null pointer in place of the new limit.
EQUAL = {
    ("socket", 0): (_AF_UNIX, _AF_INET, _AF_INET6),
    ("socketpair", 0): (_AF_UNIX,),
    ("personality", 0): (0, 8, _UNAME26, _UNAME26 | 8, 0xFFFFFFFF),
    ("setrlimit", 0): _NOT_CORE,
    ("prlimit64", 1): _NOT_CORE,
    ("prlimit64", 2): (0,),
}
# Permitted only when the first argument has none of these bits: the CLONE_NEW* flags of clone(2).
WITHOUT = {"clone": 0x7E020000}
OTHERWISE = errno.ENOSYS

_SOCK_STREAM, _SOCK_DGRAM, _SOCK_SEQPACKET = 1, 2, 5
_SOCK_FLAGS = 0o2004000  # SOCK_CLOEXEC and SOCK_NONBLOCK
_IPPROTO_TCP, _IPPROTO_UDP = 6, 17
_IP_RECVERR, _IPV6_RECVERR = (0, 11), (41, 25)
# The options of sockets that programs may set, by level. Among the missing ones are those that make the kernel hold
# memory that no cgroup is charged for: socket filters (also bounded for the whole host by net.core.bpf_jit_limit,
# beyond which no slot can load its system call filter), copies of sent data for time stamps, notes of zero-copy sends,
# keys of TCP-MD5 and TLS, memberships of IPv6 groups, and IPv6 flow labels, whose table is one for all network
# namespaces.
OPTIONS = {
    # SOL_SOCKET: REUSEADDR, DONTROUTE, BROADCAST, SNDBUF, RCVBUF, KEEPALIVE, OOBINLINE, PRIORITY, LINGER, REUSEPORT,
    # PASSCRED, RCVLOWAT, SNDLOWAT, RCVTIMEO, SNDTIMEO, BINDTODEVICE, TIMESTAMP, PASSSEC, TIMESTAMPNS, RXQ_OVFL,
    # PEEK_OFF, BUSY_POLL, MAX_PACING_RATE, INCOMING_CPU, BINDTOIFINDEX, TIMESTAMP_NEW, TIMESTAMPNS_NEW, RCVTIMEO_NEW,
    # SNDTIMEO_NEW, PASSPIDFD
    1: (2, 5, 6, 7, 8, 9, 10, 12, 13, 15, 16, 18, 19, 20, 21, 25, 29, 34, 35, 40, 42, 46, 47, 49, 62, 63, 64, 66, 67,
        76),
    # IPPROTO_IP: TOS, TTL, RECVOPTS, PKTINFO, MTU_DISCOVER, RECVTTL, RECVTOS, MTU, FREEBIND, BIND_ADDRESS_NO_PORT,
    # MULTICAST_IF, MULTICAST_TTL, MULTICAST_LOOP, ADD_MEMBERSHIP and MCAST_JOIN_GROUP (igmp_max_memberships bounds
    # these), DROP_MEMBERSHIP, MCAST_LEAVE_GROUP, MULTICAST_ALL, UNICAST_IF, LOCAL_PORT_RANGE
    0: (1, 2, 6, 8, 10, 12, 13, 14, 15, 24, 32, 33, 34, 35, 36, 42, 45, 49, 50, 51),
    # IPPROTO_TCP: NODELAY, MAXSEG, CORK, KEEPIDLE, KEEPINTVL, KEEPCNT, SYNCNT, LINGER2, DEFER_ACCEPT, WINDOW_CLAMP,
    # QUICKACK, CONGESTION, THIN_LINEAR_TIMEOUTS, THIN_DUPACK, USER_TIMEOUT, FASTOPEN, NOTSENT_LOWAT, FASTOPEN_CONNECT,
    # INQ, TX_DELAY
    6: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 16, 17, 18, 23, 25, 30, 36, 37),
    # IPPROTO_UDP: SEGMENT, GRO
    17: (103, 104),
    # IPPROTO_IPV6: UNICAST_HOPS, MULTICAST_IF, MULTICAST_HOPS, MULTICAST_LOOP, LEAVE_GROUP, MTU_DISCOVER, MTU, V6ONLY,
    # MULTICAST_ALL, MCAST_LEAVE_GROUP, RECVPKTINFO, PKTINFO, RECVHOPLIMIT, HOPLIMIT, RECVPATHMTU, DONTFRAG, RECVTCLASS,
    # TCLASS, AUTOFLOWLABEL, ADDR_PREFERENCES, UNICAST_IF, FREEBIND
    41: (16, 17, 18, 19, 21, 23, 24, 26, 29, 45, 49, 50, 51, 52, 60, 62, 66, 67, 70, 72, 76, 78),
}
_POSIX_FADV_DONTNEED = 4
# The kernel loads a module for these requests of ioctl(2), without a right: a line discipline of terminals (N_GSM
# and N_HDLC have had faults that made their callers root), bridges and VLANs. TIOCSETD; SIOCGIFBR, SIOCSIFBR,
# SIOCGIFVLAN, SIOCSIFVLAN, SIOCBRADDBR, SIOCBRDELBR, SIOCBRADDIF, SIOCBRDELIF.
MODULE_REQUESTS = (0x5423, 0x8940, 0x8941, 0x8982, 0x8983, 0x89A0, 0x89A1, 0x89A2, 0x89A3)
# Pages of hugetlb belong to the host's own pool and are charged to no memory cgroup.
_MAP_HUGETLB, _MFD_HUGETLB, _SHM_HUGETLB = 0x40000, 0x4, 0o4000
# KSM would compare a slot's pages with those of the host's virtual machines, and the time of a write shows the result.
_MADV_MERGEABLE, _PR_SET_MEMORY_MERGE = 12, 67
# A task with a cookie of core scheduling keeps the other threads of its processor's core idle.
_PR_SCHED_CORE = 62
# While poll(2) and select(2) wait, the kernel holds 72 bytes for each descriptor and thread, charged to no cgroup, so
# they may wait for as many as select(2) can (FD_SETSIZE); epoll, whose memory is charged, has no such limit.
_POLLED_MAX = 1024
# With MSG_MORE or UDP_CORK the kernel holds a datagram of up to 64 KiB for each socket, charged to no cgroup.
_MSG_MORE = 0x8000
# A list of access rights (system.posix_acl_access) has 8 bytes for each entry, charged to no cgroup, and a file two of
# them. A filter sees the size of an attribute and not its name.
_ATTRIBUTE_MAX = 0xFF
_LONG = 0xFFFFFFFFFFFFFFFF
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _SECCOMP_SET_MODE_FILTER = 22, 2, 1


def _socket(family: int, kind: int, protocol: int) -> Conditions:
    return ((0, INT, family), (1, INT & ~_SOCK_FLAGS, kind), (2, INT, protocol))


# Groups of rules that precede the lists above; the first group that has a rule for a call decides: it fails with this
# errno, or "returns 0" without an effect, or with None the lists above decide. The kernel uses the lower 32 bits of
# each of these arguments.
RULES: Tuple[Group, ...] = (
    # Sockets of other protocols hold memory that no cgroup is charged for, and are more code of the kernel.
    (None, (
        *(("socket", _socket(_AF_UNIX, kind, 0)) for kind in (_SOCK_STREAM, _SOCK_DGRAM, _SOCK_SEQPACKET)),
        *(("socketpair", _socket(_AF_UNIX, kind, 0)) for kind in (_SOCK_STREAM, _SOCK_DGRAM, _SOCK_SEQPACKET)),
        *(("socket", _socket(family, _SOCK_STREAM, protocol))
          for family in (_AF_INET, _AF_INET6) for protocol in (0, _IPPROTO_TCP)),
        *(("socket", _socket(family, _SOCK_DGRAM, protocol))
          for family in (_AF_INET, _AF_INET6) for protocol in (0, _IPPROTO_UDP)),
        *((name, ((3, _LONG & ~_ATTRIBUTE_MAX, 0),)) for name in ("setxattr", "lsetxattr", "fsetxattr")),
        *((name, ((number, INT & ~(_POLLED_MAX - 1), 0),))
          for name, number in (("poll", 1), ("ppoll", 1), ("select", 0), ("pselect6", 0))),
        *((name, ((number, INT, _POLLED_MAX),))
          for name, number in (("poll", 1), ("ppoll", 1), ("select", 0), ("pselect6", 0))),
    )),
    (errno.EINVAL, tuple((name, ()) for name in ("poll", "ppoll", "select", "pselect6"))),
    (errno.EPROTONOSUPPORT, (
        *(("socket", ((0, INT, family),)) for family in (_AF_UNIX, _AF_INET, _AF_INET6)),
        ("socketpair", ((0, INT, _AF_UNIX),)),
    )),
    # Every netlink socket, also of NETLINK_ROUTE, queues the kernel's responses up to its receive buffer, charged to no
    # cgroup: 1 KiB that is charged holds 400 KiB that is not. libzmq aborts when getifaddrs(3) fails with another errno
    # than this one or EINVAL.
    (errno.EOPNOTSUPP, (
        ("socket", ((0, INT, _AF_NETLINK),)),
        *((name, ()) for name in ("setxattr", "lsetxattr", "fsetxattr")),
        *((name, ((number, _MSG_MORE, _MSG_MORE),))
          for name, number in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3))),
    )),
    # The C library's resolver sets IP_RECVERR and requires success. It would queue an error for each packet, up to the
    # receive buffer, charged to no cgroup. A connected socket reports errors without it.
    (0, (*(("setsockopt", ((1, INT, level), (2, INT, option))) for level, option in (_IP_RECVERR, _IPV6_RECVERR)),)),
    (None, (
        *(("setsockopt", ((1, INT, level), (2, INT, option)))
          for level, options in OPTIONS.items() for option in options),
    )),
    (errno.ENOPROTOOPT, (("setsockopt", ()),)),
    # These affect files of the host: the page cache of an image's files, which all its slots share, and the writing of
    # the host's disks. A slot's own files are in memory. Programs do not expect them to fail.
    (0, (("fadvise64", ((3, INT, _POSIX_FADV_DONTNEED),)), ("sync", ()), ("syncfs", ()))),
    (errno.EPERM, (
        *(("ioctl", ((1, INT, request),)) for request in MODULE_REQUESTS),
        ("mmap", ((3, _MAP_HUGETLB, _MAP_HUGETLB),)),
        ("memfd_create", ((1, _MFD_HUGETLB, _MFD_HUGETLB),)),
        ("shmget", ((2, _SHM_HUGETLB, _SHM_HUGETLB),)),
        ("madvise", ((2, INT, _MADV_MERGEABLE),)),
        *(("prctl", ((0, INT, option),)) for option in (_PR_SET_MEMORY_MERGE, _PR_SCHED_CORE)),
    )),
)
# For the processes of a slot, but not for a zygote, whose children load a second filter: no further filter, because its
# machine code is bounded by net.core.bpf_jit_limit too. EINVAL is the errno of a kernel without CONFIG_SECCOMP_FILTER.
LAST_FILTER: Tuple[Group, ...] = (
    (errno.EINVAL, (
        ("prctl", ((0, INT, _PR_SET_SECCOMP), (1, INT, _SECCOMP_MODE_FILTER))),
        ("seccomp", ((0, INT, _SECCOMP_SET_MODE_FILTER),)),
    )),
)

# Permitted in addition by a zygote's own filter; the processes that it forks load a second filter, which refuses it.
FORKING = ("setns",)
