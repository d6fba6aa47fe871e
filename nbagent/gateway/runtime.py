# SPDX-License-Identifier: BSD-3-Clause
"""A client of HAProxy's Runtime API: each connection to a unix socket carries one command line and its response."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbagent.core.errors import NbagentError

TIMEOUT_S = 10.0
_RESPONSE_MAX_BYTES = 64 << 20


class GatewayDown(NbagentError):
    """HAProxy does not respond at its socket."""

    code = "gateway-down"
    title = "The gateway is not running"
    http_status = 503
    exit_status = 69  # EX_UNAVAILABLE of sysexits.h


@dataclass(frozen=True)
class HaproxyServer:
    """A server of a backend, with its current state in HAProxy."""

    name: str
    address: str
    port: int
    fqdn: str | None
    is_down: bool

    @property
    def label(self) -> str:
        """The host's label: the first part of the DNS name if DNS named the host, else the server's name."""
        return self.fqdn.partition(".")[0] if self.fqdn else self.name


class Runtime:
    """The Runtime API at the socket `path`. Calls raise GatewayDown if HAProxy does not respond."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def call(self, command: str) -> str:
        """HAProxy's response to `command`."""
        parts, size = [], 0
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(TIMEOUT_S)
                connection.connect(str(self.path))
                connection.sendall(f"{command}\n".encode())
                while (part := connection.recv(1 << 16)) and size < _RESPONSE_MAX_BYTES:
                    parts.append(part)
                    size += len(part)
        except OSError as error:
            raise GatewayDown(f"{self.path}: {error.strerror or error}; is nbagent-gateway.service active?") from None
        return b"".join(parts).decode(errors="replace").strip()

    def worker(self) -> str:
        """The pid of the HAProxy process that responds, which changes with each reload."""
        return next((line.partition(":")[2].strip() for line in self.call("show info").splitlines()
                     if line.startswith("Pid:")), "")

    def servers(self, backend: str) -> list[HaproxyServer]:
        """The hosts of a backend. Servers whose names begin with "_" are not hosts and are left out."""
        return list(parse_servers(self.call(f"show servers state {backend}")))


def parse_servers(text: str) -> Iterator[HaproxyServer]:
    """Parse `show servers state`: a version, a line with "#" and the names of fields, and a line for each server."""
    names: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            names = line[1:].split()
        elif names and (values := line.split()):
            fields = dict(zip(names, values, strict=False))
            # A server of a server-template without an SRV record has no address.
            if fields["srv_name"].startswith("_") or fields["srv_addr"] == "-" or fields["srv_port"] == "0":
                continue
            fqdn = fields.get("srv_fqdn", "-")
            yield HaproxyServer(
                fields["srv_name"], fields["srv_addr"], int(fields["srv_port"]), None if fqdn == "-" else fqdn,
                fields["srv_op_state"] == "0",
            )
