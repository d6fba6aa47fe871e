# SPDX-License-Identifier: BSD-3-Clause
"""The product on a test host: its packages built and installed, and a client of its API.

Shared by `make up`, the integration tests and the benchmarks, so that all three use the same packages.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testhost_driver import Host, aptsources, ending, rootfs

TOP = Path(__file__).resolve().parent.parent
CACHE = rootfs.cache()
DIST = CACHE / "dist"
# The packages of a compute server.
HOST = ("python3-nbagent", "nbagent", "nbagent-image-minimal")
# The packages of a fleet's gateway.
GATEWAY = ("python3-nbagent", "nbagent-gateway")
API_PORT, ROUTER_PORT, CHECK_PORT = 9000, 8000, 9001
# Of an installation, and of the wait for the first warm slot. An emulated virtual machine is slow.
START_TIMEOUT_S = {"nspawn": 900, "vm": 3600}
# A zygote that follows another has little processor time for up to five minutes.
COMPLETE_TIMEOUT_S = 600
# The end of a build's log that is printed when it fails.
LOG_LINES = 30


# The state of a host, to compare before and after: files, users, units, cgroups, mounts, network, processes.
# Without the databases of dpkg and apt, caches and logs.
LISTING = r"""
find /etc /opt /root /srv /usr /var /run /home \
  \( -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/cache -o -path /var/log \
  -o -path /var/backups -o -path /run/log -o -path /run/udev -o -path /run/lock -o -path /run/user \
  -o -path '/run/.*' -o -path /var/tmp -o -path /run/host -o -path /run/sshd \) -prune \
  -o -not -name '*.pyc' -not -name __pycache__ -printf 'file %p %M %u:%g %l\n'
