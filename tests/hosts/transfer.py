"""Copying between this machine and a host, by tar on both sides: one stream for any driver.

The rules are cp's: into DEST when it is an existing directory or ends in `/`, else to the name DEST, which
appears only when it is whole. Sparse files, modes and numeric owners are kept.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hosts.errors import BadArgument, CommandFailed

if TYPE_CHECKING:
    from hosts.host import Host

# $1 is DEST, $2 the name in the stream. What is new appears under its name only when it is whole.
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
        source.stdout.close()  # the unpacker's now: were it to die, the packer must see a broken pipe
        _nothing, sink_error = sink.communicate()
        source_error = source.stderr.read()
    if source.returncode or sink.returncode:
        said = (source_error + sink_error).decode(errors="replace")
        raise CommandFailed(host.name, ["copy", what], source.returncode or sink.returncode, "", said)
