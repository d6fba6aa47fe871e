# SPDX-License-Identifier: BSD-3-Clause
"""Checks of this host for `nbagent doctor`: each finding has a status and, if it is not "ok", a way to fix it.

A check examines one thing. Where it can, it tries it as a claim does: a slot of the default image is started, requested
through the router and ended. Otherwise a check changes nothing. It needs neither root nor another check to have passed,
and also works on a host where nothing of nbagent runs. Checks read files below `root`, so that a test can pass a
directory instead of a host. If a check may not read something, the finding is a warning that recommends to run it as
root.
"""

from __future__ import annotations

import functools
import http.client
import ipaddress
import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from nbagent.config import host_config, nginx_check, nginx_settings
from nbagent.core import model, paths, urls
from nbagent.core.errors import ConfigError, Full, ImageInvalid, ImageNotFound, NbagentError
from nbagent.core.proxies import HttpProxy
from nbagent.core.quantities import format_size
from nbagent.image.store import ImageStore
from nbagent.linux import apparmor, swap
from nbagent.network import foreign
from nbagent.network.addresses import FIRST, forwards_ipv6, gateway, ipv6_uplink
from nbagent.network.rules import TABLE
from nbagent.policy import admission
from nbagent.sandbox.spec import APPARMOR_PROFILE
from nbagent.wire import control
from nbagent.wire.operations import STATS, TRY_START

Status = Literal["ok", "warn", "fail"]

SYSTEMD_MIN = 252
ROUTER = "nbagent-router.service"
# A start by fork needs no launch service, but a claim with content does.
UNITS = ("nbagent.service", "nbagent-api.socket", ROUTER, "nbagent-units.socket", "nbagent-launch.socket")
NETWORK_UNITS = ("nbagent-network.service", "nbagent-dns.service")
# The units that create user namespaces, and the settings that refuse these to processes without CAP_SYS_ADMIN: that of
# Debian's kernels, and that of AppArmor, whose effect depends on the profiles of the distribution.
USERNS_UNITS = ("nbagent-launch.service", "nbagent-zygote@.service")
USERNS_SETTINGS: tuple[tuple[str, str, Status], ...] = (
    ("unprivileged_userns_clone", "0", "fail"),
    ("apparmor_restrict_unprivileged_userns", "1", "warn"),
)
TIMEOUT_S = 3.0
# An exec takes seconds on a busy host.
START_TIMEOUT_S = 30.0
# A name that no DNS has (RFC 6761), for which a proxy responds with an error of its own.
PROXY_NAME = "nbagent.invalid"
PROXY_REFUSES, PROXY_LOGIN = 403, 407
# A proxy may wait for its resolver.
PROXY_TIMEOUT_S = 10.0
# The remedy for each part of nbagent.supervisor.health.
FAULTS = {
    "image": "nbagent image list; nbagent image import, or apt install --reinstall nbagent-image-minimal",
    "network": "systemctl restart nbagent-network; journalctl -eu nbagent-network",
    "records": "df /run; df -i /run; free space in /run, whose size is a part of the memory",
    "router": "systemctl restart nbagent-router; journalctl -eu nbagent-router",
    "systemd": "systemctl restart nbagent-units; journalctl -eu nbagent-units; if systemctl fails too, reboot the host",
}
# An archive that is in the store is not unpacked again.
ADD_AGAIN = "nbagent image remove {0}; when no slot runs on it, nbagent image add ARCHIVE {0}, or reinstall its package"
# The file systems that must not be full, and what for.
ROOM = {paths.RUN: "the records of slots", paths.IMAGES: "images", Path("/var/log"): "the journal"}
ROOM_MIN_PERCENT, USE_MAX = 5.0, 0.8
# Use of a notebook server with two kernels: threads for pid_max, descriptors for nr_open.
TASKS_PER_SLOT = 64
FILES_PER_SLOT = 16
# The processes of a slot have 39 descriptors without a kernel and 80 more with each one (measured); the router and the
# supervisor have ten for it. So this suffices for five kernels.
OPEN_FILES_PER_SLOT = 512
CONNECTIONS_PER_SLOT = 64
TERMINALS_PER_SLOT = 2

