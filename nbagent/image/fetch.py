# SPDX-License-Identifier: BSD-3-Clause
"""Fetches a container image into an OCI layout, by skopeo and without a Docker daemon.

    oci:DIR[:TAG]              a layout, read in place
    docker-archive:FILE        a file that `docker save` or `podman save` wrote
    docker://NAME[:TAG]        an image in a registry

skopeo reads untrusted data, so it runs with an id of the new image's own range, in a transient service that has no
capability, can write to one directory, and has a network only for a registry. It does not unpack layers: `archive`
does, because it refuses hostile entries and limits bytes and entries. umoci does not limit them, and either runs as
root or changes all files to one owner.
"""

from __future__ import annotations

import os
import re
import secrets
import selectors
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from nbagent.core.errors import BadRequest, FetchFailed
from nbagent.image import ids
from nbagent.image.archive import ImageArchiveLimits
from nbagent.image.oci import Layout, Source

EXPECTED = "oci:DIR[:TAG], docker-archive:FILE or docker://NAME[:TAG]"
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,499}")
_TAG = "image"
# Each in upper and lower case.
_NO_PROXY = "NO_PROXY"
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", _NO_PROXY, "ALL_PROXY")
_SIZE_CHECK_INTERVAL_S = 1.0
# Its end has the reason of a failure.
_OUTPUT_MAX_BYTES = 1 << 16
# The least with which skopeo works. LimitFSIZE= and the writable paths are added below.
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
    """A layout on this host."""

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
    """A file that `docker save` wrote, with one image."""

    path: Path

    @contextmanager
    def layout(self, staging: Path, id_base: int, limits: ImageArchiveLimits) -> Iterator[Layout]:
        inbox = _inbox(staging, id_base)
        # A copy, because the file may be readable by root only, and skopeo does not run as root.
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
    """An image in a registry. `insecure` permits plain HTTP and certificates that cannot be verified.

    `login` is a document of `logins`, None for an anonymous import. Mirrors are those of containers-registries.conf(5),
    and proxies those of the environment, or else the variables `proxy`.
    """

    reference: str
    insecure: bool
    login: str | None = field(default=None, repr=False)
    proxy: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def layout(self, staging: Path, id_base: int, limits: ImageArchiveLimits) -> Iterator[Layout]:
        inbox = _inbox(staging, id_base)
        options = ["--src-tls-verify=false"] if self.insecure else []
        properties, secrets_of_run = [], []
        # In files, because the properties of a unit and command lines are readable for all users of the host.
        if self.login is not None:
            secrets_of_run.append(login := inbox / "login.json")
            _write_secret(login, self.login, _owner(id_base))
            options.append(f"--authfile={login}")
        if proxies := _proxies(os.environ, self.proxy):
            secrets_of_run.append(environment := staging / "environment")
            _write_secret(environment, proxies, (os.geteuid(), os.getegid()))
            properties.append(f"EnvironmentFile={environment}")
        reference = f"docker://{self.reference}"
        with _copied(reference, inbox, id_base, limits, properties, options, secrets_of_run) as found:
            yield found


def source(
    text: str, *, insecure: bool = False, login: str | None = None, proxy: Mapping[str, str] = MappingProxyType({})
) -> Source:
    """The source that `text` names; the options are for a registry. Raises BadRequest."""
    kind, _, rest = text.partition(":")
    if kind == "oci" and rest:
        path, _, tag = rest.rpartition(":")
        return OciDirectory(Path(rest), None) if not path or Path(rest).is_dir() else OciDirectory(Path(path), tag)
    if kind == "docker-archive" and rest:
        return DockerArchive(Path(rest))
    if kind == "docker" and rest.startswith("//") and _REFERENCE.fullmatch(rest[2:]):
        return Registry(rest[2:], insecure, login, proxy)
    raise BadRequest(f"{text!r} is not a source of an image: expected {EXPECTED}", field="source", expected=EXPECTED)


def _owner(id_base: int) -> tuple[int, int]:
    # The last id of the image's range. No user of an image has it, because 65534 is the highest id in use.
    return id_base + ids.COUNT - 1, id_base + ids.COUNT - 1


def _inbox(staging: Path, id_base: int) -> Path:
    """Create the directory that skopeo writes to, and let skopeo pass through its parent."""
    staging.chmod(0o711)
    inbox = staging / "inbox"
    inbox.mkdir(0o700)
    shutil.chown(inbox, *_owner(id_base))
    return inbox


