"""Hosts that come and go while people work: in gateway.d, which is the truth, and in the HAProxy that runs.

Nothing is reloaded and no connection closed. A host's own file is `gateway.d/host-LABEL.toml`; one
that is listed elsewhere can be drained by such a file, but only be removed where it stands.
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
from nbagent.gateway.fleet import ask
from nbagent.gateway.runtime import GatewayDown, HaproxyServer, Runtime
from nbagent.gateway.settings import FleetHostSettings

# What was asked of a host when it was taken out is answered by then, or the host is asked to end it.
LEAVE_TIMEOUT_S = 15.0
_RETRY_S = 0.2


class NotChanged(BadRequest):
    """The fleet is not as the change supposes."""

    code = "fleet-not-changed"
    title = "The fleet was not changed"


class Fleet:
    """The hosts of the configuration at `path`, and of the HAProxy behind `runtime`."""

    def __init__(self, path: Path, runtime: Runtime) -> None:
        self.path, self.runtime = path, runtime

    @property
    def backend(self) -> str:
        """The backend that has all hosts."""
        return haproxy.all_hosts(settings.load(self.path))

    def file(self, label: str) -> Path:
        """The host's own file."""
        return self.path.with_suffix(".d") / f"host-{label}.toml"

    def add(self, label: str, host: FleetHostSettings) -> str:
        """Adds a host; what was done, in a sentence. Raises NotChanged, ConfigError."""
        if settings.load(self.path).fleet.srv:
            raise NotChanged("DNS says which hosts there are (fleet.srv): add it there")
        if label in self._hosts():
            raise NotChanged(f"{label} is in the fleet already")
        self._write(label, host, whole=True)
        return self._tell(lambda: self._join(label, host), f"{label} is in the fleet")

    def drain(self, label: str, drain: bool) -> str:
        """Lets a host be asked for no more slots, or for some again. Raises NotChanged, ConfigError."""
        host = self._host(label)
        changed = replace(host, drain=drain)
        self._write(label, changed, whole=self._is_own(label))
        if drain:
            return self._tell(lambda: self._leave(label, haproxy.STAGES), f"{label} is asked for no more slots")
        return self._tell(lambda: self._join(label, changed), f"{label} is asked for slots again")

    def remove(self, label: str, force: bool) -> str:
        """Takes a host out. Raises NotChanged when it has users and `force` is not given."""
        host = self._host(label)
        if not self._is_own(label):
            raise NotChanged(f"{label} is not in {self.file(label)}; take it out of the file it is in, and apply")
        if not force:
            self._check_unused(label, host)
        self.file(label).unlink()
        everywhere = (*haproxy.STAGES, haproxy.USERS)
        return self._tell(lambda: self._leave(label, everywhere, force), f"{label} is out of the fleet")

    def _hosts(self) -> dict[str, FleetHostSettings]:
        return dict(settings.load(self.path).hosts)

    def _host(self, label: str) -> FleetHostSettings:
        hosts = self._hosts()
        if label not in hosts:
            raise NotChanged(f"no host {label}; there are {', '.join(sorted(hosts)) or 'none'}")
        return hosts[label]

    def _is_own(self, label: str) -> bool:
        """Whether the host stands in its own file, and not only a change to it."""
        file = self.file(label)
        return file.is_file() and "address" in read_tables([file])[0].get("hosts", {}).get(label, {})

    def _write(self, label: str, host: FleetHostSettings, whole: bool) -> None:
        """Writes the host's file, and takes it back when the settings are no longer right with it."""
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
            raise NotChanged(f"{label} is asked for slots: drain it first, or use --force")
        figures = ask(HaproxyServer(label, host.address, host.port, None, False))
        if figures is None:
            raise NotChanged(f"{label} does not say whether slots run; use --force if none do, or none matter")
        if used := figures.get("in_use"):
            raise NotChanged(f"{used} slots run on {label}; wait for their end, or use --force")

    def _tell(self, change: Callable[[], None], done: str) -> str:
        """Changes the HAProxy that runs. Without one, the file is what the next start reads."""
        try:
            change()
        except GatewayDown:
            return f"{done} when the gateway starts"
        return done

    def _join(self, label: str, host: FleetHostSettings) -> None:
        known = {backend: self._has(backend, label) for backend in (*haproxy.STAGES, haproxy.USERS)}
        for backend, arguments in haproxy.servers_of(label, host).items():
            if known[backend]:
                continue
            self._call(f"add server {backend}/{label} {arguments}", "New server registered.")
            # A server that is added is in maintenance, with its checks at rest.
            self._call(f"enable health {backend}/{label}")
            if "agent-check" in arguments:
                self._call(f"enable agent {backend}/{label}")
                # The agent tells a weight and not "up", without which HAProxy takes a server that is added for down.
                self._call(f"set server {backend}/{label} agent up")
            self._call(f"enable server {backend}/{label}")

    def _leave(self, label: str, backends: tuple[str, ...], force: bool = False) -> None:
        for backend in backends:
            if not self._has(backend, label):
                continue
            if backend in haproxy.STAGES:
                # Else its next word, "ready", would end the maintenance.
                self._call(f"disable agent {backend}/{label}")
            self._call(f"set server {backend}/{label} state maint")
            if force:
                self._call(f"shutdown sessions server {backend}/{label}")
        deadline_s = time.monotonic() + LEAVE_TIMEOUT_S
        for backend in backends:
            # Who is served by it goes on; it is only not there for anybody new.
            while self._has(backend, label):
                said = self.runtime.call(f"del server {backend}/{label}")
                if said.startswith("Server deleted") or time.monotonic() > deadline_s:
                    break
                time.sleep(_RETRY_S)

    def _has(self, backend: str, label: str) -> bool:
        return any(server.name == label for server in self.runtime.servers(backend))

    def _call(self, command: str, expected: str = "") -> None:
        said = self.runtime.call(command)
        if said != expected:
            raise NotChanged(f"HAProxy says to {' '.join(command.split()[:3])!r}: {said or 'nothing'}")


def _replace(file: Path, content: bytes) -> None:
    """The name appears with the whole content, or keeps what it had."""
    file.parent.mkdir(exist_ok=True)
    # Not *.toml: it must not be read before it is whole.
    new = file.with_suffix(".new")
    try:
        new.write_bytes(content)
        new.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