@dataclass(frozen=True)
class Finding:
    """The result of one check. `mend` is the way to fix it and is empty when there is nothing to do."""

    name: str
    status: Status
    found: str
    mend: str = ""


def examine(config_path: Path = host_config.DEFAULT_PATH, url: str = "http://127.0.0.1:9000") -> list[Finding]:
    """Run every check on this host."""
    root = Path("/")
    settings_finding, settings = check_config(config_path)
    checks: list[Callable[[], Finding]] = [
        functools.partial(check_pid1, root),
        functools.partial(check_systemd_version, systemctl_version),
        functools.partial(check_cgroups, root),
        functools.partial(check_controllers, root),
        functools.partial(check_pressure, root),
        functools.partial(check_user_namespaces, root, bounding_set),
        functools.partial(check_apparmor, root),
        functools.partial(check_overlay, root),
        functools.partial(check_proc, root),
        *(functools.partial(check_unit, unit, unit_state) for unit in UNITS),
        functools.partial(check_network, root, settings),
        *_network_checks(root, settings),
        # First, because the supervisor then also tries the parts that it reports to check_control.
        functools.partial(check_start, control.SOCKET_PATH),
        functools.partial(check_control, control.SOCKET_PATH),
        functools.partial(check_zygotes, control.SOCKET_PATH),
        functools.partial(check_http, "API", url + "/healthz", "nbagent-api.socket"),
        functools.partial(check_http, "router", f"http://127.0.0.1:{settings.router.port}/", ROUTER),
        functools.partial(check_router_files, settings, nginx_check.check),
        *([functools.partial(check_wildcard, domain, addresses_of)] if (domain := settings.router.domain) else []),
        *([functools.partial(check_dns, settings, paths.DNS_KEY)] if settings.dns.server else []),
        functools.partial(check_token, root, "token", "only trusted networks may call the API"),
        *([functools.partial(check_token, root, "landing-token", "no client may start a slot on the landing page")]
          if settings.landing.access == "token" else []),
        functools.partial(check_images, root),
        *(functools.partial(check_room, root, path, use) for path, use in ROOM.items()),
        functools.partial(check_use, root),
        functools.partial(check_memory, root, settings),
        functools.partial(check_swap, root, settings),
        *(functools.partial(check_limit, root, limit, settings) for limit in LIMITS),
    ]
    return [settings_finding, *(_guarded(check) for check in checks)]


def _network_checks(root: Path, settings: host_config.HostConfig) -> Iterator[Callable[[], Finding]]:
    """Checks for hosts on which slots may have a network."""
    if "internet" in settings.network.allow:
        yield from (functools.partial(check_unit, unit, unit_state) for unit in NETWORK_UNITS)
        yield functools.partial(check_firewall, root, settings.network, ruleset)
        if settings.network.proxy is not None:
            yield functools.partial(check_proxy, root, settings, settings.network.proxy)


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (OSError, ValueError, LookupError, TypeError) as error:
        partial = check.func if isinstance(check, functools.partial) else check
        name = partial.__name__.removeprefix("check_").replace("_", " ")
        return Finding(name, "warn", f"check failed: {error}", "run nbagent doctor as root")


def check_config(path: Path) -> tuple[Finding, host_config.HostConfig]:
    """The finding, and the settings for the other checks, which are the defaults if the files are refused."""
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
    """Whether systemd supports the scopes of slots; `version_text` is `systemctl --version`."""
    match = re.match(r"systemd (\d+)", version_text())
    if match is None:
        return Finding("systemd version", "fail", "no systemctl", "install systemd")
    if int(match[1]) >= SYSTEMD_MIN:
        return Finding("systemd version", "ok", match[1])
    return Finding(
        "systemd version", "fail", f"{match[1]}, but scopes of slots need {SYSTEMD_MIN} or later (OOMPolicy=continue)",
        "upgrade to Debian 12 or newer",
    )


