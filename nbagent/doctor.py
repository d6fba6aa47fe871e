"""What on this host is missing or weak, and how to mend it.

Each check looks at one thing and returns what it found; none changes anything, none needs root,
none needs another to have passed, and all of them work on a host where nothing runs. Files are
read below `root`, so that a test can show a check any host it likes.

What a check cannot see is a warning, not a failure: "run as root" is then the way to know.
"""

from __future__ import annotations

import functools
import http.client
import os
import re
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from nbagent.config import host_config
from nbagent.core import model
from nbagent.core.errors import ConfigError, NbagentError
from nbagent.core.quantities import format_size
from nbagent.linux import swap
from nbagent.network.addresses import PREFIX, forwards_ipv6
from nbagent.wire import control
from nbagent.wire.operations import STATS

SYSTEMD_MIN = 252
UNITS = ("nbagent.service", "nbagent-api.socket", "nbagent-router.service")
NETWORK_UNITS = ("nbagent-network.service", "nbagent-dns.service")
TIMEOUT_S = 3.0
# What a notebook server and two kernels take: threads for pid_max, descriptors for nr_open.
TASKS_PER_SLOT = 64
FILES_PER_SLOT = 16
CONNECTIONS_PER_SLOT = 64
TERMINALS_PER_SLOT = 2

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What one check says. `mend` is empty when there is nothing to do."""

    name: str
    status: Status
    found: str
    mend: str = ""


def examine(config_path: Path = host_config.DEFAULT_PATH, url: str = "http://127.0.0.1:9000") -> list[Finding]:
    """Runs every check on this host."""
    root = Path("/")
    settings_finding, settings = check_config(config_path)
    checks: list[Callable[[], Finding]] = [
        functools.partial(check_pid1, root),
        functools.partial(check_systemd_version, systemctl_version),
        functools.partial(check_cgroups, root),
        functools.partial(check_controllers, root),
        functools.partial(check_pressure, root),
        functools.partial(check_user_namespaces, root),
        functools.partial(check_overlay, root),
        functools.partial(check_proc, root),
        *(functools.partial(check_unit, unit, unit_state) for unit in UNITS),
        functools.partial(check_network, root, settings),
        *_network_checks(settings),
        functools.partial(check_control, control.SOCKET_PATH),
        functools.partial(check_answer, "API", url + "/healthz", "nbagent-api.socket"),
        functools.partial(check_answer, "router", f"http://127.0.0.1:{settings.router.port}/", UNITS[2]),
        *([functools.partial(check_wildcard, domain, addresses_of)] if (domain := settings.router.domain) else []),
        functools.partial(check_token, root, "token", "only trusted networks may call the API"),
        *([functools.partial(check_token, root, "landing-token", "nobody may start a slot at the landing page")]
          if settings.landing.access == "token" else []),
        functools.partial(check_images, root),
        functools.partial(check_memory, root, settings),
        functools.partial(check_swap, root, settings),
        *(functools.partial(check_limit, root, limit, settings) for limit in LIMITS),
    ]
    return [settings_finding, *(_guarded(check) for check in checks)]


def _network_checks(settings: host_config.HostConfig) -> Iterator[Callable[[], Finding]]:
    """What only a host has whose slots may have a network."""
    if "internet" in settings.network.allow:
        yield from (functools.partial(check_unit, unit, unit_state) for unit in NETWORK_UNITS)
        yield functools.partial(check_firewall, ruleset)


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (OSError, ValueError, IndexError) as error:
        partial = check.func if isinstance(check, functools.partial) else check
        name = partial.__name__.removeprefix("check_").replace("_", " ")
        return Finding(name, "warn", f"cannot be seen: {error}", "run nbagent doctor as root")


def check_config(path: Path) -> tuple[Finding, host_config.HostConfig]:
    """The configuration, and the settings to go on with: the defaults when it is refused."""
    try:
        settings = host_config.load(path)
    except ConfigError as error:
        return Finding("configuration", "fail", str(error), "nbagent config check"), host_config.HostConfig()
    files = ", ".join(map(str, host_config.settings_files(path))) or "no file, all defaults"
    return Finding("configuration", "ok", files), settings


def check_pid1(root: Path) -> Finding:
    """Whether systemd is the service manager, by the directory that sd_booted(3) looks for."""
    if (root / "run/systemd/system").is_dir():
        return Finding("service manager", "ok", "systemd")
    name = _text(root / "proc/1/comm", "unknown")
    return Finding(
        "service manager", "fail", f"PID 1 is {name}",
        "slots are systemd scopes: boot this host with systemd",
    )


def check_systemd_version(version_text: Callable[[], str]) -> Finding:
    """Whether systemd knows what a slot's scope needs; `version_text` is `systemctl --version`."""
    match = re.match(r"systemd (\d+)", version_text())
    if match is None:
        return Finding("systemd version", "fail", "no systemctl", "install systemd")
    if int(match[1]) >= SYSTEMD_MIN:
        return Finding("systemd version", "ok", match[1])
    return Finding(
        "systemd version", "fail", f"{match[1]}, and scopes need {SYSTEMD_MIN} (OOMPolicy=continue)",
        "upgrade to Debian 12 or newer",
    )


