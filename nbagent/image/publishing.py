# SPDX-License-Identifier: BSD-3-Clause
"""Uploads an image's web assets to object storage by rclone, so that pages of slots load them from there.

TARGET/assets/DIGEST/ gets the tree that the router serves at /assets/DIGEST/, with the type, the encoding and the cache
header of each file. Object storage does not choose between encodings, so a file that compression makes smaller is
stored compressed by gzip, which every browser accepts. The first script of JupyterLab is uploaded last: pages of an
image that is not there completely miss it, and then load the program from the router.

rclone compares checksums and uploads what is missing, so that a second run uploads nothing and an interrupted one is
continued. It reads its own configuration: /root/.config/rclone/rclone.conf, or RCLONE_CONFIG_….
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbagent.core.errors import ImageInvalid, PublishFailed
from nbagent.image import ahead

CACHE_CONTROL = "public, max-age=31536000, immutable"
_ENCODINGS = (".gz", ".br")
# Three tries of each file in rclone; the time-outs bound one that a target does not answer.
_OPTIONS = ("--checksum", "--copy-links", "--retries=3", "--low-level-retries=3", "--timeout=1m", "--contimeout=15s",
            "--transfers=8", "--use-json-log", "--log-level=INFO", "--stats=0")
_COPIED = re.compile(r"Copied \(")
_DIGEST = re.compile(r"sha256-[0-9a-f]{64}")
_LINES_MAX = 3


@dataclass(frozen=True)
class Upload:
    """Files for one run of rclone: by their path at the target, the file that is uploaded."""

    files: dict[str, Path]
    encoding: str | None = None


def plan(static: Path) -> list[Upload]:
    """The uploads of a published tree, in order."""
    files = {str(path.relative_to(static)): path for path in sorted(static.rglob("*")) if path.is_file()}
    shown = {name: path for name, path in files.items() if not _is_encoded(name, files)}
    packed = {name: files[f"{name}.gz"] for name in shown if f"{name}.gz" in files}
    last = {path.partition("?")[0] for path in _ahead(static)[:1]}
    uploads = [
        Upload({name: path for name, path in files.items() if (name in last) == is_last}, encoding)
        for is_last in (False, True)
        for files, encoding in (
            (packed, "gzip"), ({name: path for name, path in shown.items() if name not in packed}, None))
    ]
    return [upload for upload in uploads if upload.files]


def publish(static: Path, digest: str, target: str) -> tuple[int, int]:
    """Upload a published tree to TARGET/assets/DIGEST; the files that were uploaded, and all. Raises PublishFailed."""
    if not static.is_dir() or not (uploads := plan(static)):
        raise ImageInvalid(f"{digest} has no web assets to publish; its manifest has no [static], see images/README.md")
    copied = 0
    for upload in uploads:
        with tempfile.TemporaryDirectory(prefix="nbagent-publish-") as name:
            for path, file in upload.files.items():
                link = Path(name, path)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())
            headers = [f"Cache-Control: {CACHE_CONTROL}"]
            if upload.encoding:
                headers.append(f"Content-Encoding: {upload.encoding}")
            options = [*_OPTIONS, *(f"--header-upload={header}" for header in headers)]
            done = _rclone(["copy", *options, name, _below(target, digest)], target)
            copied += sum(1 for line in _messages(done.stderr) if _COPIED.match(line))
    return copied, sum(len(upload.files) for upload in uploads)


def remove_unused(target: str, needed: Collection[str]) -> list[str]:
    """Delete the images of TARGET/assets whose digest is not in `needed`; their digests. Raises PublishFailed."""
    done = _rclone(["lsf", "--dirs-only", _below(target)], target)
    found = [line.rstrip("/") for line in done.stdout.splitlines()]
    unused = [digest for digest in found if _DIGEST.fullmatch(digest) and digest not in needed]
    for digest in unused:
        _rclone(["purge", "--use-json-log", _below(target, digest)], target)
    return unused


def _below(target: str, digest: str = "") -> str:
    separator = "" if target.endswith((":", "/")) else "/"
    return f"{target}{separator}assets/{digest}".rstrip("/")


def _is_encoded(name: str, files: Collection[str]) -> bool:
    return name.endswith(_ENCODINGS) and name[:-3] in files


def _ahead(static: Path) -> list[str]:
    try:
        return list(map(str, json.loads((static / ahead.NAME).read_text())))
    except (OSError, ValueError):
        return []


def _rclone(arguments: Sequence[str], target: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("rclone") is None:
        raise PublishFailed("publishing assets needs rclone: apt install rclone")
    done = subprocess.run(["rclone", *arguments], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        errors = list(dict.fromkeys(line for line in _messages(done.stderr, "error")))[-_LINES_MAX:]
        reason = "; ".join(errors) or f"exit status {done.returncode}"
        raise PublishFailed(f"{target} does not take the assets, so that pages load them from the router: {reason}")
    return done


def _messages(log: str, level: str | None = None) -> Iterator[str]:
    """The messages in rclone's JSON log; a line that is not JSON is one itself."""
    for line in filter(None, log.splitlines()):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = {"level": level, "msg": line}
        if isinstance(entry, dict) and level in (None, entry.get("level")):
            yield str(entry.get("msg", "")).strip()[:500]