def check_cgroups(root: Path) -> Finding:
    """The version of the host's cgroup hierarchy, with the features that v1 lacks."""
    mend = "boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line"
    lacks = "OOM kills of slots are not reported, slots have no PSI, and killing a slot is not atomic"
    if (root / "sys/fs/cgroup/cgroup.controllers").exists():
        return Finding("cgroups", "ok", "v2")
    if (root / "sys/fs/cgroup/unified").is_dir():
        return Finding("cgroups", "warn", f"hybrid, with limits by v1: {lacks}", mend)
    if (root / "sys/fs/cgroup/memory").is_dir():
        return Finding("cgroups", "warn", f"v1: {lacks}", mend)
    return Finding("cgroups", "fail", "no cgroup hierarchy is mounted at /sys/fs/cgroup", mend)


def check_controllers(root: Path) -> Finding:
    """Whether there is a controller for each limit of a slot."""
    wanted = ("memory", "cpu", "pids")
    below = root / "sys/fs/cgroup"
    listed = _text(below / "cgroup.controllers", "").split()
    missing = [name for name in wanted if name not in listed and not (below / name).is_dir()]
    if not missing:
        return Finding("controllers", "ok", ", ".join(wanted))
    return Finding(
        "controllers", "fail", f"missing: {', '.join(missing)}; the kernel would not enforce these limits",
        f"boot with cgroup_enable={missing[0]}, without cgroup_disable=",
    )


def check_pressure(root: Path) -> Finding:
    """Whether the kernel measures pressure; with psi=0, /proc/pressure exists but cannot be read."""
    try:
        (root / "proc/pressure/memory").read_text()
    except OSError:
        return Finding(
            "pressure", "warn", "the kernel has no PSI, so a shortage of memory is detected late",
            "boot with psi=1 on the kernel's command line",
        )
    return Finding("pressure", "ok", "PSI")


def check_user_namespaces(root: Path, bounding_set_of: Callable[[str], str]) -> Finding:
    """Whether the units that create the user namespaces of slots may do so.

    `bounding_set_of` returns the CapabilityBoundingSet= of a unit. Both units run as root, but without CAP_SYS_ADMIN.
    """
    name = "user namespaces"
    limit = int(_text(root / "proc/sys/user/max_user_namespaces", "0"))
    if limit < 64:
        return Finding(
            name, "fail", f"user.max_user_namespaces is {limit}",
            "sysctl -w user.max_user_namespaces=65536, and in /etc/sysctl.d",
        )
    for setting, value, status in USERNS_SETTINGS:
        if _text(root / "proc/sys/kernel" / setting, "") != value:
            continue
        shown = f"kernel.{setting}={value}"
        without = [unit for unit in USERNS_UNITS if "cap_sys_admin" not in bounding_set_of(unit).split()]
        if not without:
            return Finding(name, "ok", f"{shown}, and the units that create them have CAP_SYS_ADMIN")
        effect = "refuses" if status == "fail" else "may restrict"
        mend = [*map(_userns_drop_in, without), "systemctl daemon-reload && systemctl restart nbagent-launch nbagent"]
        found = f"{shown} {effect} those of {' and '.join(without)}, which have no CAP_SYS_ADMIN"
        return Finding(name, status, found, "; ".join(mend))
    return Finding(name, "ok", f"up to {limit}")


def _userns_drop_in(unit: str) -> str:
    """The command that gives a unit CAP_SYS_ADMIN."""
    directory = f"/etc/systemd/system/{unit}.d"
    lines = r"[Service]\nCapabilityBoundingSet=CAP_SYS_ADMIN\n"
    return f"mkdir -p {directory} && printf '{lines}' > {directory}/userns.conf"