def check_cgroups(root: Path) -> Finding:
    """Which cgroup hierarchy the host has, and what a v1 host lacks."""
    mend = "boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line"
    lacks = "no memory events, so OOM kills are not told; no PSI of slots; a kill is not atomic"
    if (root / "sys/fs/cgroup/cgroup.controllers").exists():
        return Finding("cgroups", "ok", "v2")
    if (root / "sys/fs/cgroup/unified").is_dir():
        return Finding("cgroups", "warn", f"hybrid, limits by v1: {lacks}", mend)
    if (root / "sys/fs/cgroup/memory").is_dir():
        return Finding("cgroups", "warn", f"v1: {lacks}", mend)
    return Finding("cgroups", "fail", "none is mounted at /sys/fs/cgroup", mend)


def check_controllers(root: Path) -> Finding:
    """Whether the limits of a slot have a controller each."""
    wanted = ("memory", "cpu", "pids")
    below = root / "sys/fs/cgroup"
    listed = _text(below / "cgroup.controllers", "").split()
    missing = [name for name in wanted if name not in listed and not (below / name).is_dir()]
    if not missing:
        return Finding("controllers", "ok", ", ".join(wanted))
    return Finding(
        "controllers", "fail", f"missing: {', '.join(missing)}; these limits would not hold",
        f"boot with cgroup_enable={missing[0]}, without cgroup_disable=",
    )


def check_pressure(root: Path) -> Finding:
    """Whether the kernel measures pressure; /proc/pressure is there but unreadable with psi=0."""
    try:
        (root / "proc/pressure/memory").read_text()
    except OSError:
        return Finding(
            "pressure", "warn", "no PSI: a host short of memory is noticed late",
            "boot with psi=1 on the kernel's command line",
        )
    return Finding("pressure", "ok", "PSI")


def check_user_namespaces(root: Path) -> Finding:
    """Whether user namespaces may be made at all, and whether a rule narrows them."""
    limit = int(_text(root / "proc/sys/user/max_user_namespaces", "0"))
    if limit < 64:
        return Finding(
            "user namespaces", "fail", f"user.max_user_namespaces is {limit}",
            "sysctl -w user.max_user_namespaces=65536, and in /etc/sysctl.d",
        )
    narrowed = [
        f"{name}={value}"
        for name, bad in (("unprivileged_userns_clone", "0"), ("apparmor_restrict_unprivileged_userns", "1"))
        if (value := _text(root / "proc/sys/kernel" / name, "")) == bad
    ]
    if narrowed:
        # The supervisor makes them as root, whom neither setting concerns.
        return Finding("user namespaces", "ok", f"for root only ({', '.join(narrowed)}), which is enough")
    return Finding("user namespaces", "ok", f"up to {limit}")


def check_overlay(root: Path) -> Finding:
    """Whether overlayfs is in the kernel or can be loaded."""
    if "overlay" in _text(root / "proc/filesystems", "").split():
        return Finding("overlayfs", "ok", "in the kernel")
    release = _text(root / "proc/sys/kernel/osrelease", os.uname().release)
    modules = root / "lib/modules" / release
    lists = _text(modules / "modules.dep", "") + _text(modules / "modules.builtin", "")
    if "/overlay.ko" in lists:
        return Finding("overlayfs", "ok", "a module, not loaded yet")
    return Finding(
        "overlayfs", "fail", f"kernel {release} has none; a slot's root is an overlay",
        "use the distribution's kernel, or modprobe overlay",
    )


