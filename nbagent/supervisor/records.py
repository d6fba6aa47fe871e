# SPDX-License-Identifier: BSD-3-Clause
"""The directory of each slot. These files and systemd's scopes are the whole persistent state of slots.

    /run/nbagent/slots/SLOT/slot.json    the Slot, mode 0600: it holds the token
    /run/nbagent/slots/SLOT/http.sock    the listening socket of the slot, to which the router connects
    /run/nbagent/slots/SLOT/static       link to the image's static files, for the router
    /run/nbagent/slots/SLOT/meminfo      the slot's memory, its /proc/meminfo (nbagent.supervisor.limit_files)
    /run/nbagent/slots/SLOT/online       the processors of its quota, in its /sys

The directory is not in the mount namespaces of slots; the last two files are, below an overlay of their slot. It is
set-group-ID (packaging/nbagent.tmpfiles), so that the socket has the router's group without a right to change groups.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from nbagent.core.model import Slot
from nbagent.supervisor import limit_files
from nbagent.supervisor.limit_files import LimitFiles
from nbagent.wire.limits_page import SlotLimits

BACKLOG = 1024
# A slot that starts and is claimed has so many files here and in paths.SESSIONS, each of a page: with directory, link,
# socket and the files that replace others.
CHECK_FILES, CHECK_BYTES = 10, 4096
_FILES = ("slot.json", "slot.json.new", "http.sock", "static", *limit_files.NAMES)


class Records:
    """The directories of all slots below one path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, slot: Slot, static: Path) -> socket.socket:
        """Creates the slot's directory and returns its listening socket."""
        directory = self.path / slot.id
        directory.mkdir(mode=0o711)
        self.save(slot)
        (directory / "static").symlink_to(static)
        self.limit_files(slot).create(SlotLimits.of(slot.limits))
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Any process can connect to a socket by its mode.
        previous = os.umask(0o117)
        try:
            listener.bind(str(directory / "http.sock"))
        finally:
            os.umask(previous)
        listener.listen(BACKLOG)
        return listener

    def save(self, slot: Slot) -> None:
        """Replaces the slot's file atomically, without fsync, because it is on a tmpfs."""
        file = f"{self.path}/{slot.id}/slot.json"
        fd = os.open(f"{file}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb", buffering=0) as stream:
            stream.write(json.dumps(slot.save()).encode())
        os.rename(f"{file}.new", file)

    def check(self) -> None:
        """Writes and removes as much as a slot that starts and is claimed needs. Raises OSError."""
        probes = [self.path / f".check-{number}" for number in range(CHECK_FILES)]
        try:
            for probe in probes:
                with probe.open("wb", buffering=0) as file:
                    file.write(bytes(CHECK_BYTES))
        finally:
            for probe in probes:
                probe.unlink(missing_ok=True)

    def load(self) -> Iterator[tuple[str, Slot | None]]:
        """The name of every directory with its Slot, or None if the file is missing, broken or of another slot."""
        for directory in sorted(self.path.iterdir()):
            if not directory.is_dir():
                continue
            try:
                slot = Slot.restore(json.loads((directory / "slot.json").read_text()))
            except (OSError, ValueError, KeyError, TypeError):
                slot = None
            yield directory.name, slot if slot is not None and slot.id == directory.name else None

    def limit_files(self, slot: Slot) -> LimitFiles:
        """The files that show the slot's limits in the slot."""
        return LimitFiles(self.path / slot.id)

    def http_path(self, slot: Slot) -> Path:
        """The path of the slot's socket."""
        return self.path / slot.id / "http.sock"

    def remove(self, name: str) -> None:
        """Removes the slot's directory, if it exists; from then on the router responds that the slot has ended.

        By names, because rmtree() fails while the process has no descriptor left. Raises OSError.
        """
        directory = self.path / name
        for file in _FILES:
            (directory / file).unlink(missing_ok=True)
        try:
            directory.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            shutil.rmtree(directory)