def check_apparmor(root: Path) -> Finding:
    """Whether slots have their profile, on a host with AppArmor. It confines them beside all else that does."""
    name, profile = "AppArmor", APPARMOR_PROFILE
    if not apparmor.is_enabled(root):
        return Finding(name, "ok", "not in this kernel, or disabled; slots are confined without it")
    mode = apparmor.mode_of(profile, root)
    if mode == "enforce":
        return Finding(name, "ok", f"profile {profile} is enforced in slots")
    file = f"/etc/apparmor.d/{profile}"
    if mode is None:
        load = f"apparmor_parser -r {file}"
        mend = load if (root / "sbin/apparmor_parser").exists() else f"apt install apparmor && {load}"
        return Finding(name, "warn", f"profile {profile} is not loaded, so slots have none", mend)
    return Finding(name, "warn", f"profile {profile} is in mode {mode}", f"aa-enforce {file} (apparmor-utils)")


def check_overlay(root: Path) -> Finding:
    """Whether the kernel has overlayfs, built in or as a module."""
    if "overlay" in _text(root / "proc/filesystems", "").split():
        return Finding("overlayfs", "ok", "in the kernel")
    release = _text(root / "proc/sys/kernel/osrelease", os.uname().release)
    modules = root / "lib/modules" / release
    lists = _text(modules / "modules.dep", "") + _text(modules / "modules.builtin", "")
    if "/overlay.ko" in lists:
        return Finding("overlayfs", "ok", "a module, not loaded yet")
    return Finding(
        "overlayfs", "fail", f"kernel {release} does not have it, and the root of a slot is an overlay",
        "use the distribution's kernel, or modprobe overlay",
    )


