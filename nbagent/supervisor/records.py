"""The small file of each slot: with what systemd runs, the whole truth about slots.

    /run/nbagent/slots/SLOT/slot.json    the Slot, mode 0600: it holds the token
    /run/nbagent/slots/SLOT/http.sock    where the slot listens; the router's only address
    /run/nbagent/slots/SLOT/static       link to the image's static files, for the router

A slot's own processes never see this directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from nbagent.core.model import Slot

BACKLOG = 1024


class Records:
    """The directory of slots."""

    def __init__(self, path: Path, socket_gid: int) -> None:
        self.path = path
        self.socket_gid = socket_gid

    def create(self, slot: Slot, static: Path) -> socket.socket:
        """Makes the slot's directory and returns its listening socket."""
        directory = self.path / slot.id
        directory.mkdir(mode=0o711)
        self.save(slot)
        (directory / "static").symlink_to(static)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Never reachable with another mode or group than the last, not even for a moment.
        previous = os.umask(0o177)
        try:
            listener.bind(str(directory / "http.sock"))
        finally:
            os.umask(previous)
        os.chown(directory / "http.sock", 0, self.socket_gid)
        os.chmod(directory / "http.sock", 0o660)
        listener.listen(BACKLOG)
        return listener

    def save(self, slot: Slot) -> None:
        """Writes the slot's file whole or not at all. It is on tmpfs, so there is no fsync."""
        file = f"{self.path}/{slot.id}/slot.json"
        fd = os.open(f"{file}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb", buffering=0) as stream:
            stream.write(json.dumps(slot.save()).encode())
        os.rename(f"{file}.new", file)

    def load(self) -> Iterator[tuple[str, Slot | None]]:
        """Every slot's name with its Slot, or None where the file is missing, broken or another slot's."""
        for directory in sorted(self.path.iterdir()):
            if not directory.is_dir():
                continue
            try:
                slot = Slot.restore(json.loads((directory / "slot.json").read_text()))
            except (OSError, ValueError, KeyError, TypeError):
                slot = None
            yield directory.name, slot if slot is not None and slot.id == directory.name else None

    def http_path(self, slot: Slot) -> Path:
        """The slot's socket."""
        return self.path / slot.id / "http.sock"

    def remove(self, name: str) -> None:
        """Removes all of a slot's directory: from now on the router says that the slot is gone.

        One that is not there is removed.
        """
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path / name)
