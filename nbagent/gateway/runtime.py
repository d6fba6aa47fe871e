"""HAProxy's runtime interface: a command is a line on a unix socket, its answer all that comes back."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nbagent.core.errors import NbagentError

TIMEOUT_S = 10.0
_ANSWER_MAX_BYTES = 64 << 20


class GatewayDown(NbagentError):
    """HAProxy's socket does not answer."""

    code = "gateway-down"
    title = "The gateway does not run"
    http_status = 503
    exit_status = 69  # EX_UNAVAILABLE of sysexits.h


@dataclass(frozen=True)
class HaproxyServer:
    """A server of a backend, as HAProxy knows it now."""

    name: str
    address: str
    port: int
    fqdn: str | None
    is_down: bool

    @property
    def label(self) -> str:
        """The host's: of one that DNS named the first part of its name, else the server's own name."""
        return self.fqdn.partition(".")[0] if self.fqdn else self.name


class Runtime:
    """The interface behind the socket `path`. Calls raise GatewayDown when nobody is there."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def call(self, command: str) -> str:
        """What HAProxy answers to one command."""
        parts, size = [], 0
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(TIMEOUT_S)
                connection.connect(str(self.path))
                connection.sendall(f"{command}\n".encode())
                while (part := connection.recv(1 << 16)) and size < _ANSWER_MAX_BYTES:
                    parts.append(part)
                    size += len(part)
        except OSError as error:
            raise GatewayDown(f"{self.path}: {error.strerror or error}; is nbagent-gateway.service active?") from None
        return b"".join(parts).decode(errors="replace").strip()

    def worker(self) -> str:
        """Which process answers: another one after each reload."""
        return next((line.partition(":")[2].strip() for line in self.call("show info").splitlines()
                     if line.startswith("Pid:")), "")

    def servers(self, backend: str) -> list[HaproxyServer]:
        """The hosts of a backend; ours that are no host begin with "_"."""
        return list(parse_servers(self.call(f"show servers state {backend}")))


def parse_servers(text: str) -> Iterator[HaproxyServer]:
    """What `show servers state` tells: a version, a line of names behind "#", and a line for each server."""
    names: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            names = line[1:].split()
        elif names and (values := line.split()):
            told = dict(zip(names, values, strict=False))
            # A place that SRV records may fill and do not has no address.
            if told["srv_name"].startswith("_") or told["srv_addr"] == "-" or told["srv_port"] == "0":
                continue
            fqdn = told.get("srv_fqdn", "-")
            yield HaproxyServer(
                told["srv_name"], told["srv_addr"], int(told["srv_port"]), None if fqdn == "-" else fqdn,
                told["srv_op_state"] == "0",
            )
