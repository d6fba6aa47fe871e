# SPDX-License-Identifier: BSD-3-Clause
"""The steps of a sandbox. Each describes itself, and its class's docstring is its reason (`nbagent slot plan`).

Everything that a step makes belongs to the namespaces of the process that runs it, so a failed start leaves nothing
on the host: the kernel removes it when the process exits. The supervisor undoes what is outside of them: the socket,
the scope, the slot's directory.

From Pivot to Detach the working directory is the host's root while the root directory is the slot's: a source is a
path relative to the host's root, a target is an absolute path in the slot's root. No symbolic link in an image can
lead a step out of the image, because the host's root is mounted under a random name, and because from the moment that
/proc/self/cwd exists, only paths in /proc are targets.

Standard library only, and few modules of it, because each costs memory in a process that lives as long as the slot.
Steps are named tuples, because importing dataclasses would cost 2 MiB a slot. Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import stat
from typing import Dict, List, NamedTuple, Optional, Protocol, Tuple

from nbagent.linux import apparmor, rtnetlink, seccomp
from nbagent.linux.mounts import (
    MNT_DETACH,
    MS_BIND,
    MS_MOVE,
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
    prctl,
    set_rlimit,
)
from nbagent.sandbox.spec import HOST_IDS, IDS

# The kernel's defaults for one user. units/nbagent-zygote@.service raises them for the sum of a zygote's slots.
LOCKED_BYTES, QUEUED_BYTES = 8 << 20, 819200

DEFAULT4, DEFAULT6, MULTICAST4, MULTICAST6, LINK_LOCAL6 = "0.0.0.0/0", "::/0", "224.0.0.0/4", "ff00::/8", "fe80::/10"
NEIGHBOUR6 = "fe80::1"
# The content of a .pth file. The module site executes it twice in a virtual environment: before and after it has
# disabled the user's packages, which is when ENABLE_USER_SITE is False.
USER_PACKAGES = (
    "import site; "
    "site.ENABLE_USER_SITE = site.check_enableusersite() if site.ENABLE_USER_SITE is False else site.ENABLE_USER_SITE; "
    "site.addusersitepackages(None)\n"
)


class Step(Protocol):
    """One step: `describe` is a line for an operator, `do` raises OSError when the kernel refuses a call."""

    def describe(self) -> str: ...

    def do(self) -> None: ...


class UserNamespace(NamedTuple):
    """Root inside is an unprivileged id on the host, so from here on no fault in a step can change anything of the
    host. The namespace is owned by the slot's user id, because the kernel counts per-user limits for the owner; a
    zygote's is owned by the image's root and counts for all its slots."""

    id_base: int
    uid: int

    def describe(self) -> str:
        return f"user namespace of {self.id_base + self.uid}: ids 0..{IDS - 1} are {self.id_base}.. on the host"

    def do(self) -> None:
        # The supervisor sends both, and must not be able to get ids of the host's users by them.
        if not (HOST_IDS.start <= self.id_base <= HOST_IDS.stop - IDS and 0 <= self.uid < IDS):
            raise PermissionError(errno.EPERM, f"ids from {self.id_base} are not those of an image")
        unshare_user(self.id_base, IDS, self.id_base + self.uid)


class Namespaces(NamedTuple):
    """The new namespaces are owned by the new user namespace, so that its root may configure them."""

    flags: int
    names: str

    def describe(self) -> str:
        return f"namespaces: {self.names}"

    def do(self) -> None:
        unshare(self.flags)


class PrivateMounts(NamedTuple):
    """No mount made from here on propagates to the host, and no later mount of the host to here, because
    thousands of slots' mounts in the host's mount namespace stall PID 1."""

    def describe(self) -> str:
        return "mounts stop propagating in both directions"

    def do(self) -> None:
        mount(None, "/", None, MS_REC | MS_PRIVATE)


class Tmpfs(NamedTuple):
    """Files in memory, which the kernel charges to the slot's cgroup; size and number of inodes are limited too."""

    target: str
    size_bytes: int
    inodes: int
    mode: str
    flags: int = MS_NOSUID | MS_NODEV
    uid: int = 0

    def describe(self) -> str:
        owner = f", of {self.uid}" if self.uid else ""
        return f"tmpfs {self.target}, {self.size_bytes} bytes, {self.inodes} inodes, mode {self.mode}{owner}"

    def do(self) -> None:
        _make_directory(self.target)
        options = f"size={self.size_bytes},nr_inodes={self.inodes},mode={self.mode},uid={self.uid},gid={self.uid}"
        mount("tmpfs", self.target, "tmpfs", self.flags, options)


