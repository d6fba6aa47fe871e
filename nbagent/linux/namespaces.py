# SPDX-License-Identifier: BSD-3-Clause
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


def setns(fd: int, flags: int = 0) -> None:
    """setns(2), on a namespace's descriptor or, with `flags`, on a pidfd. Raises OSError.

    CLONE_NEWPID takes effect for children only: a process never changes its own pid namespace.
    """
    call("setns", fd, flags)


def owner_of_user_namespace(pid: int) -> int:
    """The owner of a process's user namespace, as a user id of the caller's user namespace. Raises OSError."""
    fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(struct.unpack("I", fcntl.ioctl(fd, _NS_GET_OWNER_UID, bytes(4)))[0])
    finally:
        os.close(fd)


def enter(pidfd: int, pid: int, flags: int) -> None:
    """Moves the caller, root, into namespaces of a process, among them its user namespace, and makes it root there.

    setns(2) needs CAP_SYS_ADMIN in the target user namespace. The namespace's owner has every capability in it when
    it is in the parent namespace (user_namespaces(7)), so the caller takes the owner's user id first and needs no
    CAP_SYS_ADMIN on the host. With CLONE_NEWPID only the caller's children are in the pid namespace.
    Raises OSError, and the caller is then in none of the namespaces.
    """
    owner = owner_of_user_namespace(pid)
    os.setresuid(owner, owner, 0)
    # A change of the effective user id from root clears the effective set; CAP_SYS_PTRACE in it is needed for a target
    # that is not dumpable.
    raise_permitted()
    setns(pidfd, flags)
    # setns(2) into a user namespace grants all capabilities in it. The next change of ids would not clear them, since
    # the kernel does that only when a process leaves user id 0 of its namespace (capabilities(7)).
    _become_root()


def write_id_maps(pid: int, id_base: int, count: int) -> None:
    """Maps the ids 0 to `count` - 1 of the user namespace of `pid` to `id_base` and up in the parent namespace.

    The caller needs CAP_SETUID and CAP_SETGID in the parent namespace. Raises OSError.
    """
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(f"0 {id_base} {count}\n")


def unshare_user(id_base: int, count: int, owner: int) -> None:
    """Moves the caller, root, into a new user namespace as its root, with the map of `write_id_maps`.

    `owner` is the host's user id that owns the namespace. The kernel charges per-user limits (pending signals,
    POSIX timers, inotify instances, message queues, locked memory) in every ancestor namespace, and there to the
    owner. If root owned all namespaces, one of them could exhaust these limits for the host and for all others.

    A process without CAP_SETUID in the parent namespace can map only its own id, so a child that stays in the
    parent namespace writes the maps. Raises OSError, also with the errno of a failure in that child.
    """
    go_read, go_write = os.pipe()
    parent = os.getpid()
    # The user id that calls unshare(2) becomes the owner. The child has it too: a map may be written without
    # CAP_SYS_ADMIN by a process with the owner's user id, which still needs CAP_SETUID and CAP_SETGID.
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
