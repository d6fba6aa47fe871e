# SPDX-License-Identifier: BSD-3-Clause
"""Adapts an unpacked image to slots, and names what is different from a container, for the person who imports it.

The user of a slot has an id of its own, and no process of a slot is the image's user or root. So files that the image's
user may read become readable for all users of the image, by `open_files`. Nothing becomes writable. `keep_path` lets
login shells have the PATH of the manifest, and `open_environment` lets pip install packages in the home.

The tree is private to the caller, so no file of it is replaced meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import shlex
import stat
from collections.abc import Collection, Sequence
from typing import NamedTuple

from nbagent.image import jupyter
from nbagent.image import manifest as manifests
from nbagent.image.archive import Chown
from nbagent.image.manifest import Manifest
from nbagent.image.passwd import Account
from nbagent.untrusted.refusal import Refused, plain
from nbagent.untrusted.tar import Parts, name_parts
from nbagent.untrusted.tree import Tree

# The software of an image whose user is root. Other files of root may be private, such as /etc/shadow.
_SOFTWARE = (("usr",), ("opt",), ("srv",))
# A home that takes a slot longer to copy than the rest of its start, as measured on two processors.
_HOME_BYTES, _HOME_ENTRIES = 20 << 20, 2000
# A directory that everyone may write to, and which a slot may not because a copy of it would take too long; and the
# number of those that it may.
_PUBLIC_BYTES, _PUBLIC_ENTRIES, _PUBLIC_MAX = 20 << 20, 2000, 64
# Directories where a slot has files of its own.
_OWN: tuple[Parts, ...] = (
    ("dev",), ("proc",), ("run", "jupyter"), ("run", "nbagent"), ("sys",), ("tmp",), ("var", "tmp"),
)
# The working directory is neither opened nor copied if it is one of these.
_OF_SYSTEM: tuple[Parts, ...] = (
    ("bin",), ("boot",), ("etc",), ("lib",), ("lib64",), ("sbin",), ("usr",), ("usr", "bin"), ("usr", "lib"), ("var",),
)
_NAMES_SHOWN = 3
_PROFILE, _PROFILES = ("etc", "profile"), ("etc", "profile.d")
# A login shell reads it before the image's other scripts there, which may add directories to PATH.
_PATH_SCRIPT = "00-nbagent-path.sh"
_PATH_LINES = "# Written by nbagent, because /etc/profile replaces the PATH of the image.\nPATH={}\n"
# The file in a virtual environment's directory, and its setting for the packages of its interpreter and the user's
# (site.py of CPython, https://docs.python.org/3/library/site.html).
_ENVIRONMENT, _ENVIRONMENT_BYTES = "pyvenv.cfg", 1 << 16
_SYSTEM_PACKAGES = re.compile(rb"^\s*include-system-site-packages\s*=\s*true\s*$", re.MULTILINE | re.IGNORECASE)
# The module site executes the line twice in a virtual environment: before and after it has disabled the user's
# packages, which is when ENABLE_USER_SITE is False.
_USER_PACKAGES_FILE = "nbagent-user-packages.pth"
USER_PACKAGES = (
    "import site; "
    "site.ENABLE_USER_SITE = site.check_enableusersite() if site.ENABLE_USER_SITE is False else site.ENABLE_USER_SITE; "
    "site.addusersitepackages(None)\n"
)
_SETS_PATH = re.compile(rb"^\s*(export\s+)?PATH=", re.MULTILINE)


class Size(NamedTuple):
    """The bytes of a directory's files, and the number of entries in it."""

    size_bytes: int
    entries: int