def check_proc(root: Path) -> Finding:
    """Whether a slot may mount a /proc of its own.

    The kernel refuses a new proc in a user namespace unless one that nothing covers is mounted
    already (mount_too_revealing in fs/namespace.c). An empty directory such as binfmt_misc may be
    covered.
    """
    covered: dict[str, list[str]] = {}
    points = []
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        points.append(fields[4])
        if fields[fields.index("-") + 1] == "proc" and fields[3] == "/":
            covered[fields[4]] = []
    for proc, over in covered.items():
        over += [
            point for point in points
            if point.startswith(proc + "/") and not point.endswith("/sys/fs/binfmt_misc")
        ]
    if any(not over for over in covered.values()):
        return Finding("proc", "ok", "one is not covered by other mounts")
    names = sorted({point for over in covered.values() for point in over})
    return Finding(
        "proc", "fail", f"covered at {', '.join(names[:4])}: a slot may not mount its own",
        "as in a container: mount one full proc in it from outside, for example at /run/nbagent/proc",
    )


def check_unit(unit: str, state_of: Callable[[str], str]) -> Finding:
    """Whether a unit is active; `state_of` is `systemctl is-active`."""
    state = state_of(unit)
    if state == "active":
        return Finding(unit, "ok", state)
    return Finding(unit, "fail", state, f"systemctl start {unit}; journalctl -eu {unit}")


def check_network(root: Path, settings: host_config.HostConfig) -> Finding:
    """What slots may reach, and whether the host has a way there."""
    if "internet" not in settings.network.allow:
        return Finding("network", "ok", "slots have none")
    routes = [line.split() for line in _text(root / "proc/net/route", "").splitlines()[1:]]
    if not any(route[1] == route[7] == "00000000" for route in routes):
        return Finding(
            "network", "warn", "the host has no default route, so slots reach nothing",
            'give the host a default route, or set network.allow to ["none"]',
        )
    if forwards_ipv6(root):
        return Finding("network", "ok", "slots may reach the internet, by IPv4 and IPv6")
    ipv6 = "IPv6 would take net.ipv6.conf.all.forwarding=1 and a default route"
    return Finding("network", "ok", f"slots may reach the internet, by IPv4; {ipv6}")


def check_firewall(rules: Callable[[], str]) -> Finding:
    """Whether our table stands, and no other drops what slots send; `rules` is `nft list ruleset`.

    What one table of nftables accepts, another may drop. A chain that drops by its policy must
    therefore accept the interfaces of slots; one that names them is taken to do so.
    """
    text = rules()
    if "table inet nbagent {" not in text:
        return Finding("firewall", "fail", "nftables has no table inet nbagent", "systemctl restart nbagent-network")
    closed = []
    for table in re.split(r"^(?=table )", text, flags=re.MULTILINE):
        name = table.partition("{")[0].removeprefix("table").strip()
        for chain in re.findall(r"^\tchain (\S+) \{\n(.*?)^\t\}", table, re.MULTILINE | re.DOTALL):
            hook = re.search(r"hook (forward|input) .*policy drop;", chain[1])
            if hook and name != "inet nbagent" and f'"{PREFIX}*"' not in table:
                closed.append((f"{name} {chain[0]}", hook[1]))
    if not closed:
        return Finding("firewall", "ok", "no table drops what slots send")
    where, hook_name = closed[0]
    insert = f"nft insert rule {where}"
    mend = f'{insert} iifname "{PREFIX}*" '
    if hook_name == "input":
        mend += "udp dport 53 accept"
    else:
        mend += f'accept; {insert} oifname "{PREFIX}*" ct state established,related accept'
    return Finding(
        "firewall", "warn", f"{', '.join(name for name, _ in closed)} may drop what slots send",
        f"{mend}; and the same in the file that sets that table up",
    )