def check_proc(root: Path) -> Finding:
    """Whether a slot may mount a /proc of its own.

    In a user namespace the kernel refuses to mount a new proc unless another proc, with no other file system mounted
    over parts of it, is already mounted (mount_too_revealing() in fs/namespace.c). A mount over an empty directory,
    such as binfmt_misc, does not count.
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
        return Finding("proc", "ok", "a /proc without mounts over it exists")
    names = sorted({point for over in covered.values() for point in over})
    return Finding(
        "proc", "fail", f"mounts over {', '.join(names[:4])}: the kernel does not let a slot mount its own /proc",
        f"if this is a container: mount a full proc in it from outside, for example at {paths.RUN}/proc",
    )


def check_unit(unit: str, state_of: Callable[[str], str]) -> Finding:
    """Whether a unit is active; `state_of` returns the output of `systemctl is-active`."""
    state = state_of(unit)
    if state == "active":
        return Finding(unit, "ok", state)
    return Finding(unit, "fail", state, f"systemctl start {unit}; journalctl -eu {unit}")


def check_network(root: Path, settings: host_config.HostConfig) -> Finding:
    """The networks that slots may reach, and whether the host has a route to them."""
    if "internet" not in settings.network.allow:
        return Finding("network", "ok", "slots have no network")
    ipv4, ipv6 = bool(_ipv4_uplink(root)), forwards_ipv6(root)
    by = f", and by the proxy {settings.network.proxy}" if settings.network.proxy is not None else ""
    if ipv4 and ipv6:
        return Finding("network", "ok", f"slots may reach the internet over IPv4 and IPv6{by}")
    if ipv4:
        more = "IPv6 would require net.ipv6.conf.all.forwarding=1 and a default route"
        return Finding("network", "ok", f"slots may reach the internet over IPv4{by}; {more}")
    if ipv6:
        return Finding("network", "ok", f"slots may reach the internet over IPv6 only, as this host may{by}")
    if by:
        return Finding("network", "ok", f"slots may reach the internet by the proxy {settings.network.proxy} only")
    if uplink := ipv6_uplink(root):
        return Finding(
            "network", "warn",
            "the host has a default route of IPv6 only and does not forward IPv6, so slots cannot reach the internet",
            f"sysctl -w net.ipv6.conf.{uplink}.accept_ra=2 net.ipv6.conf.all.forwarding=1, and in /etc/sysctl.d",
        )
    return Finding(
        "network", "warn", "the host has no default route, so slots cannot reach the internet",
        'give the host a default route, or set network.allow to ["none"]',
    )


def check_proxy(root: Path, settings: host_config.HostConfig, proxy: HttpProxy) -> Finding:
    """Whether the HTTP proxy responds, and connects to the first of claims.archives, if there are any."""
    name, shown = "proxy", f"network.proxy, {proxy},"
    if _is_own(proxy):
        return Finding(
            name, "fail", f"{shown} is an address of this host, which slots do not reach",
            "use a proxy on another machine, because one on this host would connect slots to its own services",
        )
    if proxy.version == 6 and not forwards_ipv6(root):
        return Finding(
            name, "fail", f"{shown} has an IPv6 address, and the host does not forward IPv6 for slots",
            "sysctl -w net.ipv6.conf.all.forwarding=1, and in /etc/sysctl.d; or use an IPv4 address",
        )
    archives = settings.claims.archives
    url = urls.parse(archives[0]) if archives else urls.parse(f"http://{PROXY_NAME}/")
    try:
        status = _status_by(proxy, url)
    except (OSError, http.client.HTTPException) as error:
        return Finding(
            name, "fail", f"no response by {proxy} for {url.absolute}: {error}",
            "check the address, the proxy's log, and that it permits this host; or correct network.proxy",
        )
    if status == PROXY_LOGIN:
        return Finding(
            name, "fail", f"{proxy} requires a login, which slots do not have",
            "permit the address of this host without a login",
        )
    if status == PROXY_REFUSES and archives:
        mend = "permit the host of claims.archives in the proxy's rules"
        return Finding(name, "warn", f"{proxy} may refuse {url.absolute}: status {status}", mend)
    return Finding(name, "ok", f"{proxy} responds with status {status} for {url.absolute}")


def _is_own(proxy: HttpProxy) -> bool:
    """Whether an address is one of this host: the kernel then uses it as the source of packets to itself."""
    with socket.socket(socket.AF_INET6 if proxy.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((proxy.address, proxy.port))
        except OSError:  # no route
            return False
        return bool(probe.getsockname()[0] == proxy.address)


def _status_by(proxy: HttpProxy, url: urls.Url) -> int:
    """The status of a HEAD request by a proxy. Raises OSError or HTTPException."""
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(proxy.address, proxy.port, timeout=PROXY_TIMEOUT_S)
    if url.scheme == "https":
        connection.set_tunnel(url.host, url.port)
    try:
        connection.request("HEAD", url.target if url.scheme == "https" else url.absolute)
        return connection.getresponse().status
    finally:
        connection.close()


def _ipv4_uplink(root: Path, address: str = "0.0.0.0") -> str:
    """The interface of the most specific IPv4 route to an address, by default that of the default route; empty without
    one."""
    best = (-1, "")
    for line in _text(root / "proc/net/route", "").splitlines()[1:]:
        route = line.split()
        # In hexadecimal digits, in the order of bytes of this machine.
        to, mask = (int.from_bytes(int(route[column], 16).to_bytes(4, sys.byteorder), "big") for column in (1, 7))
        if int(ipaddress.ip_address(address)) & mask == to:
            best = max(best, (mask, route[0]))
    return best[1]


def check_firewall(root: Path, settings: host_config.NetworkSettings, rules: Callable[[], tuple[str, str]]) -> Finding:
    """Whether nftables has our table, and no other table drops packets of slots.

    `rules` returns the ruleset as JSON and as text, for nbagent.network.foreign.
    """
    document, text = rules()
    found = foreign.Ruleset(json.loads(document), text)
    if TABLE not in found.tables:
        return Finding("firewall", "fail", f"nftables has no table {TABLE}", "systemctl restart nbagent-network")
    resolver, slot4, slot6 = gateway(settings.range4), str(settings.range4[FIRST]), str(settings.range6[FIRST])
    packets = foreign.packets(4, _ipv4_uplink(root), slot4, resolver)
    if forwards_ipv6(root):
        packets += foreign.packets(6, ipv6_uplink(root), slot6, resolver)
    if (proxy := settings.proxy) is not None and proxy.version == 4:
        packets += foreign.packets(4, _ipv4_uplink(root, proxy.address), slot4, resolver, proxy)[:2]
    dropping = list(found.dropping(packets))
    if not dropping:
        return Finding("firewall", "ok", "no other table drops packets of slots")
    mends = dict.fromkeys(foreign.remedy(chain) for chain in dropping)
    return Finding("firewall", "warn", "; ".join(map(str, dropping)), "; ".join(mends))


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
        return Finding(name, "fail", f"{found}; {texts}", "; ".join(FAULTS[part] for part in sorted(stats["faults"])))
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
        return Finding(name, "warn", text, "for the reason, see journalctl -eu nbagent 'nbagent-zygote@*'")
    return Finding(name, "ok", states)


def check_start(path: Path) -> Finding:
    """Whether a slot of the default image starts and responds through the router; the supervisor ends it at once."""
    name = "start of a slot"
    if path.exists() and not os.access(path, os.W_OK):
        return Finding(name, "warn", f"no permission to connect to {path}", "run nbagent doctor as root")
    try:
        trial = control.ControlClient(path, START_TIMEOUT_S).call(TRY_START)
    except (Full, ImageNotFound) as error:
        return Finding(name, "warn", f"not tried: {error}", "run nbagent doctor again when there is room for a slot")
    except NbagentError as error:
        return Finding(name, "fail", str(error), "for the reason, see journalctl -eu nbagent -u nbagent-router")
    found = f"by {trial['launch']} in {trial['took_ms']} ms"
    if trial["router_ms"] is None:
        return Finding(name, "ok", f"{found}; not requested through the router, which predates this version")
    return Finding(name, "ok", f"{found}, through the router in {trial['router_ms']} ms")


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
        return Finding(name, "fail", f"no response from {url}: {error}", mend)
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


def check_wildcard(domain: str, resolve: Callable[[str], list[str]]) -> Finding:
    """Whether the host names of slots resolve; `resolve` returns the addresses of a name."""
    # A random name, because the response for a fixed one could come from a cache or from a record of its own.
    name = f"{model.new_id('doctor')}.{domain}"
    try:
        addresses = resolve(name)
    except OSError as error:
        return Finding(
            "host names of slots", "fail", f"{name} does not resolve: {error.strerror}",
            f"add a DNS record *.{domain} with the address of this host or of the proxy in front of it",
        )
    return Finding("host names of slots", "ok", f"*.{domain} resolves to {', '.join(addresses)}")


def check_dns(settings: host_config.HostConfig, key: Path) -> Finding:
    """Whether the DNS server accepts the records of this host and has those that belong to the state of the agent."""
    from nbagent.dns import require_library

    name = "DNS records"
    if key.exists() and not os.access(key, os.R_OK):
        return Finding(name, "warn", f"no permission to read {key}", "run nbagent doctor as root")
    try:
        require_library()
    except ConfigError as error:
        return Finding(name, "fail", str(error), "apt install python3-dnspython")
    from nbagent.dns import check
    from nbagent.dns.publisher import agent_state

    result = list(check.check_host(settings, agent_state, key))[-1]
    return Finding(
        name, result.status, result.found, "" if result.status == "ok" else "journalctl -eu nbagent-dns-update"
    )


def check_token(root: Path, name: str, without: str) -> Finding:
    """Whether a token of the API exists and only the operator can read it; `without`: the effect of its absence."""
    shown = paths.ETC / name
    path = _below(root, shown)
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
    store, names = ImageStore(_below(root, paths.IMAGES)), _below(root, paths.IMAGES) / "names"
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


def check_room(root: Path, path: Path, use: str, read: Callable[[Path], os.statvfs_result] = os.statvfs) -> Finding:
    """Whether a file system has blocks and inodes left."""
    try:
        status = read(_below(root, path))
    except FileNotFoundError:
        return Finding(f"room in {path}", "ok", "not in use")
    counts = ((status.f_bavail, status.f_blocks, "blocks"), (status.f_favail, status.f_files, "inodes"))
    # Some file systems have no number of inodes.
    part, free, what = min((100 * free / total, free, what) for free, total, what in counts if total)
    found = f"{part:.0f} % of the {what} are free ({free})"
    if part >= ROOM_MIN_PERCENT:
        return Finding(f"room in {path}", "ok", found)
    return Finding(f"room in {path}", "fail" if part < 1 else "warn", f"{found}, for {use}", f"delete files of {path}")


def check_use(root: Path) -> Finding:
    """Whether the host's processes, threads and open files are far from their limits now."""
    threads = int((_text(root / "proc/loadavg", "") or "0 0 0 0/0 0").split()[3].partition("/")[2])
    limits = [int(text) for name in ("pid_max", "threads-max") if (text := _text(root / "proc/sys/kernel" / name, ""))]
    # The open files, 0, and their limit.
    files = (_text(root / "proc/sys/fs/file-nr", "") or "0 0 0").split()
    uses = (("processes and threads", threads, min(limits, default=0)), ("open files", int(files[0]), int(files[2])))
    found = ", ".join(f"{used} of {limit} {what}" for what, used, limit in uses)
    for what, used, limit in uses:
        if limit and used > USE_MAX * limit:
            mend = "nbagent top names the slots that use most; lower slots.tasks or slots.capacity"
            return Finding("use", "warn", f"{found}: nearly all {what}", mend)
    return Finding("use", "ok", found)