def adapt(
    tree: Tree, id_base: int, account: Account, manifest: Manifest, left_out: Sequence[str], chown: Chown = os.chown
) -> tuple[str, ...]:
    """Makes the working directory, and opens the image's files to its slots; returns sentences about what is different
    from a container.
    """
    notes = []
    if left_out:
        names = ", ".join(plain(name) for name in left_out[:_NAMES_SHOWN])
        more = f" and {len(left_out) - _NAMES_SHOWN} more" if len(left_out) > _NAMES_SHOWN else ""
        notes.append(f"left out, because a slot has its own: {names}{more}")
    make_directory(tree, id_base, manifest, chown)
    opened = open_files(tree, id_base, account, manifest)
    if opened:
        notes.append(
            f"made readable for slots, whose user has another id than the image's user {account.uid}:"
            f" {opened} files and directories"
        )
    size = home_size(tree, manifest.home)
    if size.size_bytes > _HOME_BYTES or size.entries > _HOME_ENTRIES:
        notes.append(
            f"the home {manifest.home} has {size.entries:,} files of {size.size_bytes / 1e6:,.0f} MB, which every slot"
            " copies into its memory when it starts; put what users do not change into another directory, such as"
            " /srv, and link it from the home"
        )
    if manifest.python and (scripts := jupyter.activation(tree, manifest.python)):
        notes.append(
            f"{scripts} is run once for all slots, by activate of the manifest; of its effects the variables are kept"
            if manifest.activate else
            f"{scripts} is not run, because the manifest has no script activate"
        )
    return tuple(notes)


def open_files(tree: Tree, id_base: int, account: Account, manifest: Manifest) -> int:
    """Lets every user of the image read what `account` may read; returns the number of files and directories.

    Of an account that is root only the software: /usr, /opt, /srv, and the directories of the manifest's interpreter;
    and the working directory.
    """
    opened = 0
    tops: list[Parts] = [()]
    if account.uid == 0:
        tops = [top for top in _SOFTWARE if _is_directory(tree, top)]
        ancestors, more = _ways(tree, manifest.python) if manifest.python else ([], [])
        working = _resolved_directory(tree, manifest.directory)
        if working and working not in _OF_SYSTEM and manifest.directory != manifest.home:
            ancestors += [working[:depth] for depth in range(1, len(working))]
            more.append(working)
            opened += _open(tree, working, id_base, account, 0o5)
        opened += sum(_open(tree, parts, id_base, account, 0o1) for parts in ancestors)
        tops += [top for top in dict.fromkeys(more) if top and not any(_is_below(top, known) for known in tops)]
    for top in tops:
        for _, directories, files, directory_fd in os.fwalk(".", dir_fd=tree.directory_fd(top)):
            for name in (*directories, *files):
                status = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
                opened += _widen(name, directory_fd, status, id_base, account, 0o5)
    return opened


def make_directory(tree: Tree, id_base: int, manifest: Manifest, chown: Chown = os.chown) -> None:
    """Makes the working directory if the image does not have it, as a container's runtime does when it starts."""
    with contextlib.suppress(OSError, Refused):
        parts = tree.resolve(name_parts(manifest.directory))
        for depth in range(1, len(parts) + 1):
            if manifest.directory == manifest.home or _is_directory(tree, parts[:depth]):
                continue
            with tree.directory(parts[:depth - 1]) as directory_fd:
                os.mkdir(parts[depth - 1], dir_fd=directory_fd)
                os.chmod(parts[depth - 1], 0o755, dir_fd=directory_fd)  # noqa: S103  whatever the umask is
                chown(parts[depth - 1], id_base, id_base, dir_fd=directory_fd, follow_symlinks=False)


def keep_path(tree: Tree, id_base: int, manifest: Manifest, chown: Chown = os.chown) -> None:
    """Adds a script that sets the manifest's PATH in login shells, if /etc/profile sets another, as Debian's does.

    JupyterLab's terminals are login shells when the server has no terminal. They would find other programs than
    notebooks do, such as Debian's Python instead of the one in /opt/conda.
    """
    path = manifest.environment.get("PATH")
    # Not in an image whose directory is a link or missing, or has a directory of this name.
    with contextlib.suppress(OSError):
        if path is None or (file := tree.open_regular(_PROFILE)) is None:
            return
        with file:
            if not _SETS_PATH.search(file.read(manifests.MAX_BYTES)):
                return
        lines = _PATH_LINES.format(shlex.quote(path)).encode()
        _replace(tree, (*_PROFILES, _PATH_SCRIPT), lines, 0o644, id_base, chown)


