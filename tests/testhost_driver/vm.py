# SPDX-License-Identifier: BSD-3-Clause
"""The vm driver: QEMU with the suite's stock kernel. It proves cgroup v2, PSI, nftables and Debian 13.

QEMU runs in the host's network namespace and cgroup. Commands go through one ssh master, whose control socket
is a file in the host's directory; the guest's ports appear on 127.0.0.1 of the namespace through the same
master, so that inside the guest every connection comes from 127.0.0.1.
"""

from __future__ import annotations

import base64
import contextlib
import os
import platform
import select
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from testhost_driver import cgroups, entry, kvm, launch, netns, processes, transfer
from testhost_driver.errors import BootFailed, HostError
from testhost_driver.state import HostState, Process

DEFAULT_MEMORY_BYTES = 4 << 30
DEFAULT_CPUS = 2
# An emulated boot takes half a minute on an idle machine, and longer than three minutes beside five other hosts.
BOOT_TIMEOUT_S = 900
SHUTDOWN_TIMEOUT_S = 45
READY = b"testhost-ready"  # what the guest's testhost-ready.service writes to its second serial port
SSH_ADDRESS = "127.0.0.2"  # not 127.0.0.1, because all ports of that address are forwarded to the guest


def check() -> None:
    if platform.machine() != "x86_64":
        raise HostError(f"the vm driver is for x86_64 machines, this one is {platform.machine()}")


def boot(host: HostState, say: Callable[[str], None]) -> HostState:
    """Start QEMU and return when ssh answers. The state is saved as soon as there is a pid."""
    host = replace(
        host,
        memory_bytes=host.memory_bytes or DEFAULT_MEMORY_BYTES,
        cpus=host.cpus or DEFAULT_CPUS,
        accel="kvm" if kvm.works(Path(host.tree), say) else "tcg",
    )
    directory = host.directory
    _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", host.name, "-f", str(directory / "key")])
    _run(
        [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            f"{host.tree}/root.ext4",
            str(directory / "disk.qcow2"),
        ]
    )
    with open(directory / transfer.MAILBOX, "wb") as mailbox:
        mailbox.truncate(transfer.MAILBOX_BYTES)
    if host.accel == "tcg":
        say(f"{host.name}: emulating the processor, this takes a while")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(directory / "ready"))
        listener.listen(1)
        host = replace(host, monitor=processes.identify(launch.launch(_qemu_plan(host))))
        host.save()
        _wait_ready(host, listener)
    host = replace(host, tunnel=_start_tunnel(host))
    host.save()
    assert host.monitor is not None
    prefix = [*_ssh(host), "-o", "LogLevel=ERROR", "-o", "ProxyCommand=false"]  # fails without the master
    entry.write(
        str(directory / "entry"), host.monitor.pid, host.monitor.start_ticks, prefix, remote_shell=True
    )
    return host


def healthy(host: HostState) -> bool:
    return processes.alive(host.monitor) and processes.alive(host.tunnel)


def halt(host: HostState, *, now: bool) -> None:
    """Shut the guest down in good order, within a deadline, then remove what is left."""
    monitor_fd = processes.open_pidfd(host.monitor) if host.monitor else None
    if monitor_fd is not None:
        if not now and host.up:
            poweroff = entry.command(host.name, ["systemctl", "poweroff"])
            with contextlib.suppress(subprocess.TimeoutExpired):
                if poweroff:
                    subprocess.run(
                        poweroff, check=False, capture_output=True, timeout=15, env=entry.ENVIRONMENT
                    )
                    processes.wait_gone(monitor_fd, time.monotonic() + SHUTDOWN_TIMEOUT_S)
        os.close(monitor_fd)
    processes.kill([host.monitor, host.tunnel])


def prepare_port(host: HostState, port: int) -> None:
    """Make 127.0.0.1:PORT of the network namespace be the guest's. The ssh master ignores a known port."""
    done = subprocess.run(
        [*_ssh(host), "-O", "forward", "-L", f"127.0.0.1:{port}:127.0.0.1:{port}", "testhost"],
        check=False,
        capture_output=True,
        text=True,
        env=entry.ENVIRONMENT,
    )
    if done.returncode:
        raise HostError(f"{host.name}: cannot forward port {port}: {done.stderr.strip()}")


def console_end(host: HostState) -> str:
    try:
        return "\n".join((host.directory / "console.log").read_text(errors="replace").splitlines()[-40:])
    except FileNotFoundError:
        return "(no console output)"


def processor(accel: str, suite: str) -> list[str]:
    if accel == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    # A processor without AVX, because glibc's functions with AVX take up to twice the time when they are emulated.
    # Debian 13's kernel panics on this QEMU's emulation of the 16-byte compare and exchange.
    return ["-accel", "tcg,thread=multi", "-cpu", "Nehalem,-cx16" if suite == "trixie" else "Nehalem"]