def check_memory(root: Path, settings: host_config.HostConfig) -> Finding:
    """Whether the host has memory for its slots: for one, and for all as slots.overcommit has it."""
    total_bytes = _meminfo(root)["MemTotal"]
    one = settings.slots.memory
    if one > total_bytes - settings.host.memory_reserve:
        return Finding(
            "memory", "fail", f"{format_size(total_bytes)} are too little for one slot of {format_size(one)}",
            "lower slots.memory or host.memory_reserve",
        )
    capacity = capacity_of(root, settings)
    if settings.slots.overcommit is None:
        return Finding("memory", "ok", f"{format_size(total_bytes)}; up to {capacity} slots by what they use")
    ratio = capacity * one / total_bytes
    found = f"{format_size(total_bytes)}; {capacity} slots of {format_size(one)} are {ratio:.1f} times as much"
    if ratio > settings.slots.overcommit * 1.01:
        return Finding("memory", "warn", found, "lower slots.capacity, or raise slots.overcommit")
    return Finding("memory", "ok", found)


def check_swap(root: Path, settings: host_config.HostConfig) -> Finding:
    """Whether idle slots are compressed, which requires cgroup v2 and that all swap of the host is in zram."""
    swap_bytes, areas = _meminfo(root)["SwapTotal"], swap.read(root)
    if settings.cull.compress is None or not (root / "sys/fs/cgroup/cgroup.controllers").exists():
        found = f"{format_size(swap_bytes)}, which slots do not use" if swap_bytes else "none; slots would not use it"
        return Finding("swap", "ok", found)
    mend = "apt install systemd-zram-generator && systemctl daemon-reload && systemctl start dev-zram0.swap"
    if areas.on_disk:
        return Finding(
            "swap", "warn",
            f"{', '.join(areas.on_disk)} may be on a disk, so slots are not compressed: their data must stay in memory",
            f"run swapoff, and {mend}; or set cull.compress = \"never\"",
        )
    if not areas.in_memory:
        return Finding("swap", "ok", f"none; to let the agent compress idle slots into zram: {mend}")
    return Finding("swap", "ok", f"{format_size(swap_bytes)} in zram; idle slots are compressed into it")


