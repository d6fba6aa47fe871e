"""The steps a sandbox is built of: each says what it does and why, and does it.

Everything a step makes lives in the namespaces of the process that runs it and goes with that
process, so a failure half way leaves nothing on the host: the end of the process is the undo.
What must be undone by hand (the socket, the scope, the slot's directory) is the supervisor's. A
step's reason is its docstring, which `nbagent slot plan` prints.

From Pivot to Detach the working directory is the host's root while the process's root is the
slot's: a source is a path relative to the host's root, a target is absolute in the slot's. So no
symbolic link in an image can lead a step anywhere but into the image: the host's root has a name
that no image can know, and from the moment that /proc/self/cwd is there, nothing but /proc is a
target.

Standard library only, and little of it: every module is memory of a process that lives as long as
the slot. So steps are named tuples; dataclasses would be 2 MiB a slot. Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
from typing import List, NamedTuple, Optional, Protocol, Tuple

from nbagent.linux import rtnetlink, seccomp
from nbagent.linux.mounts import (
    MNT_DETACH,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    mount,
    pivot_root,
    umount2,
)
from nbagent.linux.namespaces import unshare, unshare_user
from nbagent.linux.process import (
    PR_SET_NO_NEW_PRIVS,
    become,
    drop_bounding_set,
    keep_capabilities,
    last_capability,
    limit,
    prctl,
)

IDS = 65536
# The kernel's own defaults, which the service of a zygote lifts for the sum of all its slots.
LOCKED_BYTES, QUEUED_BYTES = 8 << 20, 819200


class Step(Protocol):
    """One step: `describe` is a line for a person, `do` raises OSError when the kernel refuses."""

    def describe(self) -> str: ...

    def do(self) -> None: ...


class UserNamespace(NamedTuple):
    """Root inside, an unprivileged range of ids outside: from here on nothing that goes wrong
    in a step can touch what belongs to the host. It belongs to the slot's own user, so that what
    the kernel counts for each user is counted for each slot; a zygote's to the image's root, for all its slots."""

    id_base: int
    uid: int

    def describe(self) -> str:
        return f"user namespace of {self.id_base + self.uid}: ids 0..{IDS - 1} are {self.id_base}.. on the host"

    def do(self) -> None:
        unshare_user(self.id_base, IDS, self.id_base + self.uid)


class Namespaces(NamedTuple):
    """Namespaces that belong to the user namespace just entered."""

    flags: int
    names: str

    def describe(self) -> str:
        return f"namespaces: {self.names}"

    def do(self) -> None:
        unshare(self.flags)


class PrivateMounts(NamedTuple):
    """No mount made from here on is seen by the host, nor the host's later ones here. Thousands
    of mounts that propagate to the host stall its PID 1."""

    def describe(self) -> str:
        return "mounts stop propagating in both directions"

    def do(self) -> None:
        mount(None, "/", None, MS_REC | MS_PRIVATE)


class Tmpfs(NamedTuple):
    """Memory-backed files. They are charged to the slot, and the size bounds them besides."""

    target: str
    size_bytes: int
    inodes: int
    mode: str
    flags: int = MS_NOSUID | MS_NODEV

    def describe(self) -> str:
        return f"tmpfs {self.target}, {self.size_bytes} bytes, {self.inodes} inodes, mode {self.mode}"

    def do(self) -> None:
        _make_directory(self.target)
        options = f"size={self.size_bytes},nr_inodes={self.inodes},mode={self.mode}"
        mount("tmpfs", self.target, "tmpfs", self.flags, options)


class Overlay(NamedTuple):
    """The image below, read-only and shared by all its slots; the slot's own files above.
    `userxattr`, because trusted.* attributes need a capability on the host."""

    lower: str
    upper: str
    work: str
    target: str

    def describe(self) -> str:
        return f"overlay {self.target}: {self.lower} under {self.upper}"

    def do(self) -> None:
        for directory in (self.upper, self.work, self.target):
            _make_directory(directory)
        options = f"lowerdir={self.lower},upperdir={self.upper},workdir={self.work},userxattr"
        mount("overlay", self.target, "overlay", MS_NOSUID | MS_NODEV, options)


class Directory(NamedTuple):
    """A directory the slot may write."""

    path: str
    mode: int

    def describe(self) -> str:
        return f"directory {self.path}, mode {self.mode:o}"

    def do(self) -> None:
        _make_directory(self.path)
        os.chmod(self.path, self.mode)


class Devices(NamedTuple):
    """The devices that are harmless, each with the host's own node: a user namespace makes none."""

    source: str
    target: str
    names: Tuple[str, ...]

    def describe(self) -> str:
        return f"devices {', '.join(self.names)} at {self.target}"

    def do(self) -> None:
        for name in self.names:
            target = f"{self.target}/{name}"
            os.mknod(target, stat.S_IFREG | 0o644)
            mount(f"{self.source}/{name}", target, None, MS_BIND)


