# SPDX-License-Identifier: BSD-3-Clause
"""Whether nbagent's services work: units, supervisor, API, router, zygotes, tokens and images."""

from __future__ import annotations

import errno
import http.client
import os
import stat
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path
from urllib.parse import urlsplit

from nbagent.config import host_config, nginx_settings
from nbagent.core import paths
from nbagent.core.errors import Full, ImageInvalid, ImageNotFound, NbagentError, SupervisorUnavailable
from nbagent.doctor.finding import Finding
from nbagent.doctor.system import TIMEOUT_S, UNKNOWN_STATE, below
from nbagent.image.store import ImageStore
from nbagent.linux.process import runs_replaced_files
from nbagent.wire import control
from nbagent.wire.operations import STATS, TRY_START

# An exec takes seconds on a busy host.
START_TIMEOUT_S = 30.0
# Of a fork, which takes 10 to 60 ms.
SLOW_MS = 3000
# The remedy for each part of nbagent.supervisor.health.
FAULTS = {
    "image": "nbagent image list; nbagent image import, or apt install --reinstall nbagent-image-minimal",
    "network": "systemctl restart nbagent-network; journalctl -eu nbagent-network",
    "records": "df /run; df -i /run; free space in /run, whose size is a part of the memory",
    "router": "systemctl restart nbagent-router; journalctl -eu nbagent-router",
    "systemd": "systemctl restart nbagent-units; journalctl -eu nbagent-units; if systemctl fails too, reboot the host",
}
# The remedy for each step of a start at which another part than the slot can fail.
STEPS = FAULTS | {"launch": "systemctl restart nbagent-launch; journalctl -eu nbagent-launch"}
ZYGOTE_LOG = "for the reason, see journalctl -eu nbagent 'nbagent-zygote@*'"
# The users of packaging/nbagent.sysusers, with the services that do not start without them.
USERS = {
    "nbagent": ("nbagent.service", "nbagent-api.service"), "nbagent-router": ("nbagent-router.service",),
    "nbagent-dns": ("nbagent-dns-update.service",),
}
# An archive that is in the store is not unpacked again.
ADD_AGAIN = "nbagent image remove {0}; when no slot runs on it, nbagent image add ARCHIVE {0}, or reinstall its package"


def check_unit(unit: str, state_of: Callable[[str], str]) -> Finding:
    """Whether a unit is active; `state_of` returns the output of `systemctl is-active`."""
    state = state_of(unit)
    if state == "active":
        return Finding(unit, "ok", state)
    if state == UNKNOWN_STATE:
        return Finding(unit, "warn", state, "see the finding about the service manager")
    return Finding(unit, "fail", state, f"systemctl start {unit}; journalctl -eu {unit}")


def check_router_libraries(root: Path) -> Finding:
    """Whether the router runs the libraries that are installed, because needrestart does not restart it."""
    name = "libraries of the router"
    try:
        pid = int(below(root, paths.ROUTER_RUN / "pid").read_text())
    except FileNotFoundError:
        return Finding(name, "ok", "the router does not run")
    if not runs_replaced_files(str(below(root, Path(f"/proc/{pid}/maps")))):
        return Finding(name, "ok", "as installed")
    text = "it runs libraries, or a program, that an upgrade has replaced"
    return Finding(name, "warn", text, "systemctl restart nbagent-router, which closes websockets; browsers reconnect")


def check_users(users: Collection[str], exists: Callable[[str], bool]) -> Finding:
    """Whether the users of services exist; without one its services go on, and do not start again."""
    missing = [user for user in users if not exists(user)]
    if not missing:
        return Finding("users", "ok", ", ".join(users))
    units = [unit for user in missing for unit in USERS[user]]
    return Finding(
        "users", "fail", f"missing: {', '.join(missing)}; the next start of {' and of '.join(units)} fails",
        f"systemd-sysusers nbagent.conf; then systemctl restart {' '.join(units)}",
    )