def check_control(path: Path) -> Finding:
    """Whether the supervisor answers."""
    name = "supervisor"
    if not os.access(path, os.W_OK) and path.exists():
        return Finding(name, "warn", f"{path} is not ours to ask", "run nbagent doctor as root")
    try:
        stats = control.ControlClient(path, TIMEOUT_S).call(STATS)
    except NbagentError as error:
        return Finding(name, "fail", str(error), "systemctl restart nbagent.service; journalctl -eu nbagent")
    found = f"{stats['claimed']} claimed, {stats['warm']} warm, {stats['available']} available"
    if stats["draining"]:
        return Finding(name, "warn", f"draining: {found}", "nbagent drain --off")
    if not stats["warm"] and not stats["claimed"]:
        return Finding(name, "warn", found, "no slot became warm: journalctl -eu nbagent says why")
    return Finding(name, "ok", found)


def check_answer(name: str, url: str, unit: str) -> Finding:
    """Whether something speaks HTTP there, and is well."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    mend = f"systemctl restart {unit}; journalctl -eu {unit}"
    try:
        connection.request("GET", parts.path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return Finding(name, "fail", f"no answer from {url}: {error}", mend)
    finally:
        connection.close()
    if status >= 500:
        return Finding(name, "fail", f"{url} answers {status}", mend)
    return Finding(name, "ok", f"{url} answers {status}")


def check_wildcard(domain: str, resolve: Callable[[str], list[str]]) -> Finding:
    """Whether names of slots resolve; `resolve` gives the addresses of a name."""
    # One that nobody can have asked for: neither a cache nor a record of its own answers.
    name = f"{model.new_id('doctor')}.{domain}"
    try:
        addresses = resolve(name)
    except OSError as error:
        return Finding(
            "slots' names", "fail", f"{name} does not resolve: {error.strerror}",
            f"a record *.{domain} in the DNS, to this host or to what is in front of it",
        )
    return Finding("slots' names", "ok", f"*.{domain} is {', '.join(addresses)}")


def check_token(root: Path, name: str, without: str) -> Finding:
    """Whether a token of the API is there and is nobody else's to read; `without`: what is when it is not."""
    path, shown = root / "etc/nbagent" / name, f"/etc/nbagent/{name}"
    kind = name.replace("-", " ")
    try:
        status = path.stat()
    except FileNotFoundError:
        return Finding(
            kind, "warn", f"{shown} is absent: {without}",
            f"install -m 0640 -g nbagent <(openssl rand -hex 32) {shown}",
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o027:
        return Finding(
            kind, "fail", f"{shown} has mode {mode:04o}: others can read or change it",
            f"chmod 0640 {shown}, and make a new one",
        )
    if status.st_size < 16:
        return Finding(
            kind, "fail", f"{shown} has {status.st_size} bytes and can be guessed",
            "put 32 random bytes in it: openssl rand -hex 32",
        )
    return Finding(kind, "ok", f"mode {mode:04o}")


def check_images(root: Path) -> Finding:
    """Whether there is an image to start slots from."""
    names = root / "var/lib/nbagent/images/names"
    found = sorted(entry.name for entry in names.iterdir()) if names.is_dir() else []
    if found:
        return Finding("images", "ok", ", ".join(found))
    return Finding("images", "fail", "none in the store", "apt install ./nbagent-image-minimal_*.deb")


def check_memory(root: Path, settings: host_config.HostConfig) -> Finding:
    """Whether the configured slots are promised no more memory than the operator meant to."""
    total_bytes = _meminfo(root)["MemTotal"]
    usable_bytes = total_bytes - settings.host.memory_reserve
    one = settings.slots.memory
    if one > usable_bytes:
        return Finding(
            "memory", "fail", f"{format_size(total_bytes)}: not one slot of {format_size(one)} fits",
            "lower slots.memory or host.memory_reserve",
        )
    capacity = capacity_of(root, settings)
    ratio = capacity * one / usable_bytes
    found = (f"{format_size(total_bytes)}, promised {ratio:.1f} times over"
             f" to {capacity} slots of {format_size(one)}")
    if ratio > settings.slots.overcommit * 1.01:
        return Finding("memory", "warn", found, "lower slots.capacity, or raise slots.overcommit")
    return Finding("memory", "ok", found)


def check_swap(root: Path, settings: host_config.HostConfig) -> Finding:
    """Whether slots at rest are compressed, which takes cgroup v2 and swap that is compressed memory, all of it."""
    swap_bytes, areas = _meminfo(root)["SwapTotal"], swap.read(root)
    if settings.cull.compress is None or not (root / "sys/fs/cgroup/cgroup.controllers").exists():
        there = f"{format_size(swap_bytes)}, for the host; slots use none"
        return Finding("swap", "ok", there if swap_bytes else "none; slots would use none")
    mend = "apt install systemd-zram-generator && systemctl daemon-reload && systemctl start dev-zram0.swap"
    if areas.on_disk:
        return Finding(
            "swap", "warn",
            f"{', '.join(areas.on_disk)} may lead to a disk, where nothing of a slot is to be: none is compressed",
            f"swapoff it, and {mend}; or cull.compress = \"never\"",
        )
    if not areas.in_memory:
        return Finding("swap", "ok", f"none; swap in zram would have slots compressed at rest: {mend}")
    return Finding("swap", "ok", f"{format_size(swap_bytes)} in memory; slots are compressed into it at rest")


@dataclass(frozen=True)
class KernelLimit:
    """A kernel limit that many slots run into. `path` is below /proc/sys.

    `each_bytes`: what one costs in memory, where nothing but its memory keeps one slot from taking all.
    """

    path: str
    base: int
    per_slot: int
    what: str
    each_bytes: int | None = None

    @property
    def sysctl(self) -> str:
        """Its name for sysctl(8)."""
        return self.path.replace("/", ".")


LIMITS = (
    KernelLimit("kernel/pid_max", 4096, TASKS_PER_SLOT, "processes and threads"),
    KernelLimit("kernel/threads-max", 4096, TASKS_PER_SLOT, "processes and threads"),
    # The router holds four descriptors for each user: two a websocket, in one process.
    KernelLimit("fs/nr_open", 65536, FILES_PER_SLOT, "open files of one process"),
    # struct file, as /proc/slabinfo has it. systemd sets no limit at boot; a container has that of its machine.
    KernelLimit("fs/file-max", 65536, FILES_PER_SLOT * 16, "open files", each_bytes=192),
    # 1024 are the host's own, kernel.pty.reserve. One slot has 32 at most.
    KernelLimit("kernel/pty/max", 1024 + 32, TERMINALS_PER_SLOT, "terminals"),
    KernelLimit("net/netfilter/nf_conntrack_max", 16384, CONNECTIONS_PER_SLOT, "tracked connections"),
)


def check_limit(root: Path, limit: KernelLimit, settings: host_config.HostConfig) -> Finding:
    """Whether a kernel limit is above what the host's capacity of slots needs."""
    text = _text(root / "proc/sys" / limit.path, "")
    if not text:
        return Finding(limit.sysctl, "ok", "not in use")
    value, capacity = int(text), capacity_of(root, settings)
    need = limit.base + capacity * limit.per_slot
    if limit.each_bytes is not None:
        need += settings.slots.memory_max // limit.each_bytes
    if value >= need:
        return Finding(limit.sysctl, "ok", f"{value} {limit.what}")
    return Finding(
        limit.sysctl, "warn", f"{value} {limit.what} are few for {capacity} slots",
        f"sysctl -w {limit.sysctl}={need}, and in /etc/sysctl.d",
    )


def capacity_of(root: Path, settings: host_config.HostConfig) -> int:
    """slots.capacity, or what "auto" makes of this host's memory."""
    if settings.slots.capacity is not None:
        return settings.slots.capacity
    usable_bytes = _meminfo(root)["MemTotal"] - settings.host.memory_reserve
    return max(1, int(usable_bytes * settings.slots.overcommit / settings.slots.memory))


def addresses_of(name: str) -> list[str]:
    """What the system's resolver says. Raises OSError."""
    return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})


def systemctl_version() -> str:
    """What `systemctl --version` prints, or nothing."""
    return _systemctl("--version")


def unit_state(unit: str) -> str:
    """What `systemctl is-active` prints of a unit."""
    return _systemctl("is-active", unit) or "unknown: systemd does not answer"


def ruleset() -> str:
    """What `nft list ruleset` prints. Raises OSError when it may not."""
    done = subprocess.run(
        ["/usr/sbin/nft", "list", "ruleset"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        raise PermissionError(done.stderr.strip().partition("\n")[0])
    return done.stdout


def _systemctl(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["systemctl", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""

    def read() -> Iterator[tuple[str, int]]:
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            yield name, int(value.split()[0]) * 1024

    return {"SwapTotal": 0} | dict(read())


def _text(path: Path, default: str) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return default