class Overlay(NamedTuple):
    """The image is the lower layer, read-only and shared by all its slots; the slot's files are in the upper layer.
    `userxattr`, because the trusted.* attributes that overlayfs uses otherwise need CAP_SYS_ADMIN on the host."""

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
    """A directory that the slot may write to."""

    path: str
    mode: int

    def describe(self) -> str:
        return f"directory {self.path}, mode {self.mode:o}"

    def do(self) -> None:
        _make_directory(self.path)
        os.chmod(self.path, self.mode)


class Devices(NamedTuple):
    """Harmless devices only, each bound from the host, because mknod(2) makes no device in a user namespace."""

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
    """A directory mounted at a second path."""

    source: str
    target: str
    read_only: bool = False
    no_exec: bool = False

    def describe(self) -> str:
        options = f"{', read-only' if self.read_only else ''}{', noexec' if self.no_exec else ''}"
        return f"bind {self.source} at {self.target}{options}"

    def do(self) -> None:
        _make_directory(self.target)
        mount(self.source, self.target, None, MS_BIND)
        flags = MS_RDONLY * self.read_only | MS_NOEXEC * self.no_exec
        if flags:
            # A mount from a more privileged mount namespace has its flags locked: a remount that drops one is EPERM.
            flags |= MS_NOSUID | MS_NODEV | _locked_flags(self.target)
            mount(None, self.target, None, MS_BIND | MS_REMOUNT | flags)


class SharedProgram(NamedTuple):
    """A program of the host, read-only, as the only layer of an overlay of the slot. A bind mount would have the host's
    inodes, whose watches, locks and leases all slots share: a slot could count the starts of others, and flush the
    host's file system. overlayfs without an upper layer needs a second lower one, which is an empty directory."""

    source: str
    target: str
    empty: str

    def describe(self) -> str:
        return f"overlay {self.target}: {self.source}, read-only"

    def do(self) -> None:
        _make_directory(self.target)
        _make_directory(self.empty)
        options = f"lowerdir={self.source}:{self.empty},userxattr"
        mount("overlay", self.target, "overlay", MS_RDONLY | MS_NOSUID | MS_NODEV, options)


class SystemFiles(SharedProgram):
    """The processors of the host, of which lscpu, psutil and joblib print an error when they find none below /sys. The
    files are copies, in an overlay as a SharedProgram is, because sysfs has the host's inodes and devices."""


class OwnCgroup(NamedTuple):
    """The slot's own cgroup, the root of its cgroup namespace, read-only: libraries and runtimes read from it the
    memory and the processor time that the slot may use. Its files belong to the host's root, and no other slot's are
    there."""

    target: str

    def describe(self) -> str:
        return f"cgroup of the slot at {self.target}, read-only"

    def do(self) -> None:
        # A host with cgroup v1 alone has none.
        with contextlib.suppress(OSError):
            mount("cgroup2", self.target, "cgroup2", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)


class LimitFiles(SharedProgram):
    """Files of this slot alone that show its limits. The supervisor writes them when a claim or a change sets other
    limits. They are in an overlay as a SharedProgram is; it reads the content of the host's files at each read."""


class LimitFile(NamedTuple):
    """The slot's limits in the place of the host's memory or processors, so that libraries size themselves by what the
    slot has."""

    source: str
    target: str

    def describe(self) -> str:
        return f"file {self.source} at {self.target}"

    def do(self) -> None:
        # A machine can have no such file below /sys. The mount is read-only, as the overlay is.
        if os.path.exists(self.target):
            mount(self.source, self.target, None, MS_BIND)


