# SPDX-License-Identifier: BSD-3-Clause
"""The open files and shared mappings that every fork of a zygote inherits.

A file that is open when the zygote forks is open in all slots of the image, with one offset and one inode: a database
that an extension opened would be common to all users, and writable by each. So a zygote keeps the closed list of
descriptors that it needs itself, and no writable mapping of a file that is shared; an image whose server opens another
file at its start is refused, and its slots start by exec. `Openers` finds which extension or module opened the file, so
that the message names it.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, Callable, Dict, FrozenSet, Iterable, Iterator, List, Optional, Tuple

# The channel and placeholders below these numbers are the zygote's own (nbagent.zygote.zygote.main).
_MAPS = "/proc/self/maps"


EXTENSION, MODULE = "extension", "module"
# After the name of an extension that did so when its module was imported, before the server linked or loaded it.
IMPORTED = ", when it is imported"


class Inherited(Exception):
    """The image's server has files open that all its slots would share, or threads, which a fork does not copy.

    `extensions` and `modules` have those that caused all of it, with the reason, when others caused none; `imported`
    has the extensions whose import caused it.
    """

    def __init__(self, text: str, culprits: Iterable[Tuple[Optional[str], str]] = ()) -> None:
        super().__init__(text)
        self.extensions: Dict[str, str] = {}
        self.imported: List[str] = []
        self.modules: Dict[str, str] = {}
        self.avoidable = True
        for culprit, reason in culprits:
            label = culprit or ""
            at_import = label.endswith(IMPORTED)
            label = label[:-len(IMPORTED)] if at_import else label
            _, kind, name = label.split(" ", 2) if label.count(" ") == 2 else ("", "", "")
            if kind == EXTENSION:
                self.extensions.setdefault(name, reason)
                self.imported += [name] if at_import else []
            elif kind == MODULE:
                self.modules.setdefault(name, reason)
            else:
                self.avoidable = False


def threads() -> int:
    """The number of threads of this process."""
    return len(os.listdir("/proc/self/task"))


def descriptors() -> FrozenSet[int]:
    """The open descriptors of this process."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            os.fstat(int(name))
            found.add(int(name))
    return frozenset(found)


class Openers:
    """The extension or module that opened each file that is still open, and that started each thread.

    `settle` ends the threads that a library ends before a fork, and starts again when it needs them, as OpenBLAS does.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self._settle = settle
        self._names: Dict[str, str] = {}
        self._threads: Dict[str, int] = {}

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Attributes the files that are opened in this context, and stay open, to `name`, and the threads."""
        before, running = _open_files(), threads()
        try:
            yield
        finally:
            if threads() > running:
                self._settle()
                if (more := threads() - running) > 0:
                    self._threads[name] = more
            for file in _open_files() - before:
                self._names.setdefault(file, name)

    @contextlib.contextmanager
    def of_methods(self, cls: Any, **methods: str) -> Iterator[None]:
        """Attributes the files that calls of these methods open to the methods' first argument, an extension's name.

        The value of each method is appended to the name.
        """
        originals = {method: vars(cls)[method] for method in methods}

        def watched(original: Any, suffix: str) -> Any:
            @functools.wraps(original)
            def call(instance: Any, name: str, *arguments: Any, **options: Any) -> Any:
                with self.during(f"the extension {name}{suffix}"):
                    return original(instance, name, *arguments, **options)

            return call

        for method, original in originals.items():
            setattr(cls, method, watched(original, methods[method]))
        try:
            yield
        finally:
            for method, original in originals.items():
                setattr(cls, method, original)

    def check(self, allowed: FrozenSet[int]) -> None:
        """Raises Inherited when a descriptor is open that is not `allowed`, or a file is mapped shared and writable."""
        found = [os.readlink(f"/proc/self/fd/{fd}") for fd in sorted(descriptors() - allowed)]
        found += sorted(_shared_mappings())
        if found:
            files = "; ".join(dict.fromkeys(self._described(file) for file in found))
            raise Inherited(
                f"slots that are forked would share open files of the server: {files}",
                [(self._names.get(file), f"{file} is open") for file in found],
            )

    def check_extensions(self) -> None:
        """Raises Inherited when an extension has a file with a path open; before the warm-up, which takes longer."""
        found = [
            (file, name) for file, name in sorted(self._names.items())
            if name.startswith(f"the {EXTENSION} ") and file.startswith("/") and file in _open_files()
        ]
        if found:
            files = "; ".join(self._described(file) for file, _ in found)
            raise Inherited(
                f"slots that are forked would share open files of the server: {files}",
                [(name, f"{file} is open") for file, name in found],
            )

    def check_threads(self) -> None:
        """Raises Inherited when this process has more than one thread; a fork has ended those that allow it before."""
        if (running := threads()) == 1:
            return
        started = ", ".join(f"{number} by {name}" for name, number in self._threads.items()) or "by the server"
        culprits: List[Tuple[Optional[str], str]] = [
            (name, f"{number} threads run") for name, number in self._threads.items()
        ]
        raise Inherited(f"{running - 1} threads run besides the main one, started: {started}", culprits or [(None, "")])

    def _described(self, file: str) -> str:
        return f"{file}, opened by {self._names.get(file, 'the server')}"


def _open_files() -> FrozenSet[str]:
    """The links of all open files, and the paths of shared writable mappings."""
    links = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            links.add(os.readlink(f"/proc/self/fd/{name}"))
    return frozenset(links | _shared_mappings())


def _shared_mappings() -> FrozenSet[str]:
    """The files that are mapped shared and writable; anonymous shared memory as "/dev/zero (deleted)"."""
    found = set()
    with open(_MAPS) as file:
        for line in file:
            # The address, then the permissions such as rw-s, offset, device, inode and path (proc_pid_maps(5)).
            fields = line.split(None, 5)
            if fields[1].startswith("rw") and fields[1].endswith("s"):
                found.add(fields[5].rstrip("\n") if len(fields) > 5 else "a shared mapping without a name")
    return frozenset(found)