def open_environment(tree: Tree, id_base: int, manifest: Manifest, chown: Chown = os.chown) -> tuple[str, ...]:
    """Lets a virtual environment have the user's packages, below ~/.local and after its own; a note of it.

    No slot can write to the environment, so pip installs packages for the user, as with an interpreter that is not of
    an environment. Without this file the environment would not read them.
    """
    if manifest.python is None:
        return ()
    prefix = posixpath.dirname(posixpath.dirname(manifest.python))
    written = False
    with contextlib.suppress(OSError, Refused):
        directory = tree.resolve(name_parts(prefix))
        if (file := tree.open_regular((*directory, _ENVIRONMENT))) is None:
            return ()
        with file:
            if _SYSTEM_PACKAGES.search(file.read(_ENVIRONMENT_BYTES)):
                return ()
        libraries = tree.resolve((*directory, "lib"))
        with tree.directory(libraries) as directory_fd, os.scandir(directory_fd) as entries:
            names = sorted(entry.name for entry in entries if entry.name.startswith("python"))
        for name in names:
            with contextlib.suppress(OSError):
                packages = tree.resolve((*libraries, name, "site-packages"))
                if _is_directory(tree, packages):
                    _replace(tree, (*packages, _USER_PACKAGES_FILE), USER_PACKAGES.encode(), 0o644, id_base, chown)
                    written = True
    if not written:
        return ()
    return (f"{prefix}: its Python also has the packages of the user, below ~/.local, where pip installs in slots",)


def _replace(tree: Tree, parts: Parts, content: bytes, mode: int, id_base: int, chown: Chown) -> None:
    """Writes a file of root of the image; a new one, because the former one may be a hard link of another image's."""
    with tree.directory(parts[:-1]) as directory_fd:
        tree.remove_file(parts)
        with open(tree.create_file(parts, mode), "wb") as output:
            os.fchmod(output.fileno(), mode)
            output.write(content)
        chown(parts[-1], id_base, id_base, dir_fd=directory_fd, follow_symlinks=False)


def own_directory(tree: Tree, id_base: int, account: Account, manifest: Manifest) -> tuple[str, ...]:
    """The working directory, if the user of a container may write to it and it is no directory of the system.

    In a slot it would be read-only, so that no notebook could be saved in an image with `WORKDIR /app`.
    """
    working = _resolved_directory(tree, manifest.directory)
    try:
        others = (*_OWN, tree.resolve(name_parts(manifest.home)))
    except (OSError, Refused):
        return ()
    if not working or working in _OF_SYSTEM or any(
        _is_below(working, other) or _is_below(other, working) for other in others
    ):
        return ()
    status = os.fstat(tree.directory_fd(working))
    may_write = account.uid == 0 or (
        status.st_mode & stat.S_IWUSR and status.st_uid == id_base + account.uid
    ) or (status.st_mode & stat.S_IWGRP and status.st_gid == id_base + account.gid)
    return ("/" + "/".join(working),) if may_write else ()


