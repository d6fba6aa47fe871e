# SPDX-License-Identifier: BSD-3-Clause
"""Adds, drains and removes hosts of a running gateway, in gateway.d and in the running HAProxy.

HAProxy is changed through its Runtime API, so no reload is needed and no connection is closed. The file of a host is
`gateway.d/host-LABEL.toml`. A host that is listed in another file can be drained by such a file, but must be removed
from the file that lists it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nbagent.config.schema import read_tables
from nbagent.core.errors import BadRequest, NbagentError
from nbagent.gateway import haproxy, settings
from nbagent.gateway.fleet import fetch_figures
from nbagent.gateway.runtime import GatewayDown, HaproxyServer, Runtime
from nbagent.gateway.settings import FleetHostSettings

# Time that requests to a removed host have to complete before its server is left in maintenance.
LEAVE_TIMEOUT_S = 15.0
_RETRY_S = 0.2


class NotChanged(BadRequest):
    """The change does not fit the current fleet."""

    code = "fleet-not-changed"
    title = "The fleet was not changed"


class Fleet:
    """The hosts in the configuration at `path`, and in the HAProxy process behind `runtime`."""

    def __init__(self, path: Path, runtime: Runtime) -> None:
        self.path, self.runtime = path, runtime

    @property
    def backend(self) -> str:
        """The HAProxy backend that has all hosts."""
        return haproxy.all_hosts(settings.load(self.path))

    def file(self, label: str) -> Path:
        """The file in gateway.d for the host."""
        return self.path.with_suffix(".d") / f"host-{label}.toml"

    def add(self, label: str, host: FleetHostSettings) -> str:
        """Add a host; returns a message for the operator. Raises NotChanged, ConfigError."""
        if settings.load(self.path).fleet.srv:
            raise NotChanged(f"host {label} not added: fleet.srv is set; add the host to the SRV records instead")
        if label in self._hosts():
            raise NotChanged(f"host {label} not added: it is in the fleet already")
        self._write(label, host, whole=True)
        return self._apply(lambda: self._join(label, host), f"host {label} added")

    def drain(self, label: str, drain: bool) -> str:
        """Stop or resume claims to a host; returns a message for the operator. Raises NotChanged, ConfigError."""
        host = self._host(label)
        changed = replace(host, drain=drain)
        self._write(label, changed, whole=self._is_own(label))
        if drain:
            return self._apply(lambda: self._leave(label, haproxy.STAGES), f"host {label} gets no more claims")
        return self._apply(lambda: self._join(label, changed), f"host {label} gets claims again")

    def remove(self, label: str, force: bool) -> str:
        """Remove a host; returns a message for the operator. Without `force`, raises NotChanged if slots run on it."""
        host = self._host(label)
        if not self._is_own(label):
            raise NotChanged(
                f"host {label} not removed: {self.file(label)} does not list it; remove it from the file that does, "
                "then run nbagent gateway apply"
            )
        if not force:
            self._check_unused(label, host)
        self.file(label).unlink()
        everywhere = haproxy.BACKENDS
        return self._apply(lambda: self._leave(label, everywhere, force), f"host {label} removed")

    def _hosts(self) -> dict[str, FleetHostSettings]:
        return dict(settings.load(self.path).hosts)

    def _host(self, label: str) -> FleetHostSettings:
        hosts = self._hosts()
        if label not in hosts:
            raise NotChanged(f"unknown host {label}; known hosts: {', '.join(sorted(hosts)) or 'none'}")
        return hosts[label]

    def _is_own(self, label: str) -> bool:
        """Whether the host's file in gateway.d lists the host, and not only changes a setting of it."""
        file = self.file(label)
        return file.is_file() and settings.has_address(read_tables([file])[0], label)

    def _write(self, label: str, host: FleetHostSettings, whole: bool) -> None:
        """Write the host's file, and restore the previous one if the settings are not valid with it."""
        file = self.file(label)
        before = file.read_bytes() if file.is_file() else None
        lines = [f"[hosts.{label}]"]
        if whole:
            lines += [f'address = "{host.address}"', f"port = {host.port}", f"check_port = {host.check_port}"]
            lines.append(f"weight = {host.weight}")
        lines.append(f"drain = {str(host.drain).lower()}")
        _replace(file, "\n".join(lines).encode() + b"\n")
        try:
            settings.load(self.path)
        except NbagentError:
            file.unlink()
            if before is not None:
                _replace(file, before)
            raise

    def _check_unused(self, label: str, host: FleetHostSettings) -> None:
        if not host.drain:
            raise NotChanged(f"host {label} not removed: it gets claims; drain it first, or use --force")
        figures = fetch_figures(HaproxyServer(label, host.address, host.port, None, False))
        if figures is None:
            raise NotChanged(
                f"host {label} not removed: it does not respond, so slots may run on it; use --force if none do"
            )
        if used := figures.get("in_use"):
            raise NotChanged(f"host {label} not removed: {used} slots run on it; wait for their end, or use --force")

    def _apply(self, change: Callable[[], None], done: str) -> str:
        """Change the running HAProxy. If it is not running, the next start reads the changed files."""
        try:
            change()
        except GatewayDown:
            return f"{done}; the gateway is not running and reads this when it starts"
        return done

    def _join(self, label: str, host: FleetHostSettings) -> None:
        known = {backend: self._has(backend, label) for backend in haproxy.BACKENDS}
        for backend, arguments in haproxy.servers_of(label, host).items():
            if known[backend]:
                continue
            self._call(f"add server {backend}/{label} {arguments}", "New server registered.")
            # HAProxy adds a server in maintenance, with its checks disabled.
            self._call(f"enable health {backend}/{label}")
            if "agent-check" in arguments:
                self._call(f"enable agent {backend}/{label}")
                # HAProxy keeps an added server down until it gets "up", and the agent check reports only a weight.
                self._call(f"set server {backend}/{label} agent up")
            self._call(f"enable server {backend}/{label}")

    def _leave(self, label: str, backends: tuple[str, ...], force: bool = False) -> None:
        for backend in backends:
            if not self._has(backend, label):
                continue
            if backend in haproxy.STAGES:
                # Otherwise the next "ready" of the agent check would end the maintenance.
                self._call(f"disable agent {backend}/{label}")
            self._call(f"set server {backend}/{label} state maint")
            if force:
                self._call(f"shutdown sessions server {backend}/{label}")
        deadline_s = time.monotonic() + LEAVE_TIMEOUT_S
        for backend in backends:
            # HAProxy refuses to delete a server with connections. These continue, and new ones are not made.
            while self._has(backend, label):
                response = self.runtime.call(f"del server {backend}/{label}")
                if response.startswith("Server deleted") or time.monotonic() > deadline_s:
                    break
                time.sleep(_RETRY_S)

    def _has(self, backend: str, label: str) -> bool:
        return any(server.name == label for server in self.runtime.servers(backend))

    def _call(self, command: str, expected: str = "") -> None:
        response = self.runtime.call(command)
        if response != expected:
            raise NotChanged(f"HAProxy command {' '.join(command.split()[:3])!r} failed: {response or 'no response'}")


def _replace(file: Path, content: bytes) -> None:
    """Write `file` atomically."""
    file.parent.mkdir(exist_ok=True)
    # The suffix is not .toml, so that the settings are never read from the incomplete file.
    new = file.with_suffix(".new")
    try:
        new.write_bytes(content)
        new.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