class Bind(NamedTuple):
    """Shows a directory at a second place."""

    source: str
    target: str
    read_only: bool = False
    no_exec: bool = False

    def describe(self) -> str:
        but = f"{', read-only' if self.read_only else ''}{', no programs' if self.no_exec else ''}"
        return f"bind {self.source} at {self.target}{but}"

    def do(self) -> None:
        _make_directory(self.target)
        mount(self.source, self.target, None, MS_BIND)
        flags = MS_RDONLY * self.read_only | MS_NOEXEC * self.no_exec
        if flags:
            # Flags that the source's mount is locked to must be repeated in a user namespace.
            flags |= MS_NOSUID | MS_NODEV | _locked_flags(self.target)
            mount(None, self.target, None, MS_BIND | MS_REMOUNT | flags)


class DevPts(NamedTuple):
    """Terminals of the slot's own: a new instance shows nobody else's. How many there may be on
    the whole host is one number, kernel.pty.max, so each slot has its share."""

    target: str
    terminals: int

    def describe(self) -> str:
        return f"devpts {self.target}, {self.terminals} terminals"

    def do(self) -> None:
        _make_directory(self.target)
        options = f"newinstance,ptmxmode=0666,mode=0620,max={self.terminals}"
        mount("devpts", self.target, "devpts", MS_NOSUID | MS_NOEXEC, options)


class Link(NamedTuple):
    """A symbolic link."""

    path: str
    to: str

    def describe(self) -> str:
        return f"link {self.path} to {self.to}"

    def do(self) -> None:
        os.symlink(self.to, self.path)


class Proc(NamedTuple):
    """A /proc of the new pid namespace: it shows the slot's own processes only."""

    target: str

    def describe(self) -> str:
        return f"proc {self.target}"

    def do(self) -> None:
        _make_directory(self.target)
        mount("proc", self.target, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)


class HostProc(NamedTuple):
    """The host's /proc as the service of the zygote has it: of processes, it shows those alone that
    one may trace. A zygote stays in the host's pid namespace, as those of its slots must not end with it."""

    target: str

    def describe(self) -> str:
        return f"the host's proc at {self.target}, without others' processes"

    def do(self) -> None:
        _make_directory(self.target)
        mount("proc", self.target, None, MS_BIND | MS_REC)


class Masked(NamedTuple):
    """Parts of /proc that tell about the whole host, or would act on it if a permission check
    ever failed: Docker's list. Files show /dev/null, directories an empty one."""

    files: Tuple[str, ...]
    directories: Tuple[str, ...]
    null: str

    def describe(self) -> str:
        return f"masked: {', '.join((*self.files, *self.directories))}"

    def do(self) -> None:
        os.stat(self.null)
        # Which of them this kernel has is for it to say, in one call for each.
        for path in self.files:
            with contextlib.suppress(FileNotFoundError):
                mount(self.null, path, None, MS_BIND)
        for path in self.directories:
            with contextlib.suppress(FileNotFoundError):
                mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=0,nr_inodes=2")