cut -d: -f1 /etc/passwd | sed 's/^/user /'
cut -d: -f1 /etc/group | sed 's/^/group /'
systemctl list-unit-files --no-legend --plain --no-pager | awk '{print "unit file " $1, $2}'
systemctl list-units --all --no-legend --plain --no-pager '*nbagent*' | awk '{print "unit " $1}'
find /sys/fs/cgroup -type d -name '*nbagent*' -printf 'cgroup %p\n'
awk '{print "mount " $5}' /proc/self/mountinfo
nft list tables | sed 's/^/nftables /'
ip -br address | sed 's/^/addresses /'
grep -s . /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/*/forwarding | sed 's/^/forwarding /'
ss -Htlnx | awk '{print "listener " $5}' | grep -v ' \*$' | grep -v /run/systemd
ps -e -o user:20=,args= | grep -E 'nbagent|nginx|gunicorn|jupyter' | grep -v grep | sed 's/^/process /'
true
"""


def listing(host: Host) -> set[str]:
    """The state of a host as a set of lines, to be compared with another."""
    return set(host.run(["sh", "-c", LISTING]).stdout.splitlines())


def build(say: Callable[[str], None], names: Sequence[str] = HOST) -> list[Path]:
    """Builds the named packages, side by side; takes a second when no source changed."""
    ending.take_signals()
    commands: dict[str, list[str | Path]] = {"the program": [TOP / "packaging/build-deb", DIST]}
    if "nbagent-image-minimal" in names:
        commands["nbagent-image-minimal"] = [TOP / "packaging/build-image-deb", "minimal", DIST]
    with ThreadPoolExecutor(len(commands)) as threads:
        built = [threads.submit(_build, what, command, say) for what, command in commands.items()]
        found = {package.name.split("_")[0]: package for one in built for package in one.result()}
    return [found[name] for name in names]


def _build(what: str, command: Sequence[str | Path], say: Callable[[str], None]) -> list[Path]:
    """The packages that a command prints. All else that it prints is in a log, which a failure names."""
    log = CACHE / "log" / f"{Path(command[0]).name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"building {what}")
    began_s = time.monotonic()
    with tempfile.NamedTemporaryFile("w+", dir=log.parent, prefix=f".{log.name}-", delete=False) as output:
        # A process group of its own, so that a signal that ends this program ends all of it.
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output, text=True, process_group=0
        ) as process:
            printed = _printed(process)
        # Renamed, because another run may write a log of the same name meanwhile.
        Path(output.name).rename(log)
        output.seek(0)
        last = "".join(output.readlines()[-LOG_LINES:])
    if process.returncode:
        raise SystemExit(f"{last}building {what} failed with status {process.returncode}; the whole log is {log}")
    if (took_s := time.monotonic() - began_s) > 2:
        say(f"built {what} in {took_s:.0f} s")
    return [Path(line) for line in printed.splitlines() if line.endswith(".deb")]


def _printed(process: subprocess.Popen[str]) -> str:
    """The standard output of a process, which is interrupted with its children when a signal ends this program."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=1)[0]
        if ending.is_ending():
            os.killpg(process.pid, signal.SIGINT)


def install(host: Host, packages: list[Path], settings: str = "") -> None:
    """Installs the packages by apt, as an operator would, and waits until the pool is warm."""
    if settings:
        host.run(["mkdir", "-p", "/etc/nbagent/conf.d"])
        host.run(["tee", "/etc/nbagent/conf.d/50-test.toml"], input=settings)
    add(host, packages)
    wait_warm(host)


def add(host: Host, packages: list[Path]) -> None:
    """Installs the packages by apt."""
    for package in packages:
        host.copy_in(str(package), "/root/")
    names = [f"/root/{package.name}" for package in packages]
    # A rebuilt package has the same version, so that apt would regard it as installed.
    host.run(["apt-get", "-q", "install", "-y", "--reinstall", *names], timeout=START_TIMEOUT_S[host.driver])


def debian_packages(host: Host, names: Sequence[str], directory: Path) -> list[Path]:
    """Packages of Debian, with those of their dependencies that the host, which has no network, does not have."""
    status = directory / f"{host.name}.status"
    host.copy_out("/var/lib/dpkg/status", status)
    cache = directory / f"{host.name}.debs"
    (cache / "partial").mkdir(parents=True)
    apt = ["apt-get", "-q", "-y", f"-oDir::State::status={status}", f"-oDir::Cache::archives={cache}"]
    if host.suite != platform.freedesktop_os_release().get("VERSION_CODENAME"):
        # Lists of its own, since those of this machine are of another suite.
        sources, lists = directory / f"{host.suite}.list", directory / f"{host.suite}.lists"
        apt += [f"-oDir::Etc::SourceList={sources}", "-oDir::Etc::SourceParts=/dev/null"]
        apt += [f"-oDir::State::Lists={lists}", "-oDir::Cache::pkgcache=", "-oDir::Cache::srcpkgcache="]
        if not lists.exists():
            sources.write_text("\n".join(aptsources.sources_lines(host.suite)) + "\n")
            (lists / "partial").mkdir(parents=True)
            subprocess.run([*apt, "--error-on=any", "update"], check=True, capture_output=True)
    subprocess.run([*apt, "--no-install-recommends", "--download-only", "install", *names],
                   check=True, capture_output=True)
    return sorted(cache.glob("*.deb"))


def add_changed(host: Host, packages: list[Path], log: Callable[[str], None]) -> None:
    """Installs the packages unless the host has files with the same hashes."""
    wanted = "\n".join(f"{hashlib.sha256(package.read_bytes()).hexdigest()}  {package.name}" for package in packages)
    if host.run(["cat", "/root/installed"], check=False).stdout == wanted:
        return
    log(f"installing {', '.join(package.name for package in packages)}")
    add(host, packages)
    host.run(["tee", "/root/installed"], input=wanted)


def wait_warm(host: Host, count: int = 1) -> dict[str, Any]:
    """Waits until `count` slots are warm; fails with the stats and the journal."""
    deadline = time.monotonic() + START_TIMEOUT_S[host.driver]
    stats: dict[str, Any] = {}
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            stats = Api(host).get("/stats").json()
            if stats.get("warm", 0) >= count:
                return stats
        time.sleep(0.2)
    log = host.run(["journalctl", "--no-pager", "-n", "60", "-o", "short-monotonic"], check=False).stdout
    raise AssertionError(f"not {count} warm slots on {host.name} in time: {stats}\n{log}")


def wait_complete(host: Host, image: str = "minimal") -> None:
    """Waits until slots of an image are forked from a complete zygote. On a busy host the first one is a quick one,
    whose slots take more time and memory."""
    deadline = time.monotonic() + COMPLETE_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            found = {entry["name"]: entry for entry in Api(host).get("/images").json()}.get(image)
            if found and found["launch_now"] == "fork" and not found["launch_reason"]:
                return
        time.sleep(0.2)
    raise AssertionError(f"no complete zygote of {image} on {host.name} within {COMPLETE_TIMEOUT_S} s")


class _HostConnection(http.client.HTTPConnection):
    """HTTP to 127.0.0.1:port inside a test host."""

    def __init__(self, host: Host, port: int, timeout: float) -> None:
        super().__init__("127.0.0.1", port, timeout=timeout)
        self._test_host = host

    def connect(self) -> None:
        self.sock = self._test_host.connect(self.port)
        self.sock.settimeout(self.timeout)
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


@dataclass(frozen=True)
class Answer:
    """An HTTP response, read whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Api:
    """Calls one port of a test host; `get`, `post` and the rest return an Answer with any status."""

    def __init__(self, host: Host, port: int = API_PORT, timeout: float = 120) -> None:
        self.host, self.port, self.timeout = host, port, timeout

    def call(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """One request on a connection of its own. A `body` that is not bytes is sent as JSON."""
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection = _HostConnection(self.host, self.port, self.timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def get(self, path: str, **headers: str) -> Answer:
        return self.call("GET", path, headers=headers)

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        return self.call("POST", path, body, headers)

    def patch(self, path: str, body: Any) -> Answer:
        return self.call("PATCH", path, body)

    def delete(self, path: str) -> Answer:
        return self.call("DELETE", path)

    def claim(self, **options: Any) -> dict[str, Any]:
        """A claim that must succeed."""
        answer = self.post("/claim", options)
        assert answer.status == 200, answer.body.decode()
        claim = answer.json()
        assert isinstance(claim, dict)
        return claim


def say(line: str) -> None:
    """Prints progress on standard error, by one write, because steps that run side by side print at the same time."""
    sys.stderr.write(f"· {line}\n")