def check_journald(sync: Callable[[], None]) -> Finding:
    """Whether journald writes what it gets; `sync` lets it write all, and raises an error."""
    name = "journald"
    try:
        sync()
    except (OSError, subprocess.SubprocessError) as error:
        if os.geteuid() != 0:
            return Finding(name, "warn", f"not tried: {error}", "run nbagent doctor as root")
        text = f"no response within {error.timeout:g} s" if isinstance(error, subprocess.TimeoutExpired) else str(error)
        return Finding(
            name, "warn", f"it writes no entries: {text}; slots go on, and their events are lost",
            "systemctl restart systemd-journald; journalctl --verify",
        )
    return Finding(name, "ok", "it writes entries")


def check_control(path: Path) -> Finding:
    """Whether the supervisor responds."""
    name = "supervisor"
    if not os.access(path, os.W_OK) and path.exists():
        return Finding(name, "warn", f"no permission to connect to {path}", "run nbagent doctor as root")
    try:
        stats = control.ControlClient(path, TIMEOUT_S).call(STATS)
    except NbagentError as error:
        return Finding(name, "fail", str(error), "systemctl restart nbagent.service; journalctl -eu nbagent")
    found = f"{stats['claimed']} claimed, {stats['warm']} warm, {stats['available']} available"
    if stats["faults"]:
        texts = ", ".join(f"{part}: {text}" for part, text in sorted(stats["faults"].items()))
        mend = "; ".join(FAULTS[part] for part in sorted(stats["faults"]))
        return Finding(name, "fail", f"{found}; {texts}", _with_disk(texts, mend))
    if stats["draining"]:
        return Finding(name, "warn", f"draining: {found}", "nbagent drain --off")
    failing = sorted(image for image, pool in stats["pools"].items() if pool["failures"])
    if failing:
        text = f"{found}; slots of {', '.join(failing)} do not start"
        return Finding(name, "fail", text, "for the reason, see journalctl -eu nbagent")
    return Finding(name, "ok", found)


def check_zygotes(path: Path) -> Finding:
    """Whether images whose slots can be forked have a zygote, which forks them in milliseconds."""
    name = "zygotes"
    try:
        zygotes = control.ControlClient(path, TIMEOUT_S).call(STATS)["zygotes"]
    except NbagentError as error:
        return Finding(name, "warn", f"not known: {error}", "see the finding about the supervisor")
    states = ", ".join(f"{image} {zygote['state']}" for image, zygote in sorted(zygotes.items())) or "none"
    failing = [image for image, zygote in sorted(zygotes.items()) if zygote["failures"] and zygote["state"] != "ready"]
    if failing:
        text = f"{states}; until it starts, slots start by exec, which takes seconds and more memory"
        return Finding(name, "warn", text, ZYGOTE_LOG)
    return Finding(name, "ok", states)


def check_start(path: Path) -> Finding:
    """Whether a slot of the default image starts and responds through the router; the supervisor ends it at once."""
    name = "start of a slot"
    if path.exists() and not os.access(path, os.W_OK):
        return Finding(name, "warn", f"no permission to connect to {path}", "run nbagent doctor as root")
    try:
        # Because a supervisor that does not respond is found out sooner by it.
        control.ControlClient(path, TIMEOUT_S).call(STATS)
    except NbagentError as error:
        return Finding(name, "fail", f"not tried: {error}", "see the finding about the supervisor")
    try:
        trial = control.ControlClient(path, START_TIMEOUT_S).call(TRY_START)
    except (Full, ImageNotFound) as error:
        return Finding(name, "warn", f"not tried: {error}", "run nbagent doctor again when there is room for a slot")
    except SupervisorUnavailable as error:
        text = f"no result within {START_TIMEOUT_S:g} s: {error}"
        return Finding(name, "fail", text, "for the reason, see journalctl -eu nbagent; nbagent top shows a busy host")
    except NbagentError as error:
        mend = STEPS.get(error.details.get("step", ""), "for the reason, see journalctl -eu nbagent -u nbagent-router")
        return Finding(name, "fail", str(error), _with_disk(str(error), mend))
    found = f"by {trial['launch']} in {trial['took_ms']} ms"
    if trial["router_ms"] is None:
        found += "; not requested through the router, which predates this version"
    else:
        found += f", through the router in {trial['router_ms']} ms"
    if trial["took_ms"] > SLOW_MS and trial["launch"] == "fork":
        text = f"{found}, which usually takes less than 100 ms"
        return Finding(name, "warn", text, "nbagent top, vmstat 1 and journalctl -k show a busy host and slow disks")
    # A supervisor of an earlier version sends none.
    if reason := trial.get("launch_reason"):
        return Finding(name, "warn", f"{found}; {reason}", ZYGOTE_LOG)
    return Finding(name, "ok", found)