class ReadOnly(NamedTuple):
    """Parts of /proc that may be read and never written."""

    paths: Tuple[str, ...]

    def describe(self) -> str:
        return f"read-only: {', '.join(self.paths)}"

    def do(self) -> None:
        for path in self.paths:
            with contextlib.suppress(FileNotFoundError):
                mount(path, path, None, MS_BIND | MS_REC)
                flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
                mount(None, path, None, MS_BIND | MS_REMOUNT | flags)


class Identity(NamedTuple):
    """Names for the slot's id: its user in passwd and group, its hostname, its hosts file."""

    user: str
    uid: int
    home: str
    hostname: str

    def describe(self) -> str:
        return f"user {self.user} is {self.uid}, home {self.home}, host {self.hostname}"

    def do(self) -> None:
        _make_directory("/etc")
        shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
        _set_line("/etc/passwd", self.user, f"{self.user}:x:{self.uid}:{self.uid}::{self.home}:{shell}")
        _set_line("/etc/group", self.user, f"{self.user}:x:{self.uid}:")
        _write("/etc/hostname", f"{self.hostname}\n")
        _write("/etc/hosts", f"127.0.0.1 localhost {self.hostname}\n::1 localhost\n")
        socket.sethostname(self.hostname)


class OwnHome(NamedTuple):
    """The home directory with the image's files in it, all the slot's own."""

    path: str
    uid: int

    def describe(self) -> str:
        return f"home {self.path} belongs to {self.uid}"

    def do(self) -> None:
        _make_directory(self.path)
        os.chmod(self.path, 0o700)
        os.chown(self.path, self.uid, self.uid)
        directories = [self.path]
        while directories:
            with os.scandir(directories.pop()) as entries:
                for entry in entries:
                    os.chown(entry.path, self.uid, self.uid, follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)


class Loopback(NamedTuple):
    """The one interface of a slot without network."""

    def describe(self) -> str:
        return "interface lo is up"

    def do(self) -> None:
        rtnetlink.bring_up_loopback()


class Interface(NamedTuple):
    """The slot's end of the interface that the host made for it: addresses, routes, and how fast it
    may send. Here and not on the host, as a sender that has to wait loses nothing; what the slot's
    user may not change as well, since that takes a capability. Where it leads is up to the host."""

    name: str
    addresses: List[str]
    gateways: List[str]
    rate: int

    def describe(self) -> str:
        addresses = ", ".join(self.addresses)
        return f"interface {self.name} is {addresses} by way of {', '.join(self.gateways)}, {self.rate} bytes/s"

    def do(self) -> None:
        index = socket.if_nametoindex(self.name)
        rtnetlink.shape(index, self.rate)
        rtnetlink.bring_up(index)
        for address, gateway in zip(self.addresses, self.gateways):  # noqa: B905  strict= is of 3.10
            rtnetlink.add_address(index, address)
            rtnetlink.add_default_route(index, gateway)


class Resolver(NamedTuple):
    """Whom the slot asks for names, whatever the image says: nobody else answers there."""

    address: str

    def describe(self) -> str:
        return f"names are resolved by {self.address}"

    def do(self) -> None:
        _write("/etc/resolv.conf", f"nameserver {self.address}\noptions timeout:2 attempts:3\n")


class Pivot(NamedTuple):
    """The new root in the place of the host's, which stays as the working directory for now, under
    a random name. pivot_root(".", ".") needs none, but stacks the host's root upon the new one, and
    then ".." in a link of the image leads there."""

    root: str

    def describe(self) -> str:
        return f"pivot_root to {self.root}"

    def do(self) -> None:
        host = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        behind = f"{self.root}/{os.urandom(16).hex()}"
        os.mkdir(behind, 0o700)
        pivot_root(self.root, behind)
        os.fchdir(host)
        os.close(host)


class Detach(NamedTuple):
    """The host's root out of reach. Not before /proc: the kernel mounts a new one only where an
    unmasked one is in sight."""

    def describe(self) -> str:
        return "the host's root is unmounted"

    def do(self) -> None:
        behind = os.getcwd()
        umount2(".", MNT_DETACH)
        os.chdir("/")
        os.rmdir(behind)