@dataclass(frozen=True)
class KernelLimit:
    """A kernel limit that many slots together may reach. `path` is below /proc/sys; `per_slot` is what users need.

    `each_bytes`: the kernel memory of one object, if only its memory limit keeps a slot from creating all of them. That
    is named and no warning, because such a slot is an attack.
    """

    path: str
    base: int
    per_slot: int
    what: str
    each_bytes: int | None = None

    @property
    def sysctl(self) -> str:
        """The name of the limit for sysctl(8)."""
        return self.path.replace("/", ".")


LIMITS = (
    KernelLimit("kernel/pid_max", 4096, TASKS_PER_SLOT, "processes and threads"),
    KernelLimit("kernel/threads-max", 4096, TASKS_PER_SLOT, "processes and threads"),
    # The router needs four descriptors for each user, two for each websocket, all in one process.
    KernelLimit("fs/nr_open", 65536, FILES_PER_SLOT, "open files of one process"),
    # each_bytes is the size of struct file in /proc/slabinfo. systemd raises fs.file-max at boot to the highest value,
    # but a container has the value of its machine.
    KernelLimit("fs/file-max", 65536, OPEN_FILES_PER_SLOT, "open files", each_bytes=192),
    # kernel.pty.reserve keeps 1024 for the host. One slot has at most 32.
    KernelLimit("kernel/pty/max", 1024 + 32, TERMINALS_PER_SLOT, "terminals"),
    KernelLimit("net/netfilter/nf_conntrack_max", 16384, CONNECTIONS_PER_SLOT, "tracked connections"),
)


