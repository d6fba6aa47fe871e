# SPDX-License-Identifier: BSD-3-Clause
"""Copying between this machine and a host, by tar on both sides: one stream for any driver.

The rules are cp's: into DEST when it is an existing directory or ends in `/`, else to the name DEST, which
appears only when it is whole. Sparse files, modes and numeric owners are kept.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from testhost_driver import state
from testhost_driver.errors import BadArgument, CommandFailed

if TYPE_CHECKING:
    from testhost_driver.host import Host

# $1 is DEST, $2 the name in the stream. A new file gets its name only when it is complete.
UNPACK = r"""
set -e
case $1 in */) mkdir -p "$1" ;; esac
if [ -d "$1" ]; then exec tar -x --numeric-owner -p -C "$1" -f -; fi
into=$(dirname "$1")
temporary=$(mktemp -d "$into/.copy.XXXXXX")
trap 'rm -rf "$temporary"' EXIT
tar -x --numeric-owner -p -C "$temporary" -f -
mv -fT "$temporary/$2" "$1"
"""
# An emulated processor decrypts ssh at a few megabytes a second. A large stream therefore goes through a second
# disk of the guest: the driver writes the disk's file, and the guest reads it with O_DIRECT, because its page cache
# may hold the previous stream.
MAILBOX = "mailbox"
MAILBOX_BYTES = 16 << 30  # sparse
MAILBOX_FROM_BYTES = 1 << 20
UNPACK_MAILBOX = 'dd if=/dev/vdb iflag=direct bs=1M count="$1" status=none | sh -c "$2" unpack "$3" "$4"'
PACK = 'exec tar -c --sparse --numeric-owner -C "$(dirname -- "$1")" -f - -- "$(basename -- "$1")"'


def copy_in(host: Host, sources: Sequence[Path], dest: str) -> None:
    if not dest.startswith("/"):
        raise BadArgument(f"{host.name}:{dest}: a path in a host starts with '/'")
    if len(sources) > 1 and host.run(["test", "-d", dest], check=False).returncode:
        raise BadArgument(f"{host.name}:{dest} is not a directory")
    for source in sources:
        if not source.exists():
            raise BadArgument(f"{source}: no such file")
        whole = source.resolve() if source.name in ("", "..") else source
        if host.driver == "vm" and _is_large(source):
            _mail(host, _local(PACK, str(whole)), dest, whole.name)
            continue
        _pipe(
            host,
            _local(PACK, str(whole)),
            host.command(["sh", "-c", UNPACK, "unpack", dest, whole.name]),
            str(source),
        )


def copy_out(host: Host, source: str, dest: str) -> None:
    if not source.startswith("/"):
        raise BadArgument(f"{host.name}:{source}: a path in a host starts with '/'")
    clean = source.rstrip("/")
    packer = host.command(["sh", "-c", PACK, "pack", clean])
    _pipe(host, packer, _local(UNPACK, dest, Path(clean).name), f"{host.name}:{source}")


def _is_large(source: Path) -> bool:
    files = source.rglob("*") if source.is_dir() else [source]
    total = 0
    for file in files:
        total += file.lstat().st_size
        if total >= MAILBOX_FROM_BYTES:
            return True
    return False


def _mail(host: Host, packer: list[str], dest: str, name: str) -> None:
    directory = state.host_directory(host.name)
    with state.locked(directory / f"{MAILBOX}.lock"), open(directory / MAILBOX, "r+b") as mailbox:
        done = subprocess.run(
            packer, check=False, stdin=subprocess.DEVNULL, stdout=mailbox, stderr=subprocess.PIPE
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace")
            raise CommandFailed(host.name, ["copy", name], done.returncode, "", said)
        # The child wrote through the same open file description, so the file offset is the end of its stream.
        blocks = -(-os.lseek(mailbox.fileno(), 0, os.SEEK_CUR) >> 20)
        host.run(["sh", "-c", UNPACK_MAILBOX, "mail", str(blocks), UNPACK, dest, name], timeout=600)


def _local(script: str, *arguments: str) -> list[str]:
    return ["sh", "-c", script, "copy", *arguments]


def _pipe(host: Host, packer: list[str], unpacker: list[str], what: str) -> None:
    with (
        subprocess.Popen(
            packer, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as source,
        subprocess.Popen(
            unpacker, stdin=source.stdout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as sink,
    ):
        assert source.stdout is not None and source.stderr is not None
        source.stdout.close()  # only the unpacker holds it now, so that its death is a broken pipe for the packer
        _nothing, sink_error = sink.communicate()
        source_error = source.stderr.read()
    if source.returncode or sink.returncode:
        said = (source_error + sink_error).decode(errors="replace")
        raise CommandFailed(host.name, ["copy", what], source.returncode or sink.returncode, "", said)
