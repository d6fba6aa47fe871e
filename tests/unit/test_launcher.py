# SPDX-License-Identifier: BSD-3-Clause
"""Messages of a slot's processes while it starts, and the launcher's results for them."""

import asyncio
import os
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import cancelled, until

from nbagent.core.errors import StartFailed
from nbagent.core.model import Limits, Slot, SlotState
from nbagent.supervisor import launch_service
from nbagent.supervisor.launch_service import BlockedProcess
from nbagent.supervisor.launcher import ExecLauncher, SlotStart
from nbagent.supervisor.sandbox_specs import sandbox_spec, zygote_spec
from nbagent.wire.channel import Channel

SLOT = Slot(
    id="h-0", image="minimal", digest="d", id_base=1 << 20, uid=2000, state=SlotState.STARTING,
    limits=Limits(1 << 30, 100, None, 256), token="t", created_s=0.0,
)


def same(one: int, other: int) -> bool:
    return os.path.sameopenfile(one, other)


def receive_fds(start: SlotStart, *names: str) -> list[int]:
    return asyncio.run(asyncio.wait_for(start.receive_fds(*names), 10))


def wait_running(start: SlotStart, pidfd: int):
    return asyncio.run(asyncio.wait_for(start.wait_running(pidfd, NO_UPLINK, no_interface), 10))


NO_UPLINK = type("Spec", (), {"uplink": None, "forked": True})


async def no_interface(_fd: int) -> None:
    raise AssertionError("a slot without a network has no interface")


@pytest.fixture
def files(tmp_path):
    """Descriptors of three different files."""
    fds = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in "abc"]
    yield fds
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(
    "packets", [[("init", "fork_server")], [("init",), ("fork_server",)], [("fork_server",), ("init",)]]
)
def test_descriptors_are_found_by_name_in_any_order(files, packets):
    known = {"init": files[0], "fork_server": files[1]}
    with SlotStart(SLOT) as start:
        for names in packets:
            start.peer.send({}, {name: known[name] for name in names})
        found = receive_fds(start, "init", "fork_server")
        assert [same(found[0], files[0]), same(found[1], files[1])] == [True, True]
        for fd in found:
            os.close(fd)


def test_descriptors_that_arrive_early_are_kept_until_they_are_wanted(files):
    with SlotStart(SLOT) as start:
        start.peer.send({}, {"netns": files[0]})
        start.peer.send({}, {"fork_server": files[1]})
        found = [*receive_fds(start, "fork_server"), *receive_fds(start, "netns")]
        assert [same(found[0], files[1]), same(found[1], files[0])] == [True, True]
        for fd in found:
            os.close(fd)


@pytest.mark.parametrize("packets", [[("other",)], [("init", "other")], [()], [("netns",), ("netns",)]])
def test_unexpected_descriptors_are_refused_and_closed(files, packets):
    before = set(os.listdir("/proc/self/fd"))
    with SlotStart(SLOT) as start:
        for names in packets:
            start.peer.send({}, dict(zip(names, files, strict=False)))
        with pytest.raises(StartFailed, match="unexpected message"):
            receive_fds(start, "init")
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_failure_has_its_step_and_errno_and_earlier_descriptors_are_closed(files):
    before = set(os.listdir("/proc/self/fd"))
    with SlotStart(SLOT) as start:
        start.peer.send({}, {"init": files[0]})
        start.peer.send({"failure": {"step": "fork", "errno": 11, "text": "no process"}}, {"init": files[0]})
        with pytest.raises(StartFailed, match="fork: no process") as failed:
            receive_fds(start, "init", "fork_server")
        assert failed.value.details == {"step": "fork", "errno": 11}
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("payload", [
    b"{", b"[]", b"7", b"[" * 30000, b'{"failure": 7}', b'{"failure": {"step": "x"}}', b'{"fds": "init"}',
    b'{"failure": {"step": "x", "errno": 1e999, "text": ""}}', b'{"fds": [{}]}', b'{"fds": {"init": 1}}', b'{"fds": 7}',
    b'{"fds": ["init", "init"]}', b"x" * 200_000,
])
def test_a_malformed_message_is_a_failed_start(files, payload):
    """The sender may be an image's code."""
    with SlotStart(SLOT) as start:
        before = set(os.listdir("/proc/self/fd"))
        socket.send_fds(start.peer.socket, [payload], files[:1])
        with pytest.raises(StartFailed, match="malformed message"):
            receive_fds(start, "init")
        assert set(os.listdir("/proc/self/fd")) == before


def test_the_end_of_the_channel_names_the_descriptors_that_are_missing():
    with SlotStart(SLOT) as start:
        start.peer.close()
        with pytest.raises(StartFailed, match="ended before they sent: fork_server, init"):
            receive_fds(start, "init", "fork_server")


def test_descriptors_beside_other_messages_are_closed(files):
    with SlotStart(SLOT) as start:
        start.peer.send({"serves": True}, {"a": files[0]})
        start.peer.send({"runs": True}, {"a": files[0]})
        before = set(os.listdir("/proc/self/fd"))
        pidfd = os.pidfd_open(os.getpid())
        with pytest.raises(StartFailed, match=r"unexpected message.*'runs'"):
            wait_running(start, pidfd)
        os.close(pidfd)
        assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("messages", [[], [{"serves": True}]])