def check_limit(root: Path, limit: KernelLimit, settings: host_config.HostConfig) -> Finding:
    """Whether a kernel limit suffices for as many slots as the host has capacity for."""
    text = _text(root / "proc/sys" / limit.path, "")
    if not text:
        return Finding(limit.sysctl, "ok", "not in use")
    value, capacity = int(text), capacity_of(root, settings)
    need = limit.base + capacity * limit.per_slot
    if value >= need:
        found = f"{value} {limit.what}"
        if limit.each_bytes is not None and (one := settings.slots.memory_max // limit.each_bytes) > value - need:
            found += f"; a slot of {format_size(settings.slots.memory_max)} that does nothing else may take {one}"
        return Finding(limit.sysctl, "ok", found)
    return Finding(
        limit.sysctl, "warn", f"{value} {limit.what} are too few for {capacity} slots",
        f"sysctl -w {limit.sysctl}={need}, and in /etc/sysctl.d",
    )


def capacity_of(root: Path, settings: host_config.HostConfig) -> int:
    """The number of slots that the supervisor would run at most on this host."""
    slots, total_bytes = settings.slots, _meminfo(root)["MemTotal"]
    if slots.capacity is not None:
        return slots.capacity
    if slots.overcommit is not None:
        return admission.promised(total_bytes, slots.memory, slots.overcommit)
    return admission.most(total_bytes, settings.host.memory_reserve, slots.memory)


def addresses_of(name: str) -> list[str]:
    """The addresses of `name`, from the system's resolver. Raises OSError."""
    return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})


def systemctl_version() -> str:
    """The output of `systemctl --version`; empty if systemctl fails."""
    return _systemctl("--version")


def unit_state(unit: str) -> str:
    """The output of `systemctl is-active` for a unit."""
    return _systemctl("is-active", unit) or "unknown: systemd does not respond"


def bounding_set(unit: str) -> str:
    """The CapabilityBoundingSet= of a unit; of an instance, if it is a template."""
    return _systemctl("show", "-P", "CapabilityBoundingSet", unit.replace("@.", "@doctor."))


def ruleset() -> tuple[str, str]:
    """The outputs of `nft --json list ruleset` and `nft --handle list ruleset`. Raises PermissionError without root."""
    return _nft("--json"), _nft("--handle")


def _nft(option: str) -> str:
    done = subprocess.run(
        ["/usr/sbin/nft", option, "list", "ruleset"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
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


def _below(root: Path, path: Path) -> Path:
    """`path` of the host whose root directory is `root`."""
    return root / path.relative_to("/")


def _text(path: Path, default: str) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return default
