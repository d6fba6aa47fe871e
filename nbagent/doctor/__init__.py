# SPDX-License-Identifier: BSD-3-Clause
"""Checks of this host for `nbagent doctor`: each finding has a status and, if it is not "ok", a way to fix it.

A check examines one thing. Where it can, it tries it as a claim does: a slot of the default image is started, requested
through the router and ended. Otherwise a check changes nothing. It needs neither root nor another check to have passed,
and also works on a host where nothing of nbagent runs. Checks read files below `root`, so that a test can pass a
directory instead of a host. If a check may not read something, the finding is a warning that recommends to run it as
root.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from nbagent.config import host_config, nginx_check
from nbagent.core import paths
from nbagent.core.errors import ConfigError
from nbagent.doctor import capacity, kernel, limits, network, services, system
from nbagent.doctor.finding import Finding
from nbagent.network.addresses import gateway
from nbagent.wire import control

API, ROUTER = "nbagent-api.service", "nbagent-router.service"
# A start by fork needs no launch service, but a claim with content does.
UNITS = ("nbagent.service", "nbagent-api.socket", ROUTER, "nbagent-units.socket", "nbagent-launch.socket")
NETWORK_UNITS = ("nbagent-network.service", "nbagent-dns.service")
# For errors of checks that are faults of the host.
REMEDIES = {
    errno.EIO: "see journalctl -k for errors of the disk",
    errno.ENOSPC: "see df and df -i, and delete files of the full file system; /tmp is needed too",
    errno.ENOMEM: "see nbagent top for the slots that use most memory",
    errno.EAGAIN: "see nbagent top for the slots that use most processes",
    errno.ENFILE: "see nbagent top for the slots that use most open files",
}


def examine(config_path: Path = host_config.DEFAULT_PATH, url: str = "http://127.0.0.1:9000") -> list[Finding]:
    """Run every check on this host."""
    root = Path("/")
    settings_finding, settings = check_config(config_path)
    responds = system.manager_responds()
    unit_state = system.unit_state if responds else system.unknown_state
    checks: list[Callable[[], Finding]] = [
        partial(kernel.check_pid1, root, responds),
        partial(kernel.check_systemd_version, system.systemctl_version),
        partial(kernel.check_cgroups, root),
        partial(kernel.check_controllers, root),
        partial(kernel.check_pressure, root),
        partial(kernel.check_user_namespaces, root, system.bounding_set),
        partial(kernel.check_apparmor, root),
        partial(kernel.check_module_requests, root, unit_state),
        partial(kernel.check_overlay, root),
        partial(kernel.check_proc, root),
        partial(services.check_users, _users(settings), system.has_user),
        *(partial(services.check_unit, unit, unit_state) for unit in UNITS),
        partial(limits.check_limits, root, system.unit_properties),
        partial(limits.check_restarts, system.unit_properties),
        partial(network.check_network, root, settings),
        *_network_checks(root, settings, unit_state),
        # First, because the supervisor then also tries the parts that it reports to check_control.
        partial(services.check_start, control.SOCKET_PATH),
        partial(services.check_control, control.SOCKET_PATH),
        partial(services.check_zygotes, control.SOCKET_PATH),
        partial(services.check_http, "API", url + "/healthz", API),
        partial(services.check_http, "router", f"http://127.0.0.1:{settings.router.port}/healthz", ROUTER),
        # The router gets it from the API.
        partial(services.check_http, "landing page", f"http://127.0.0.1:{settings.router.port}/", API),
        partial(services.check_router_files, settings, nginx_check.check),
        partial(services.check_router_libraries, root),
        *([partial(network.check_wildcard, domain, system.addresses_of)]
          if (domain := settings.router.domain) else []),
        *([partial(network.check_dns, settings, paths.DNS_KEY)] if settings.dns.server else []),
        partial(services.check_token, root, "token", "only trusted networks may call the API"),
        *([partial(services.check_token, root, "landing-token", "no client may start a slot on the landing page")]
          if settings.landing.access == "token" else []),
        partial(services.check_images, root),
        *(partial(capacity.check_room, root, path, use) for path, use in capacity.ROOM.items()),
        partial(services.check_journald, system.sync_journal),
        partial(capacity.check_journal, root),
        partial(capacity.check_use, root),
        partial(capacity.check_memory, root, settings),
        partial(capacity.check_swap, root, settings),
        partial(capacity.check_tasks, os.cpu_count() or 1, settings),
        *(partial(capacity.check_limit, root, limit, settings) for limit in capacity.LIMITS),
    ]
    return [settings_finding, *(_guarded(check) for check in checks)]


def _users(settings: host_config.HostConfig) -> list[str]:
    """The users of services that run on this host."""
    return [user for user in services.USERS if user != "nbagent-dns" or settings.dns.server]


def _network_checks(
    root: Path, settings: host_config.HostConfig, unit_state: Callable[[str], str]
) -> Iterator[Callable[[], Finding]]:
    """Checks for hosts on which slots may have a network."""
    if "internet" in settings.network.allow:
        yield from (partial(services.check_unit, unit, unit_state) for unit in NETWORK_UNITS)
        yield partial(network.check_resolver, gateway(settings.network.range4))
        yield partial(network.check_firewall, root, settings.network, system.ruleset)
        if settings.network.proxy is not None:
            yield partial(network.check_proxy, root, settings, settings.network.proxy)


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (OSError, ValueError, LookupError, TypeError, subprocess.SubprocessError) as error:
        function = check.func if isinstance(check, partial) else check
        name = function.__name__.removeprefix("check_").replace("_", " ")
        # An ordinary user may see less than the check needs in other ways than by EACCES.
        if isinstance(error, OSError) and error.errno in REMEDIES:
            mend = REMEDIES[error.errno]
        elif isinstance(error, PermissionError) or os.geteuid() != 0:
            mend = "run nbagent doctor as root"
        else:
            mend = "restore what is missing: apt install --reinstall nbagent"
        return Finding(name, "warn", f"check failed: {error}", mend)


def check_config(path: Path) -> tuple[Finding, host_config.HostConfig]:
    """The finding, and the settings for the other checks, which are the defaults if the files are refused."""
    try:
        settings = host_config.load(path)
    except ConfigError as error:
        return Finding("configuration", "fail", str(error), "nbagent config check"), host_config.HostConfig()
    files = ", ".join(map(str, host_config.settings_files(path))) or "no file, all defaults"
    return Finding("configuration", "ok", files), settings