def _qemu_plan(host: HostState) -> launch.Plan:
    directory = host.directory
    assert host.memory_bytes is not None
    key = base64.b64encode((directory / "key.pub").read_bytes()).decode()
    command_line = (
        "root=/dev/vda rw console=ttyS0 quiet mitigations=off net.ifnames=0"
        " systemd.show_status=no systemd.ssh_auto=no"
        f" systemd.hostname={host.name} testhost.key={key}"
    )
    argv = [
        "qemu-system-x86_64",
        "-name",
        host.name,
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
    ]
    argv += processor(host.accel, host.suite)
    argv += ["-smp", str(host.cpus), "-m", f"{host.memory_bytes >> 20}M"]
    argv += ["-kernel", f"{host.tree}/vmlinuz", "-initrd", f"{host.tree}/initrd.img", "-append", command_line]
    # The disk is deleted with the host, so writes need not be flushed.
    argv += ["-drive", f"file={directory / 'disk.qcow2'},if=virtio,format=qcow2,cache=unsafe,discard=unmap"]
    argv += ["-drive", f"file={directory / transfer.MAILBOX},if=virtio,format=raw,cache=unsafe"]
    argv += ["-netdev", f"user,id=net,restrict=on,hostfwd=tcp:{SSH_ADDRESS}:22-:22"]
    argv += ["-device", "virtio-net-pci,netdev=net"]
    argv += ["-device", "virtio-rng-pci", "-serial", f"file:{directory / 'console.log'}"]
    argv += ["-chardev", f"socket,id=ready,path={directory / 'ready'}", "-serial", "chardev:ready"]
    return launch.Plan(
        argv=argv,
        log=str(directory / "qemu.log"),
        environment={"PATH": os.environ.get("PATH", "/usr/bin:/bin")},
        cgroup_procs=cgroups.join_files(host.name, "host"),
        netns=str(netns.path_of(host.name)),
    )


def _wait_ready(host: HostState, listener: socket.socket) -> None:
    """Waits for the line that the guest writes to its second serial port, connected here, when ssh accepts."""
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    monitor_fd = processes.open_pidfd(host.monitor) if host.monitor else None
    if monitor_fd is None:
        raise BootFailed(f"{host.name}: QEMU ended at once:\n{_qemu_log(host)}")
    heard = b""
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, monitor_fd)
        source: socket.socket = listener
        while READY not in heard:
            timeout_s = max(0.0, deadline - time.monotonic())
            readable = _readable([source.fileno(), monitor_fd], timeout_s)
            if source.fileno() not in readable:
                why = "QEMU ended" if readable else f"no ssh within {BOOT_TIMEOUT_S} s"
                raise BootFailed(f"{host.name}: {why}:\n{_qemu_log(host)}\n{console_end(host)}")
            if source is listener:
                source = stack.enter_context(listener.accept()[0])
            elif not (received := source.recv(4096)):
                raise BootFailed(f"{host.name}: QEMU ended:\n{_qemu_log(host)}\n{console_end(host)}")
            else:
                heard += received


def _start_tunnel(host: HostState) -> Process:
    """The ssh master, in the host's network namespace. Without -f, so that its pid is that of the started process."""
    directory = host.directory
    argv = [
        *_ssh(host),
        "-M",
        "-N",
        "-i",
        str(directory / "key"),
        "-p",
        "22",
        "-o",
        f"HostName={SSH_ADDRESS}",
    ]
    argv += [
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
        "-o",
        "IdentitiesOnly=yes",
    ]
    argv += [
        "-o",
        "BatchMode=yes",
        "-o",
        "LogLevel=ERROR",
        "-o",
        "ServerAliveInterval=30",
        "-o",
        "ServerAliveCountMax=20",
    ]
    # A fast cipher rather than a strong one, because the guest is emulated and the connection stays on this machine.
    argv += ["-o", "Ciphers=aes128-ctr", "-o", "PermitLocalCommand=yes"]
    # LocalCommand runs when the master is connected, which is when its control socket exists.
    fifo = directory / "connected"
    os.mkfifo(fifo)
    argv += ["-o", f"LocalCommand=echo >{fifo}", "testhost"]
    with open(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), "rb") as connected:
        plan = launch.Plan(
            argv=argv,
            log=str(directory / "ssh.log"),
            environment=entry.ENVIRONMENT,
            cgroup_procs=cgroups.join_files(host.name, "helpers"),
            netns=str(netns.path_of(host.name)),
        )
        tunnel = processes.identify(launch.launch(plan))
        tunnel_fd = processes.open_pidfd(tunnel) if tunnel else None
        try:
            readable = _readable([connected.fileno(), tunnel_fd], 60) if tunnel_fd is not None else set()
        finally:
            if tunnel_fd is not None:
                os.close(tunnel_fd)
        if tunnel is None or connected.fileno() not in readable:
            said = Path(plan.log).read_text(errors="replace") if Path(plan.log).exists() else ""
            raise BootFailed(f"{host.name}: no ssh connection:\n{said}\n{console_end(host)}")
    return tunnel


def _readable(fds: list[int], timeout_s: float) -> set[int]:
    return set(select.select(fds, [], [], timeout_s)[0])


def _ssh(host: HostState) -> list[str]:
    return ["ssh", "-F", "none", "-S", str(host.directory / "ssh"), "-l", "root"]


def _qemu_log(host: HostState) -> str:
    with contextlib.suppress(FileNotFoundError):
        return (host.directory / "qemu.log").read_text(errors="replace").strip()
    return ""


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        raise HostError(f"{' '.join(argv)}: {done.stderr.strip()}")