def test_a_program_runs_when_the_channel_is_closed_and_serves_when_it_has_reported_so(messages):
    with SlotStart(SLOT) as start:
        for message in messages:
            start.peer.send(message)
        start.peer.close()
        pidfd = os.pidfd_open(os.getpid())
        launched = wait_running(start, pidfd)
        assert launched.serves is bool(messages) and launched.pid == os.getpid()
        for fd in (pidfd, launched.activity_fd):
            os.close(fd)


def image(**changes) -> SimpleNamespace:
    fields = {
        "name": "minimal", "digest": "sha256-0", "root": Path("/images/minimal"), "id_base": 1 << 20, "user": "jovyan",
        "home": "/home/jovyan", "directory": "/home/jovyan", "python": "/usr/bin/python3", "command": (), "port": None,
        "share_memory": True, "activate": "", "environment": {"PREFIX": "{base_path}/{token}"}, "assets": (),
        "assets_path": "/assets/sha256-0", "public": (),
    }
    return SimpleNamespace(**fields | changes)


def test_a_slot_and_its_zygote_share_the_image_and_differ_in_user_program_and_filter():
    slot, zygote = sandbox_spec(SLOT, image(), 1 << 20, 60.0), zygote_spec(image(), 1 << 20, SLOT.limits)
    differing = {name for name in slot._fields if getattr(slot, name) != getattr(zygote, name)}
    assert differing == {"slot", "uid", "user", "command", "listen_timeout_s", "environment", "syscall_filter"}
    assert slot.environment["PREFIX"] == "/user/h-0/t" and zygote.environment["PREFIX"] == "/user/zygote/"
    assert (zygote.uid, zygote.user) == (0, "root")


def test_an_image_without_python_has_no_zygote():
    with pytest.raises(ValueError, match="no Python"):
        zygote_spec(image(python=None), 1 << 20, SLOT.limits)


@pytest.mark.parametrize(("changes", "url", "expected"), [
    ({"assets": ("lab", "lab-extensions")}, "", "/assets/sha256-0 lab lab-extensions"),
    ({"assets": ("lab",)}, "https://cdn.test/n", "https://cdn.test/n/assets/sha256-0 lab"),
    ({"assets": ()}, "https://cdn.test/n", None),
    ({"assets": ("lab",), "python": None, "command": ("serve",), "port": 8888}, "", None),
])
def test_a_slots_server_learns_the_address_of_its_images_assets(changes, url, expected):
    spec = sandbox_spec(SLOT, image(**changes), 1 << 20, 60.0, assets_url=url)
    assert spec.environment.get("NBAGENT_ASSETS") == expected


@pytest.mark.parametrize(("own", "expected"), [
    ({}, {"https_proxy": "http://10.1.0.8:3128", "no_proxy": "localhost"}),
    ({"HTTPS_PROXY": "http://own:1"}, {"HTTPS_PROXY": "http://own:1", "no_proxy": "localhost"}),
    ({"no_proxy": "*"}, {"https_proxy": "http://10.1.0.8:3128", "no_proxy": "*"}),
    ({"https_proxy": ""}, {"https_proxy": "", "no_proxy": "localhost"}),
])
def test_a_slot_has_the_variables_of_the_proxy_unless_its_image_has_them_in_either_case(own, expected):
    network = {"https_proxy": "http://10.1.0.8:3128", "no_proxy": "localhost"}
    spec = sandbox_spec(SLOT, image(environment=own), 1 << 20, 60.0, network=network)
    assert {name: value for name, value in spec.environment.items() if "proxy" in name.lower()} == expected


class Scope:
    """A scope that starts at once."""

    async def start(self, pids):
        self.pids = pids


@pytest.fixture
def processes():
    """Two processes, which end with the test."""
    made = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    yield made
    for process in made:
        process.kill()
        process.wait()


@pytest.mark.parametrize("ends", [False, True], ids=["the launcher still runs", "the slot still starts"])
async def test_a_start_by_exec_that_is_cancelled_leaves_no_descriptor(monkeypatch, processes, ends):
    (program, launcher), peers, scope = processes, [], Scope()

    async def spawn(_program, control_fd):
        peers.append(Channel.from_fd(os.dup(control_fd)))
        read_fd, go_fd = os.pipe()
        os.close(read_fd)
        return BlockedProcess(os.pidfd_open(launcher.pid), go_fd)

    monkeypatch.setattr(launch_service, "spawn", spawn)
    monkeypatch.setattr(BlockedProcess, "release", lambda self: None)
    with socket.socket(socket.AF_UNIX) as listener:
        before = set(os.listdir("/proc/self/fd"))
        spec = SimpleNamespace(save=dict, uplink=None)
        launching = asyncio.ensure_future(ExecLauncher().launch(SLOT, spec, listener, scope, no_interface))
        await until(lambda: hasattr(scope, "pids"))
        with peers[0] as peer:
            peer.receive().close()
            init = os.pidfd_open(program.pid)
            peer.send({}, {"init": init})
            os.close(init)
            if ends:
                launcher.kill()
                launcher.wait()
                await asyncio.sleep(0.05)
        await asyncio.sleep(0 if ends else 0.05)
        await cancelled(launching)
        assert set(os.listdir("/proc/self/fd")) == before
