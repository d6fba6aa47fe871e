"""Brings a container image from where it is into an OCI layout, by skopeo and without a Docker daemon.

    oci:DIR[:TAG]              a layout, read where it is
    docker-archive:FILE        what `docker save` and `podman save` write
    docker://NAME[:TAG]        an image in a registry

skopeo reads what a stranger wrote, so it runs as nobody: as an id that is the coming image's own, in a transient
service without a capability, that can write in one directory, and has a network only where it needs one.
Layers are not unpacked here, and not by skopeo either: `archive` does, which refuses what is hostile. umoci would
do it as root, or give everything to one owner, and bounds neither bytes nor entries.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nbagent.core.errors import BadRequest, FetchFailed
from nbagent.image import ids
from nbagent.image.archive import ImageArchiveLimits
from nbagent.image.oci import Layout, Source

EXPECTED = "oci:DIR[:TAG], docker-archive:FILE or docker://NAME[:TAG]"
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,499}")
_TAG = "image"
_LOOK_INTERVAL_S = 1.0
# As little as skopeo works with. LimitFSIZE= and the rest of the paths are added below.
_SANDBOX = (
    "CapabilityBoundingSet=CAP_SETGID CAP_SETUID", "InaccessiblePaths=-/run/nbagent", "LimitCORE=0",
    "LockPersonality=yes", "MemoryMax=1G",
    "NoNewPrivileges=yes", "PrivateDevices=yes", "PrivateTmp=yes", "ProtectClock=yes", "ProtectControlGroups=yes",
    "ProtectHome=yes", "ProtectKernelLogs=yes", "ProtectKernelModules=yes", "ProtectKernelTunables=yes",
    "ProtectSystem=strict", "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX", "RestrictNamespaces=yes",
    "RestrictRealtime=yes", "RestrictSUIDSGID=yes", "RuntimeMaxSec=1h", "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service", "TasksMax=256", "UMask=0077",
)  # fmt: skip


@dataclass(frozen=True)
class OciDirectory:
    """A layout that is here."""

    path: Path
    tag: str | None

    @contextmanager
    def layout(self, staging: Path, id_base: int, limits: ImageArchiveLimits) -> Iterator[Layout]:
        try:
            found = Layout(self.path, self.tag)
        except OSError as error:
            raise FetchFailed(f"{self.path}: {error.strerror}") from None
        with found:
            yield found


@dataclass(frozen=True)
class DockerArchive:
    """A file as `docker save` writes it, with one image in it."""

    path: Path

    @contextmanager
    def layout(self, staging: Path, id_base: int, limits: ImageArchiveLimits) -> Iterator[Layout]:
        inbox = _inbox(staging, id_base)
        # It may be readable by root only, and skopeo is not root.
        copy = inbox / "archive"
        try:
            shutil.copyfile(self.path, copy)
        except OSError as error:
            raise FetchFailed(f"{self.path}: {error.strerror}") from None
        shutil.chown(copy, *_owner(id_base))
        with _copied(f"docker-archive:{copy}", inbox, id_base, limits, ["PrivateNetwork=yes"], []) as found:
            yield found


@dataclass(frozen=True)
class Registry:
    """An image in a registry. `insecure`: plain HTTP, or a certificate that nobody vouches for."""

    reference: str
    insecure: bool

    @contextmanager
    def layout(self, staging: Path, id_base: int, limits: ImageArchiveLimits) -> Iterator[Layout]:
        inbox = _inbox(staging, id_base)
        options = ["--src-tls-verify=false"] if self.insecure else []
        with _copied(f"docker://{self.reference}", inbox, id_base, limits, [], options) as found:
            yield found


def source(text: str, *, insecure: bool = False) -> Source:
    """The source that `text` names. Raises BadRequest."""
    kind, _, rest = text.partition(":")
    if kind == "oci" and rest:
        path, _, tag = rest.rpartition(":")
        return OciDirectory(Path(rest), None) if not path or Path(rest).is_dir() else OciDirectory(Path(path), tag)
    if kind == "docker-archive" and rest:
        return DockerArchive(Path(rest))
    if kind == "docker" and rest.startswith("//") and _REFERENCE.fullmatch(rest[2:]):
        return Registry(rest[2:], insecure)
    raise BadRequest(f"{text!r} is no source of an image: expected {EXPECTED}", field="source", expected=EXPECTED)


def _owner(id_base: int) -> tuple[int, int]:
    # The last id of the image's range: no user of an image has it, as 65534 is the last that is in use.
    return id_base + ids.COUNT - 1, id_base + ids.COUNT - 1


def _inbox(staging: Path, id_base: int) -> Path:
    """A directory of skopeo's own, and the way to it."""
    staging.chmod(0o711)
    inbox = staging / "inbox"
    inbox.mkdir(0o700)
    shutil.chown(inbox, *_owner(id_base))
    return inbox


@contextmanager
def _copied(
    reference: str, inbox: Path, id_base: int, limits: ImageArchiveLimits, properties: list[str], options: list[str]
) -> Iterator[Layout]:
    if shutil.which("skopeo") is None:
        raise FetchFailed("importing an image needs skopeo: apt install skopeo")
    layout = inbox / "layout"
    _run(
        ["skopeo", "copy", "--quiet", *options, reference, f"oci:{layout}:{_TAG}"],
        [*_SANDBOX, *properties, f"LimitFSIZE={limits.unpacked_bytes}"], inbox, id_base, limits,
    )
    try:
        found = Layout(layout, _TAG, inbox)
    except OSError as error:
        raise FetchFailed(f"skopeo left no layout: {error.strerror}") from None
    with found:
        yield found


def _run(command: list[str], properties: list[str], inbox: Path, id_base: int, limits: ImageArchiveLimits) -> None:
    """Runs a program as the image's own id in a transient service. Raises FetchFailed with its last words."""
    uid, gid = _owner(id_base)
    # User= takes only an id that has a name.
    become = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--"]
    unit = f"nbagent-import-{secrets.token_hex(6)}.service"
    settings = [*properties, f"ReadWritePaths={inbox}", f"WorkingDirectory=-{inbox}"]
    starter = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", f"--unit={unit}", f"--setenv=HOME={inbox}"]
    process = subprocess.Popen(
        [*starter, *(f"--property={setting}" for setting in settings), "--", *become, *command],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        while True:
            try:
                output, _ = process.communicate(timeout=_LOOK_INTERVAL_S)
                break
            except subprocess.TimeoutExpired:
                if _size(inbox) > limits.unpacked_bytes:
                    raise FetchFailed(f"the image is larger than {limits.unpacked_bytes} bytes") from None
    except BaseException:
        subprocess.run(["systemctl", "stop", unit], check=False, capture_output=True)
        process.kill()
        process.communicate()
        raise
    if process.returncode:
        words = output.decode(errors="replace").strip().splitlines() or [f"ended with status {process.returncode}"]
        raise FetchFailed(f"skopeo: {words[-1][-500:]}")


def _size(directory: Path) -> int:
    """Bytes in a directory that changes while one looks."""
    total = 0
    for path, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.lstat(f"{path}/{name}").st_size
            except FileNotFoundError:
                continue
    return total
