# SPDX-License-Identifier: BSD-3-Clause
"""The real HAProxy with the product's own configuration, in front of stand-in agents, in a network namespace.

It differs from the product's in paths, because no package is installed, in a stand-in for the status service, and in a
bound on connections that fits the machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import agents
from claimed import rows

from nbagent.gateway import haproxy, settings
from nbagent.gateway.runtime import GatewayDown, Runtime

HERE = Path(__file__).resolve().parent
TOP = HERE.parent.parent
PORT = 80
URL = f"http://127.0.0.1:{PORT}"
# All requests come from one address.
RATE_MAX = 100000
_READY_S = 60


class Processes:
    """Programs that this process started, in a directory of their own; all end with it."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="nbagent-bench-"))
        self.running: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for process in self.running:
            process.kill()
            process.wait()
        shutil.rmtree(self.directory)

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        process = subprocess.Popen(list(command), **options)
        self.running.append(process)
        return process

    def agents(self, capacity: str, *arguments: str) -> subprocess.Popen[Any]:
        """Starts agents.py and waits until it listens."""
        command = [sys.executable, str(HERE / "agents.py"), "--capacity", capacity, *arguments]
        process = self.start(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if process.stdout.readline() != "listening\n":
            raise SystemExit("the stand-in agents do not start, see above")
        return process

    @property
    def status_socket(self) -> str:
        return f"{self.directory}/status.sock"

    def haproxy(self, hosts: int) -> Gateway:
        """Starts HAProxy for `count` agents and waits until all are up."""
        tables = {
            "listen": {"http": [f"127.0.0.1:{PORT}"], "metrics": "none"}, "landing": {"rate": RATE_MAX},
            "hosts": {agents.label(number): {"address": agents.address(number)} for number in range(hosts)},
        }
        pages = self.directory / "pages"
        pages.mkdir(exist_ok=True)
        for line in (TOP / "packaging/debian/nbagent-gateway.install").read_text().splitlines():
            pattern, where = line.split()
            if where == haproxy.PAGES.lstrip("/"):
                for page in TOP.glob(pattern):
                    shutil.copy(page, pages)
        text = haproxy.render(settings.parse(tables)).replace(haproxy.STATUS_SOCKET, self.status_socket)
        text = text.replace(haproxy.RUN, str(self.directory)).replace(haproxy.PAGES, str(pages))
        (self.directory / "haproxy.cfg").write_text(text)
        with (self.directory / "haproxy.log").open("wb") as log:
            command = ["/usr/sbin/haproxy", "-db", "-f", str(self.directory / "haproxy.cfg")]
            process = self.start(command, stdout=log, stderr=log)
        gateway = Gateway(process, self.directory)
        gateway.wait_up(hosts)
        return gateway


class Gateway:
    """A running HAProxy."""

    def __init__(self, process: subprocess.Popen[Any], directory: Path) -> None:
        self.process, self.directory = process, directory
        self.runtime = Runtime(directory / "admin.sock")

    def wait_up(self, hosts: int) -> None:
        """Waits until HAProxy has checked all agents twice."""
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            try:
                if sum(row["status"] == "UP" for row in self.servers("claims")) == hosts:
                    time.sleep(2.5)
                    return
            except GatewayDown:
                if self.process.poll() is not None:
                    break
            time.sleep(0.1)
        raise SystemExit("HAProxy did not start:\n" + (self.directory / "haproxy.log").read_text()[-2000:])

    def rows(self) -> list[dict[str, str]]:
        return rows(self.runtime.call("show stat"))

    def servers(self, backend: str) -> list[dict[str, str]]:
        """The hosts of a backend."""
        return [
            row for row in self.rows()
            if row["pxname"] == backend and row["svname"] not in ("FRONTEND", "BACKEND", haproxy.NO_HOST)
        ]

    def retries(self, backend: str = "claims") -> int:
        """The number of retries of the backend so far."""
        return sum(int(r["wretr"]) for r in self.rows() if (r["pxname"], r["svname"]) == (backend, "BACKEND"))

    def memory_kib(self) -> dict[str, int]:
        """VmRSS of HAProxy, and the peak."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines)
        return {name: int(found[name].split()[0]) for name in ("VmRSS", "VmHWM")}

    def cpu_s(self) -> float:
        """Processor seconds so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
