# SPDX-License-Identifier: BSD-3-Clause
"""`Host`, the interface of a test host for tests. The command line is a thin layer over this class.

    with Host.up(name="t1") as host:
        host.copy_in("x.deb", "/root/")
        host.run(["apt-get", "install", "-y", "/root/x.deb"])
        host.connect(9000).sendall(b"GET /claim HTTP/1.0\\r\\n\\r\\n")

The drivers (`nspawn`, `vm`) make the host; the order of creation and removal, the locks and the state are here.
A `Host` object holds no resource, so that any number of processes may have one for the same host.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from testhost_driver import (
    cgroups,
    ending,
    entry,
    forward,
    netns,
    nspawn,
    processes,
    rootfs,
    state,
    sysctls,
    tools,
    transfer,
    vm,
)
from testhost_driver.errors import BadArgument, BootFailed, CommandFailed, CommandTimedOut, NoSuchHost
from testhost_driver.state import HostState

Say = Callable[[str], None]


class Driver(Protocol):
    """The interface that the modules `nspawn` and `vm` have in common."""

    def check(self) -> None: ...
    def boot(self, host: HostState, say: Say) -> HostState: ...
    def healthy(self, host: HostState) -> bool: ...
    def halt(self, host: HostState, *, now: bool) -> None: ...
    def prepare_port(self, host: HostState, port: int) -> None: ...
    def console_end(self, host: HostState) -> str: ...


DRIVERS: dict[str, Driver] = {"nspawn": nspawn, "vm": vm}
DEFAULT_NAME = "host"


def say_on_stderr(line: str) -> None:
    sys.stderr.write(f"testhost: {line}\n")


class Host:
    def __init__(self, found: HostState) -> None:
        self.name = found.name
        self.driver = found.driver
        self.suite = found.suite
        self._state = found

    # --- creation and removal ---

    @classmethod
    def up(
        cls,
        name: str = DEFAULT_NAME,
        driver: str = "nspawn",
        suite: str = "bookworm",
        memory: str | int | None = None,
        cpus: int | None = None,
        packages: Sequence[str] = (),
        say: Say = say_on_stderr,
    ) -> Host:
        """Return a host that is fully booted: a healthy one of that name as it is, else a new one.

        `memory` (bytes, or a number with K, M, G) and `cpus` limit the whole host. Without them an nspawn
        host has all of the machine, and a virtual machine 4G and 2. `packages` are Debian's, beside those of
        every host. Raises `BootFailed` after clearing whatever was made. A new host is removed when a signal ends
        this process (`ending`), unless it is kept.
        """
        state.check_name(name)
        if driver not in state.DRIVERS:
            raise BadArgument(f"driver {driver!r}: one of {', '.join(state.DRIVERS)}")
        if suite not in state.SUITES:
            raise BadArgument(f"suite {suite!r}: one of {', '.join(state.SUITES)}")
        memory_bytes = parse_bytes(memory)
        if cpus is not None and not 1 <= cpus <= 64:
            raise BadArgument(f"cpus {cpus}: 1 to 64")
        if os.geteuid() != 0:
            raise BadArgument("test hosts need root")
        DRIVERS[driver].check()
        with state.host_lock(name):
            found = state.load(name)
            if found and _healthy(found):
                if (found.driver, found.suite) != (driver, suite):
                    raise BadArgument(f"{name} is up as {found.driver} {found.suite}; take it down first")
                say(f"{name} is up already ({driver}, {suite})")
                return cls(found)
            if state.host_directory(name).exists():
                say(f"{name} has ended; clearing its remains")
                _clear(name)
            tools.ensure(driver, say)
            started = time.monotonic()
            recipe = rootfs.Recipe(suite, driver, tuple(packages))
            ending.made(_label(name), lambda: take_down(name, now=True))
            try:
                with rootfs.held(recipe, say) as tree:
                    state.make_directory(name)
                    fresh = HostState(name, driver, suite, memory_bytes, cpus, state.boot_id(), str(tree))
                    fresh.save()
                host = cls._boot(fresh, say)
            except BaseException:
                _clear(name)
                ending.gone(_label(name))
                raise
            say(f"{name} is up ({driver}, {suite}) after {time.monotonic() - started:.1f} s")
            return host

    @classmethod
    def attach(cls, name: str) -> Host:
        """The host of that name, which must be up."""
        found = state.load(state.check_name(name))
        if found is None:
            raise NoSuchHost(f"no host {name!r}; `testhost list` shows what is up")
        if not _healthy(found):
            raise NoSuchHost(
                f"host {name!r} is not running any more; `testhost up --name {name}` makes a new one"
            )
        return cls(found)

    @classmethod
    def _boot(cls, fresh: HostState, say: Say) -> Host:
        limits = (fresh.memory_bytes, fresh.cpus) if fresh.driver == "nspawn" else (None, None)
        cgroups.create(fresh.name, *limits)
        if not netns.path_of(fresh.name).exists():
            netns.create(fresh.name)
        sysctls.raise_all()
        say(f"{fresh.name}: booting")
        booted = DRIVERS[fresh.driver].boot(fresh, say)
        booted.save()
        host = cls(booted)
        host._check_running(say)
        host._state = replace(booted, up=True)
        host._state.save()
        return host

    def _check_running(self, say: Say) -> None:
        say(f"{self.name}: waiting for systemd to settle")
        done = self.run(["systemctl", "is-system-running", "--wait"], check=False, timeout=120)
        verdict = done.stdout.strip()
        if verdict == "running":
            return
        failed = self.run(
            ["systemctl", "list-units", "--failed", "--plain", "--no-legend"], check=False
        ).stdout
        journal = self.run(
            ["journalctl", "-b", "-p", "warning", "-n", "40", "--no-pager"], check=False
        ).stdout
        raise BootFailed(
            f"{self.name}: systemd reports {verdict or done.stderr.strip()!r}, not 'running'\n"
            f"--- failed units\n{failed}--- journal\n{journal}--- console\n{self.console_end()}"
        )

    def console_end(self) -> str:
        """The last lines of the console, with the kernel's report when the kernel of a VM has stopped."""
        return DRIVERS[self.driver].console_end(self._state)

    def down(self, *, now: bool = False) -> None:
        """End the host and remove all of it. May be called twice. `now` spares a VM its shutdown."""
        take_down(self.name, now=now)

    def keep(self) -> None:
        """Lets the host outlive this process, also when a signal ends it."""
        ending.keep(_label(self.name), f"tests/testhost down {self.name}")

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down(now=True)

    def boot_again(self, timeout_s: float = 60, say: Say = say_on_stderr) -> None:
        """Waits until the host has shut down, then boots it with its disk and its network, as a reboot does.

        For nspawn hosts, because a virtual machine reboots by itself. The test calls it beside the command that
        reboots the host.
        """
        if self.driver != "nspawn":
            raise BadArgument(f"{self.name}: boot_again is for nspawn hosts")
        ended = processes.open_pidfd(self._state.monitor) if self._state.monitor else None
        if ended is not None:
            try:
                if not processes.wait_gone(ended, time.monotonic() + timeout_s):
                    raise BootFailed(f"{self.name} has not shut down within {timeout_s} s")
            finally:
                os.close(ended)
        with state.host_lock(self.name):
            cgroups.kill(self.name)
            cgroups.remove(self.name)
            self._state = Host._boot(replace(self._state, leader=None, monitor=None, up=False, forwards=()), say)._state

    # --- commands ---

    def command(self, argv: Sequence[str], *, tty: bool = False, tag: str = "") -> list[str]:
        """The argv that, executed here with `entry.ENVIRONMENT`, runs `argv` inside as root in /root."""
        if not argv:
            raise BadArgument("no command given")
        found = entry.command(self.name, [str(word) for word in argv], tty=tty, tag=tag)
        if found is None:
            raise NoSuchHost(f"host {self.name!r} is not running any more")
        return found

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        input: str | bytes | None = None,  # noqa: A002 - as subprocess.run has it
        timeout: float | None = 120,
        text: bool = True,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command inside and return its output. Death by a signal is status 128 + its number, as in a
        shell.

        Raises `CommandFailed`, with stdout and stderr in its text, when `check` and the status is not 0;
        `CommandTimedOut` in any case when it takes longer than `timeout` seconds.
        """
        words = [str(word) for word in argv]
        tag = secrets.token_hex(8)
        stdin: dict[str, Any] = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
        try:
            done = subprocess.run(
                self.command(words, tag=tag),
                check=False,
                capture_output=True,
                timeout=timeout,
                text=text,
                env=entry.ENVIRONMENT,
                **stdin,
            )
        except subprocess.TimeoutExpired as error:
            self._end(tag)
            out, err = _text(error.stdout), _text(error.stderr) + f"\n[ended after {timeout} s]"
            raise CommandTimedOut(self.name, words, 124, out, err) from None
        returncode = done.returncode if done.returncode >= 0 else 128 - done.returncode
        if check and returncode:
            raise CommandFailed(self.name, words, returncode, _text(done.stdout), _text(done.stderr))
        return subprocess.CompletedProcess(words, returncode, done.stdout, done.stderr)

    def _end(self, tag: str) -> None:
        """End the processes of a command that timed out. With nspawn the kernel has ended them already."""
        killer = entry.command(self.name, entry.end_by_tag(tag)) if self.driver == "vm" else None
        if killer:
            subprocess.run(killer, check=False, capture_output=True, timeout=60, env=entry.ENVIRONMENT)

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command inside that runs beside the test; it ends when the returned process is killed."""
        return subprocess.Popen(self.command(argv), **{"env": entry.ENVIRONMENT, **options})

    def copy_in(self, src: str | Path | Sequence[str | Path], dest: str) -> None:
        """Copy files or directories of this machine into the host, as `cp -a` would."""
        sources = [src] if isinstance(src, (str, Path)) else list(src)
        transfer.copy_in(self, [Path(source) for source in sources], dest)

    def copy_out(self, src: str, dest: str | Path) -> None:
        """Copy a file or directory of the host to this machine, as `cp -a` would."""
        transfer.copy_out(self, src, str(dest))

    # --- ports ---

    def connect(self, port: int, timeout: float = 10) -> socket.socket:
        """A TCP connection to 127.0.0.1:`port` inside the host, which sees it come from 127.0.0.1."""
        DRIVERS[self.driver].prepare_port(self._state, check_port(port))
        return netns.connect(self.name, port, timeout)

    def forward(self, port: int, to: int | None = None) -> int:
        """Make 127.0.0.1:`to` of this machine reach `port`; returns `to`. Default: the same; 0: any."""
        check_port(port)
        wanted = port if to is None else to
        if wanted:
            check_port(wanted)
        with state.host_lock(self.name):
            current = state.load(self.name)
            if current is None:
                raise NoSuchHost(f"host {self.name!r} has ended")
            for known in current.forwards:
                if (known.host_port, known.machine_port) == (port, wanted) and processes.alive(known.proxy):
                    return known.machine_port
            DRIVERS[self.driver].prepare_port(current, port)
            made = forward.start(current, port, wanted)
            kept = tuple(known for known in current.forwards if processes.alive(known.proxy))
            self._state = replace(current, forwards=(*kept, made))
            self._state.save()
            return made.machine_port