def _with_disk(text: str, mend: str) -> str:
    """The remedy for an error, which may be one of a disk."""
    return f"see journalctl -k for errors of the disk; {mend}" if os.strerror(errno.EIO) in text else mend


def check_http(name: str, url: str, unit: str) -> Finding:
    """Whether a server responds at `url`, with a status below 500."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    mend = f"systemctl restart {unit}; journalctl -eu {unit}"
    try:
        connection.request("GET", parts.path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or error
        return Finding(name, "fail", f"no response from {url}: {reason}", mend)
    finally:
        connection.close()
    if status >= 500:
        return Finding(name, "fail", f"status {status} from {url}", mend)
    return Finding(name, "ok", f"status {status} from {url}")


def check_router_files(settings: host_config.HostConfig, check: Callable[[str], str | None]) -> Finding:
    """Whether nginx accepts the operator's files, which it reads at the next reload or start of the router."""
    name = "router files"
    if (error := check(nginx_settings.nginx(settings))) is None:
        return Finding(name, "ok", f"nginx accepts {paths.ROUTER_FILES}")
    return Finding(name, "fail", error, "mend the file; until then the router keeps its former configuration")


def check_token(root: Path, name: str, without: str) -> Finding:
    """Whether a token of the API exists and only the operator can read it; `without`: the effect of its absence."""
    shown = paths.ETC / name
    path = below(root, shown)
    kind = name.replace("-", " ")
    try:
        status = path.stat()
    except FileNotFoundError:
        return Finding(
            kind, "warn", f"{shown} does not exist: {without}",
            f"install -m 0600 <(openssl rand -hex 32) {shown}",
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o027:
        return Finding(
            kind, "fail", f"{shown} has mode {mode:04o}, so other users can read or change it",
            f"chmod 0600 {shown}, and replace the token",
        )
    if status.st_size < 16:
        return Finding(
            kind, "fail", f"{shown} has only {status.st_size} bytes, so the token can be guessed",
            f"openssl rand -hex 32 > {shown}",
        )
    return Finding(kind, "ok", f"mode {mode:04o}")


def check_images(root: Path) -> Finding:
    """Whether the store has an image to start slots from, and whether the images' files are as they were added."""
    store, names = ImageStore(below(root, paths.IMAGES)), below(root, paths.IMAGES) / "names"
    found = sorted(entry.name for entry in names.iterdir()) if names.is_dir() else []
    if not found:
        return Finding("images", "fail", "the store is empty", "apt install ./nbagent-image-minimal_*.deb")
    compared = []
    for name in found:
        try:
            damaged = store.damaged(name)
        except PermissionError:
            raise
        except (OSError, ImageInvalid, ImageNotFound) as error:
            return Finding("images", "fail", f"image {name} cannot be read: {error}", ADD_AGAIN.format(name))
        if damaged:
            more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
            text = f"files of image {name} have changed since it was added: {damaged[0]!r}{more}"
            return Finding("images", "fail", text, ADD_AGAIN.format(name))
        compared.append(f"{name} (added without checksums)" if damaged is None else name)
    return Finding("images", "ok", f"files are as they were added, by a sample: {', '.join(compared)}")