class ResourceLimits(NamedTuple):
    """Resource limits that no cgroup has: no core dumps, and files, timers, queued signals, locked
    memory and message queues enough for a notebook.

    One byte of core is too little for a file, and the only limit at which the kernel does not start
    a program of the host that core_pattern names (man 5 core); `syscalls` keeps a slot from lowering it.
    """

    files: int
    signals: int

    def describe(self) -> str:
        return f"no core dumps, {self.files} open files, {self.signals} pending signals"

    def do(self) -> None:
        # A zygote's slots have it from the zygote, under a filter that lets nobody set it.
        if resource.getrlimit(resource.RLIMIT_CORE) != (1, 1):
            limit(resource.RLIMIT_CORE, 1, 1)
        limit(resource.RLIMIT_NOFILE, self.files, self.files)
        limit(resource.RLIMIT_SIGPENDING, self.signals, self.signals)
        limit(resource.RLIMIT_MEMLOCK, LOCKED_BYTES, LOCKED_BYTES)
        limit(resource.RLIMIT_MSGQUEUE, QUEUED_BYTES, QUEUED_BYTES)


class Unprivileged(NamedTuple):
    """The slot's id, no capability now, none to be had: not by a setuid file, not by exec."""

    uid: int
    held: Optional[Tuple[int, ...]] = None

    def describe(self) -> str:
        return f"user id {self.uid}, no capability, no_new_privs"

    def do(self) -> None:
        drop_bounding_set(range(last_capability() + 1) if self.held is None else self.held)
        become(self.uid)
        prctl(PR_SET_NO_NEW_PRIVS, 1)


class Forking(NamedTuple):
    """What a zygote needs to make another process a slot's: it joins namespaces, becomes the slot's
    user and gives up the rest. In the image's user namespace only, and with no network's or file's
    privilege even there."""

    capabilities: Tuple[int, ...]

    def describe(self) -> str:
        return f"capabilities {', '.join(map(str, self.capabilities))} of the user namespace, no_new_privs"

    def do(self) -> None:
        keep_capabilities(self.capabilities, last_capability())
        prctl(PR_SET_NO_NEW_PRIVS, 1)


class SystemCalls(NamedTuple):
    """What is left of the kernel's entrance; `syscalls` has the list. The last of all steps, as
    it refuses what the others do."""

    program: bytes

    def describe(self) -> str:
        return f"system calls filtered by {len(self.program) // 8} instructions"

    def do(self) -> None:
        seccomp.load(self.program)


def _locked_flags(path: str) -> int:
    """The flags a mount has that a remount in a user namespace may not drop."""
    pairs = ((os.ST_NOSUID, MS_NOSUID), (os.ST_NODEV, MS_NODEV), (os.ST_NOEXEC, MS_NOEXEC))
    has = os.statvfs(path).f_flag
    flags = sum(flag for bit, flag in pairs if has & bit)
    for bit, flag in ((os.ST_NOATIME, 1 << 10), (os.ST_NODIRATIME, 1 << 11), (os.ST_RELATIME, 1 << 21)):
        flags |= flag if has & bit else 0
    return flags


def _set_line(path: str, name: str, line: str) -> None:
    """Puts `line` into a colon-separated file in the place of the entry `name`, first of all."""
    others = []
    with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
        lines = file.read().decode(errors="replace").splitlines()
        others = [old for old in lines if old.split(":", 1)[0] != name]
    _write(path, "\n".join([line, *others]) + "\n")


# A slot's start waits for all of this, and most of what it costs are the calls: these do with few.


def _make_directory(path: str) -> None:
    """Makes a directory with those above it, each of mode 0755, if there is none."""
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        pass
    except FileNotFoundError:
        os.makedirs(path, 0o755, exist_ok=True)


def _write(path: str, text: str) -> None:
    """Writes a file anew, of mode 0644, whatever is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with open(fd, "wb", buffering=0) as file:
        left = memoryview(text.encode())
        while left:
            left = left[file.write(left):]
