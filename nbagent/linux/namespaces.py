"""unshare(2), setns(2) and the id maps of a user namespace."""

from __future__ import annotations

import fcntl
import os
import struct

from nbagent.linux.libc import call
from nbagent.linux.process import raise_permitted

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
# include/uapi/linux/nsfs.h
_NS_GET_OWNER_UID = 0xB704


def unshare(flags: int) -> None:
    """unshare(2). Raises OSError."""
    call("unshare", flags)


def join(fd: int) -> None:
    """Moves the caller into the namespace of the descriptor; of a pid namespace, its children. Raises OSError."""
    call("setns", fd, 0)


def owner_of_user_namespace(pid: int) -> int:
    """The user of ours that the user namespace of a process belongs to. Raises OSError."""
    fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(struct.unpack("I", fcntl.ioctl(fd, _NS_GET_OWNER_UID, bytes(4)))[0])
    finally:
        os.close(fd)


def enter(pidfd: int, pid: int, flags: int) -> None:
    """Moves the caller, root, into namespaces of a process, its user namespace among them, as the root of that.

    It does so as the user that the user namespace belongs to, who needs no CAP_SYS_ADMIN in the host's.
    Only children are in the pid namespace. Raises OSError, and is then in none of them.
    """
    owner = owner_of_user_namespace(pid)
    os.setresuid(owner, owner, 0)
    # Root's capabilities are for a process that is not dumpable.
    raise_permitted()
    call("setns", pidfd, flags)
    # The kernel has given all capabilities in the namespace, and takes them only from who has been its root.
    _become_root()


def write_id_maps(pid: int, id_base: int, count: int) -> None:
    """Maps ids 0 to `count` of the user namespace of `pid` to `id_base` and up on the host.

    The caller needs CAP_SETUID and CAP_SETGID in the parent namespace. Raises OSError.
    """
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(f"0 {id_base} {count}\n")


def unshare_user(id_base: int, count: int, owner: int) -> None:
    """Moves the caller, root, into a new user namespace as its root, with the map above.

    `owner` is the user of the host that the namespace belongs to. What the kernel counts for each
    user (pending signals and timers, inotify instances, message queues, locked memory) it counts
    in every namespace up to the host's, there for the owner: were that root, what one namespace
    takes would be missing to root on the host and to all the others.

    A process cannot map ids that are not its own from inside, so a child that stays outside
    writes the maps. Raises OSError; the child's failure comes back with its errno.
    """
    go_read, go_write = os.pipe()
    parent = os.getpid()
    # Both are the owner, who may write the maps without CAP_SYS_ADMIN, and keep root's capabilities for it.
    os.setresuid(owner, owner, 0)
    raise_permitted()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(go_write)
            if os.read(go_read, 1):
                write_id_maps(parent, id_base, count)
                status = 0
        except OSError as error:
            status = error.errno or 1
        finally:
            os._exit(status)
    os.close(go_read)
    try:
        unshare(CLONE_NEWUSER)
        os.write(go_write, b"1")
    finally:
        os.close(go_write)
        _, status = os.waitpid(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise OSError(code, f"uid_map: {os.strerror(code) if code > 0 else 'child killed'}")
    _become_root()


def _become_root() -> None:
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