class DevPts(NamedTuple):
    """A new devpts instance contains only the slot's terminals. Their number is limited, because kernel.pty.max
    is one number for the whole host."""

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
    """A procfs of the new pid namespace shows only the slot's processes."""

    target: str

    def describe(self) -> str:
        return f"proc {self.target}"

    def do(self) -> None:
        _make_directory(self.target)
        mount("proc", self.target, "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)


class NetworkSettings(NamedTuple):
    """Settings of the slot's own network namespace. With net.core.tstamp_allow_data the kernel would queue a copy of
    each datagram that is sent with a request for time stamps, charged to no cgroup. Nor are connections in TIME_WAIT,
    whose number net.ipv4.tcp_max_tw_buckets limits, and groups of IPv4, of which net.ipv4.igmp_max_memberships limits
    those of a socket. With net.ipv4.tcp_no_metrics_save, connections are not recorded in a table that all network
    namespaces share. A kernel on which a setting is one for the whole host does not have
    it here; the package sets those (packaging/nbagent.sysctl)."""

    settings: Tuple[Tuple[str, str], ...]

    def describe(self) -> str:
        return f"in its network namespace: {', '.join('='.join(setting) for setting in self.settings)}"

    def do(self) -> None:
        for name, value in self.settings:
            with contextlib.suppress(FileNotFoundError), open(f"/proc/sys/{name.replace('.', '/')}", "w") as file:
                file.write(value)


class HostProc(NamedTuple):
    """A zygote stays in the host's pid namespace, so that its slots do not end with it. The /proc of its service
    has ProtectProc=invisible, so it shows only processes that the zygote may ptrace(2)."""

    target: str

    def describe(self) -> str:
        return f"the host's proc at {self.target}, without the processes of other users"

    def do(self) -> None:
        _make_directory(self.target)
        mount("proc", self.target, None, MS_BIND | MS_REC)


class Masked(NamedTuple):
    """These parts of /proc contain information about the whole host, or would act on it if a permission check in
    the kernel were missing (Docker's list). Files are covered by /dev/null, directories by an empty tmpfs."""

    files: Tuple[str, ...]
    directories: Tuple[str, ...]
    null: str

    def describe(self) -> str:
        return f"masked: {', '.join((*self.files, *self.directories))}"

    def do(self) -> None:
        os.stat(self.null)
        # Not every kernel has all of them: ENOENT from mount(2) is one system call less than a test before it.
        for path in self.files:
            with contextlib.suppress(FileNotFoundError):
                mount(self.null, path, None, MS_BIND)
        for path in self.directories:
            with contextlib.suppress(FileNotFoundError):
                mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=0,nr_inodes=2")


class ReadOnly(NamedTuple):
    """These parts of /proc may be read and are never written, because they configure the whole host's kernel."""

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
    """The slot's user id needs entries in passwd and group; the slot has its own hostname and hosts file."""

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


class UserPackages(NamedTuple):
    """A Python of a virtual environment has no packages below ~/.local, and the environment is read-only, so that pip
    could install nothing. This file has the Python read those of the user as one outside of an environment does, after
    the environment's own."""

    program: str

    def describe(self) -> str:
        return f"if {self.program} is of a virtual environment, its Python reads the user's packages"

    def do(self) -> None:
        prefix = os.path.dirname(os.path.dirname(self.program))
        try:
            with open(f"{prefix}/pyvenv.cfg", "rb", buffering=0) as file:
                settings = file.read(65536).decode(errors="replace").lower()
            names = os.listdir(f"{prefix}/lib")
        except OSError:
            return
        pairs = [[part.strip() for part in line.split("=", 1)] for line in settings.splitlines()]
        if ["include-system-site-packages", "true"] in pairs:
            return
        for name in names:
            directory = f"{prefix}/lib/{name}/site-packages"
            if name.startswith("python") and os.path.isdir(directory):
                _write(f"{directory}/nbagent-user-packages.pth", USER_PACKAGES)


class Home(NamedTuple):
    """The home directory is a directory of the slot's storage with a copy of the image's files, so that it behaves like
    one of a disk. In the overlay, files and directories differ in st_dev; a directory that came with the image cannot
    be renamed; and before Linux 6.6, whose tmpfs is the first with user.* attributes, a directory of the image cannot
    be removed, nor a new one be moved."""

    source: str
    target: str
    uid: int

    def describe(self) -> str:
        return f"home {self.target} is a copy at {self.source}, moved there, and belongs to {self.uid}"

    def do(self) -> None:
        _make_directory(self.target)
        _copy_tree(self.target, self.source, self.uid, {})
        os.chmod(self.source, 0o700)
        mount(self.source, self.target, None, MS_MOVE)
        os.rmdir(self.source)


class PublicDirectories(NamedTuple):
    """The directories of the image that everyone may write to are directories of the slot's storage with a copy of the
    image's files, as the home is. Were they in the overlay, the kernel would hold a list of the names in such a
    directory for each descriptor that has read it, charged to no cgroup."""

    source: str
    targets: Tuple[str, ...]
    uid: int

    def describe(self) -> str:
        return f"{', '.join(self.targets)}: copies at {self.source}, which belong to {self.uid}"

    def do(self) -> None:
        os.mkdir(self.source, 0o755)
        for number, target in enumerate(self.targets):
            source = f"{self.source}/{number}"
            os.mkdir(source)
            _copy_tree(target, source, self.uid, {})
            mount(source, target, None, MS_BIND)


class ReadOnlyRoot(NamedTuple):
    """From here on nothing can be written to the overlay, whatever owners and modes an image has: see
    PublicDirectories. Files in memory are mounted over it where a slot may write."""

    def describe(self) -> str:
        return "the root is read-only"

    def do(self) -> None:
        flags = MS_RDONLY | MS_NOSUID | MS_NODEV | _locked_flags("/")
        mount(None, "/", None, MS_BIND | MS_REMOUNT | flags)


class Loopback(NamedTuple):
    """A new network namespace has one interface, lo, which is down at first."""

    def describe(self) -> str:
        return "interface lo is up"

    def do(self) -> None:
        rtnetlink.bring_up_loopback()


class Interface(NamedTuple):
    """The slot's end of the veth pair that the host made: addresses, routes, and the limit on sending. The limit is
    at this end, because a sender whose queue is full waits, while the host could only drop packets. The slot's user
    cannot change it without CAP_NET_ADMIN. The host's rules decide which addresses are reachable.

    Link-local and multicast addresses have a gateway too, although no packet passes the host's rules. Without one the
    kernel makes an entry for each such address in its neighbour table, which is one for all network namespaces."""

    name: str
    addresses: List[str]
    gateways: List[str]
    rate: int

    def describe(self) -> str:
        addresses = ", ".join(self.addresses)
        return f"interface {self.name} is {addresses} via {', '.join(self.gateways)}, {self.rate} bytes/s"

    def do(self) -> None:
        index = socket.if_nametoindex(self.name)
        rtnetlink.shape(index, self.rate)
        rtnetlink.bring_up(index)
        for address, gateway in zip(self.addresses, self.gateways):  # noqa: B905  strict= is of 3.10
            rtnetlink.add_address(index, address)
            rtnetlink.add_route(index, DEFAULT6 if ":" in gateway else DEFAULT4, gateway)
            if ":" not in gateway:
                rtnetlink.add_route(index, MULTICAST4, gateway)
        # A kernel without IPv6 has no neighbours either.
        with contextlib.suppress(OSError):
            for destination in (LINK_LOCAL6, MULTICAST6):
                rtnetlink.add_route(index, destination, NEIGHBOUR6, rtnetlink.RT_TABLE_LOCAL)


class Resolver(NamedTuple):
    """The image's resolv.conf is replaced, because the slot reaches no other resolver than the host's."""

    address: str

    def describe(self) -> str:
        return f"names are resolved by {self.address}"

    def do(self) -> None:
        _write("/etc/resolv.conf", f"nameserver {self.address}\noptions timeout:2 attempts:3\n")


class Pivot(NamedTuple):
    """The slot's root becomes the root directory. The host's root is mounted below it under a random name and is the
    working directory until Detach. pivot_root(".", ".") would need no name, but mounts the host's root on top of the
    new one, where ".." in a symbolic link of the image leads to it."""

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
    """The host's root is unmounted. This follows Proc, because the kernel permits a new procfs in a user namespace
    only while a fully visible one is mounted in the mount namespace (mount_too_revealing())."""

    def describe(self) -> str:
        return "the host's root is unmounted"

    def do(self) -> None:
        behind = os.getcwd()
        umount2(".", MNT_DETACH)
        os.chdir("/")
        os.rmdir(behind)


class ResourceLimits(NamedTuple):
    """Limits that cgroups do not have: no core dumps; open files, timers, queued signals, locked memory and message
    queues that suffice for a notebook. RLIMIT_CORE is 1 byte, too small for a file, because 1 is the only value at
    which the kernel does not start a core_pattern program of the host (core(5)); the system call filter keeps a slot
    from lowering it."""

    files: int
    signals: int

    def describe(self) -> str:
        return f"no core dumps, {self.files} open files, {self.signals} pending signals"

    def do(self) -> None:
        # Processes forked from a zygote inherit it, and a filter under which setting RLIMIT_CORE fails.
        if resource.getrlimit(resource.RLIMIT_CORE) != (1, 1):
            set_rlimit(resource.RLIMIT_CORE, 1, 1)
        set_rlimit(resource.RLIMIT_NOFILE, self.files, self.files)
        set_rlimit(resource.RLIMIT_SIGPENDING, self.signals, self.signals)
        set_rlimit(resource.RLIMIT_MEMLOCK, LOCKED_BYTES, LOCKED_BYTES)
        set_rlimit(resource.RLIMIT_MSGQUEUE, QUEUED_BYTES, QUEUED_BYTES)


class Unprivileged(NamedTuple):
    """The slot's user id without any capability. An empty bounding set and no_new_privs keep execve(2) from granting
    one, also by a setuid file or file capabilities."""

    uid: int
    held: Optional[Tuple[int, ...]] = None

    def describe(self) -> str:
        return f"user id {self.uid}, no capability, no_new_privs"

    def do(self) -> None:
        drop_bounding_set(range(last_capability() + 1) if self.held is None else self.held)
        become(self.uid)
        prctl(PR_SET_NO_NEW_PRIVS, 1)


class Forking(NamedTuple):
    """A zygote's child joins the slot's namespaces, sets its user id and removes its bounding set, each of which
    needs a capability. They are capabilities in the image's user namespace only, and include none for the network
    or for other users' files."""

    capabilities: Tuple[int, ...]

    def describe(self) -> str:
        return f"capabilities {', '.join(map(str, self.capabilities))} of the user namespace, no_new_privs"

    def do(self) -> None:
        keep_capabilities(self.capabilities, last_capability())
        prctl(PR_SET_NO_NEW_PRIVS, 1)


class AppArmor(NamedTuple):
    """The profile refuses mounts, changes of kernel settings, raw sockets, and signals to processes of the host and the
    inspection of these, so that a fault in a namespace or in the filter is not enough. It follows the steps that it
    would refuse; a process without a profile may enter one although no_new_privs is set."""

    profile: str

    def describe(self) -> str:
        return f"AppArmor profile {self.profile}"

    def do(self) -> None:
        apparmor.change_profile(self.profile)


class SystemCalls(NamedTuple):
    """Only the system calls in sandbox/syscalls.py are permitted. This is the last step, because the filter refuses
    the calls that the other steps make."""

    program: bytes

    def describe(self) -> str:
        return f"system call filter of {len(self.program) // 8} instructions"

    def do(self) -> None:
        seccomp.load(self.program)


def _locked_flags(path: str) -> int:
    """The flags of a mount that a remount in a user namespace must repeat (CL_UNPRIVILEGED locks them)."""
    pairs = ((os.ST_NOSUID, MS_NOSUID), (os.ST_NODEV, MS_NODEV), (os.ST_NOEXEC, MS_NOEXEC))
    has = os.statvfs(path).f_flag
    flags = sum(flag for bit, flag in pairs if has & bit)
    for bit, flag in ((os.ST_NOATIME, 1 << 10), (os.ST_NODIRATIME, 1 << 11), (os.ST_RELATIME, 1 << 21)):
        flags |= flag if has & bit else 0
    return flags


def _set_line(path: str, name: str, line: str) -> None:
    """Makes `line` the first entry of a colon-separated file and removes other entries called `name`."""
    others = []
    with contextlib.suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
        lines = file.read().decode(errors="replace").splitlines()
        others = [old for old in lines if old.split(":", 1)[0] != name]
    _write(path, "\n".join([line, *others]) + "\n")


def _copy_tree(source: str, target: str, uid: int, names: Dict[int, str]) -> None:
    """Copies the entries of a directory, and its mode and times, to another directory. All belong to `uid`.

    `names` has the copies of files with several names, by their inode number. Directories of other file systems are
    left out, because an image's home may be a link to its root directory, where the slot's other mounts are.
    """
    own = os.stat(source)
    with os.scandir(source) as entries:
        for entry in entries:
            status, path = entry.stat(follow_symlinks=False), f"{target}/{entry.name}"
            if stat.S_ISDIR(status.st_mode):
                if status.st_dev == own.st_dev:
                    os.mkdir(path)
                    _copy_tree(entry.path, path, uid, names)
            elif stat.S_ISLNK(status.st_mode):
                os.symlink(os.readlink(entry.path), path)
                _copy_status(status, path, uid)
            elif stat.S_ISREG(status.st_mode):
                if status.st_nlink > 1 and names.setdefault(status.st_ino, path) != path:
                    os.link(names[status.st_ino], path)
                    continue
                _copy_content(entry.path, path, status)
                _copy_status(status, path, uid)
    _copy_status(own, target, uid)


def _copy_content(source: str, target: str, status: os.stat_result) -> None:
    """Copies a file's content to a new file, which has the same holes."""
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    target_fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        sparse, start, end = status.st_blocks * 512 < status.st_size, 0, status.st_size
        if sparse:
            os.ftruncate(target_fd, end)
        while start < status.st_size:
            if sparse:
                try:
                    start = os.lseek(source_fd, start, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:  # only a hole is left
                        raise
                    break
                end = os.lseek(source_fd, start, os.SEEK_HOLE)
                os.lseek(target_fd, start, os.SEEK_SET)
            while start < end and (sent := os.sendfile(target_fd, source_fd, start, end - start)):
                start += sent
            if start < end:
                raise OSError(errno.EIO, f"{source} is shorter than {status.st_size} bytes")
    finally:
        os.close(source_fd)
        os.close(target_fd)


def _copy_status(status: os.stat_result, path: str, uid: int) -> None:
    """Owner, mode and times; the owner first, because chown(2) clears set-id bits."""
    os.chown(path, uid, uid, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(path, stat.S_IMODE(status.st_mode))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


# These make few system calls, because those are most of the time that a slot's start waits for its steps.


def _make_directory(path: str) -> None:
    """Makes a directory and its missing parents, each with mode 0755."""
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        pass
    except FileNotFoundError:
        os.makedirs(path, 0o755, exist_ok=True)


def _write(path: str, text: str) -> None:
    """Replaces a file by a new one with mode 0644, so that a symbolic link at `path` is not followed."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with open(fd, "wb", buffering=0) as file:
        left = memoryview(text.encode())
        while left:
            left = left[file.write(left):]