def _write_secret(path: Path, content: str, owner: tuple[int, int]) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(content)
    shutil.chown(path, *owner)


def _proxies(environment: Mapping[str, str], otherwise: Mapping[str, str] = MappingProxyType({})) -> str:
    """The proxies of an environment, or else the variables `otherwise`, as a file for EnvironmentFile=
    (systemd.exec(5))."""
    if not any(environment.get(name) or environment.get(name.lower()) for name in _PROXIES if name != _NO_PROXY):
        environment = {**otherwise, **environment}
    lines = []
    for name in _PROXIES:
        for spelled in (name, name.lower()):
            if value := environment.get(spelled, ""):
                if not value.isprintable() or not value.isascii():
                    raise BadRequest(f"{spelled}: {value!r} is not a proxy", field=spelled, expected="a URL")
                quoted = value.replace("\\", "\\\\").replace('"', '\\"')
                lines.append(f'{spelled}="{quoted}"\n')
    return "".join(lines)


@contextmanager
def _copied(
    reference: str, inbox: Path, id_base: int, limits: ImageArchiveLimits, properties: list[str], options: list[str],
    secrets_of_run: Sequence[Path] = (),
) -> Iterator[Layout]:
    if shutil.which("skopeo") is None:
        raise FetchFailed("importing an image needs skopeo: apt install skopeo")
    layout = inbox / "layout"
    try:
        _run(
            ["skopeo", "copy", "--quiet", *options, reference, f"oci:{layout}:{_TAG}"],
            [*_SANDBOX, *properties, f"LimitFSIZE={limits.unpacked_bytes}"], inbox, id_base, limits,
        )
    finally:
        for path in secrets_of_run:
            path.unlink(missing_ok=True)
    try:
        found = Layout(layout, _TAG, inbox)
    except OSError as error:
        raise FetchFailed(f"skopeo succeeded but wrote no OCI layout: {error.strerror}") from None
    with found:
        yield found


def _run(command: list[str], properties: list[str], inbox: Path, id_base: int, limits: ImageArchiveLimits) -> None:
    """Runs a program as an id of the image in a transient service. Raises FetchFailed with its last line of output."""
    uid, gid = _owner(id_base)
    # setpriv, because User= accepts only ids that have a name on this host.
    become = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--"]
    unit = f"nbagent-import-{secrets.token_hex(6)}.service"
    settings = [*properties, f"ReadWritePaths={inbox}", f"WorkingDirectory=-{inbox}"]
    starter = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", f"--unit={unit}", f"--setenv=HOME={inbox}"]
    process = subprocess.Popen(
        [*starter, *(f"--property={setting}" for setting in settings), "--", *become, *command],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    output, checked_s = b"", time.monotonic()
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if selector.select(_SIZE_CHECK_INTERVAL_S):
                    if not (chunk := os.read(process.stdout.fileno(), _OUTPUT_MAX_BYTES)):
                        break
                    output = (output + chunk)[-_OUTPUT_MAX_BYTES:]
                if time.monotonic() >= checked_s + _SIZE_CHECK_INTERVAL_S:
                    _check_size(inbox, limits)
                    checked_s = time.monotonic()
        process.communicate()
    except BaseException:
        subprocess.run(["systemctl", "stop", unit], check=False, capture_output=True)
        process.kill()
        process.communicate()
        raise
    if process.returncode:
        lines = output.decode(errors="replace").strip().splitlines() or [f"ended with status {process.returncode}"]
        raise FetchFailed(f"skopeo: {lines[-1][-500:]}")


def _check_size(directory: Path, limits: ImageArchiveLimits) -> None:
    """Raises FetchFailed when a directory, whose files may be removed meanwhile, is larger than an image may be."""
    size_bytes = entries = 0
    for path, directories, files in os.walk(directory):
        entries += len(directories) + len(files)
        for name in files:
            try:
                size_bytes += os.lstat(f"{path}/{name}").st_size
            except FileNotFoundError:
                continue
        if size_bytes > limits.unpacked_bytes or entries > limits.entries:
            raise FetchFailed(f"the image is larger than {limits.unpacked_bytes} bytes or {limits.entries} files")