def public_directories(
    tree: Tree, manifest: Manifest, own: Collection[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The directories outside of the home that everyone may write to, and sentences about those that are read-only in
    slots nevertheless. Of a directory within another, only the outer one is among them. The working directory is one of
    them if it is in `own`.
    """
    skipped: list[Parts] = [*_OWN]
    with contextlib.suppress(OSError, Refused):
        skipped.append(tree.resolve(name_parts(manifest.home)))
    working = _resolved_directory(tree, manifest.directory)
    if "/" + "/".join(working) not in own:
        working = ()
    found: list[Parts] = []
    for path, directories, _, directory_fd in os.fwalk(".", dir_fd=tree.directory_fd(())):
        parts = tuple(path.split("/")[1:])
        if parts in skipped:
            directories.clear()
        elif parts and (parts == working or os.fstat(directory_fd).st_mode & stat.S_IWOTH):
            found.append(parts)
            directories.clear()
    public: list[str] = []
    notes = []
    for parts in sorted(found):
        name, size = "/" + "/".join(parts), _size(tree.directory_fd(parts))
        if plain(name) != name:
            continue
        if size.size_bytes > _PUBLIC_BYTES or size.entries > _PUBLIC_ENTRIES or len(public) == _PUBLIC_MAX:
            who = "the image's user" if parts == working else "everyone"
            notes.append(
                f"{name}, to which {who} may write, is read-only in slots, because each would copy its"
                f" {size.entries:,} files of {size.size_bytes / 1e6:,.0f} MB into its memory"
            )
        else:
            public.append(name)
    return tuple(public), tuple(notes[:_NAMES_SHOWN])


def home_size(tree: Tree, home: str) -> Size:
    """The size of the home directory; links are followed to it, and not in it."""
    try:
        return _size(tree.directory_fd(tree.resolve(name_parts(home))))
    except (OSError, Refused):
        return Size(0, 0)


def _size(top_fd: int) -> Size:
    size_bytes = entries = 0
    for _, directories, files, directory_fd in os.fwalk(".", dir_fd=top_fd):
        entries += len(directories) + len(files)
        for name in files:
            size_bytes += os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_size
    return Size(size_bytes, entries)


def _ways(tree: Tree, python: str) -> tuple[list[Parts], list[Parts]]:
    """The directories on the way to the interpreter, and its prefixes: of the given path, and where its links lead."""
    places = [name_parts(python)]
    # Each link of a chain has a directory of its own: /root/venv/bin/python, python3, and the interpreter itself.
    for _ in range(_NAMES_SHOWN):
        try:
            directory = tree.resolve(places[-1][:-1])
            target = os.readlink(places[-1][-1], dir_fd=tree.directory_fd(directory))
            places[-1] = (*directory, places[-1][-1])
            parts = target.strip("/").split("/")
            start = () if target.startswith("/") else directory
            places.append((*tree.resolve((*start, *parts[:-1])), parts[-1]))
        except (OSError, Refused):  # no further link
            break
    if (found := jupyter.resolved(tree, python)) is not None:
        places.append(found)
    ancestors = {place[:depth] for place in places for depth in range(1, len(place))}
    prefixes = dict.fromkeys(place[:-2] for place in places if len(place) > 2 and place[-2] == "bin")
    return sorted(ancestors), [prefix for prefix in prefixes if _is_directory(tree, prefix)]


def _open(tree: Tree, parts: Parts, id_base: int, account: Account, bits: int) -> int:
    if not _is_directory(tree, parts):
        return 0
    return _widen(".", tree.directory_fd(parts), os.fstat(tree.directory_fd(parts)), id_base, account, bits)


def _widen(name: str, directory_fd: int, status: os.stat_result, id_base: int, account: Account, bits: int) -> int:
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return 0
    if status.st_uid == id_base + account.uid:
        allowed = status.st_mode >> 6
    elif status.st_gid == id_base + account.gid:
        allowed = status.st_mode >> 3
    else:
        return 0
    mode = stat.S_IMODE(status.st_mode)
    if (wider := mode | allowed & bits) == mode:
        return 0
    os.chmod(name, wider, dir_fd=directory_fd)
    return 1


def _resolved_directory(tree: Tree, path: str) -> Parts:
    """The directory that an absolute path of the image leads to; () if it does not exist or is none."""
    try:
        parts = tree.resolve(name_parts(path))
    except (OSError, Refused):
        return ()
    return parts if _is_directory(tree, parts) else ()


def _is_directory(tree: Tree, parts: Parts) -> bool:
    try:
        tree.directory_fd(parts)
    except OSError:
        return False
    return True


def _is_below(parts: Parts, top: Parts) -> bool:
    return parts[: len(top)] == top