def take_down(name: str, *, now: bool = False) -> bool:
    """Remove a host, or the remains of one. False when there was neither."""
    state.check_name(name)
    with state.host_lock(name):
        if not state.host_directory(name).exists():
            ending.gone(_label(name))
            return False
        _clear(name, now=now)
        ending.gone(_label(name))
        return True


def status(name: str) -> tuple[HostState | None, str]:
    """The state of a host, if any, and `up`, `booting` or `dead`."""
    found = state.load(name)
    if found is None or not _healthy(found, even_booting=True):
        return found, "dead"
    return found, "up" if found.up else "booting"


def parse_bytes(text: str | int | None) -> int | None:
    if text is None or isinstance(text, int):
        return text
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    factors = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    if not number.isdecimal() or unit not in factors or int(number) * factors[unit] < 256 << 20:
        raise BadArgument(f"memory {text!r}: a number with K, M or G, at least 256M; for example 4G")
    return int(number) * factors[unit]


def check_port(port: int) -> int:
    if not 1 <= port <= 65535:
        raise BadArgument(f"port {port}: 1 to 65535")
    return port


def _label(name: str) -> str:
    return f"host {name}"


def _healthy(found: HostState, *, even_booting: bool = False) -> bool:
    if found.boot_id != state.boot_id() or not (found.up or even_booting):
        return False
    return DRIVERS[found.driver].healthy(found)


def _clear(name: str, *, now: bool = True) -> None:
    """Remove everything of a host in any state. No step relies on an earlier one."""
    found = state.load(name)
    with (
        contextlib.ExitStack() as steps
    ):  # in reverse order; one that fails does not keep the others from running
        steps.callback(_restore_when_last)
        steps.callback(state.remove_directory, name)
        steps.callback(netns.remove, name)
        steps.callback(cgroups.remove, name)
        steps.callback(cgroups.kill, name)
        if found and found.boot_id == state.boot_id():
            steps.callback(DRIVERS[found.driver].halt, found, now=now)


def _restore_when_last() -> None:
    if not state.names():
        sysctls.restore()


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
