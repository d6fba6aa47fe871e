"""What a slot's processes say over its control socket while it starts, and what the launcher makes of it."""

import asyncio
import json
import os
import socket

import pytest

from nbagent.core.errors import StartFailed
from nbagent.core.model import Limits, Slot, SlotState
from nbagent.supervisor.launcher import Parts

SLOT = Slot(
    id="h-0", image="minimal", digest="d", id_base=1 << 20, uid=2000, state=SlotState.STARTING,
    limits=Limits(1 << 30, 100, None, 256), token="t", created_s=0.0,
)


def say(end: socket.socket, *names: str, fds: list[int]) -> None:
    socket.send_fds(end, [json.dumps({"given": names}).encode()], fds)


def same(one: int, other: int) -> bool:
    return os.path.sameopenfile(one, other)


def given(parts: Parts, *names: str) -> list[int]:
    return asyncio.run(asyncio.wait_for(parts.given(*names), 10))


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
def test_descriptors_are_found_by_name_in_whatever_order_they_come(files, packets):
    known = {"init": files[0], "fork_server": files[1]}
    with Parts(SLOT) as parts:
        for names in packets:
            say(parts.theirs, *names, fds=[known[name] for name in names])
        found = given(parts, "init", "fork_server")
        assert [same(found[0], files[0]), same(found[1], files[1])] == [True, True]
        for fd in found:
            os.close(fd)


@pytest.mark.parametrize("names", [("fork_server",), ("init", "init"), ("init", "netns"), ()])
def test_what_was_not_asked_for_is_refused_and_no_descriptor_stays(files, names):
    with Parts(SLOT) as parts:
        before = set(os.listdir("/proc/self/fd"))
        say(parts.theirs, *names, fds=files[: len(names)] or files[:1])
        with pytest.raises(StartFailed):
            given(parts, "init")
        assert set(os.listdir("/proc/self/fd")) == before


def test_a_failure_is_told_with_its_step_and_what_came_before_it_is_closed(files):
    with Parts(SLOT) as parts:
        before = set(os.listdir("/proc/self/fd"))
        say(parts.theirs, "init", fds=files[:1])
        parts.theirs.send(json.dumps({"failed": {"step": "fork", "errno": 11, "text": "no process"}}).encode())
        with pytest.raises(StartFailed, match="fork: no process"):
            given(parts, "init", "fork_server")
        assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("said", [b"{", b"[]", b"7", b"[" * 30000, b'{"failed": 7}', b'{"failed": {"step": "x"}}',
                                  b'{"given": "init"}', b'{"given": [{}]}', b'{"given": {"init": 1}}', b'{"given": 7}'])
def test_nonsense_is_a_failure_like_any_other(files, said):
    """An image says it, perhaps."""
    with Parts(SLOT) as parts:
        before = set(os.listdir("/proc/self/fd"))
        socket.send_fds(parts.theirs, [said], files[:1])
        with pytest.raises(StartFailed):
            given(parts, "init")
        assert set(os.listdir("/proc/self/fd")) == before


async def no_interface(_fd: int) -> None:
    raise AssertionError("a slot without network has none")


def test_nothing_is_kept_of_what_comes_with_another_word(files):
    with Parts(SLOT) as parts:
        socket.send_fds(parts.theirs, [b'{"serves": true}'], files[:1])
        socket.send_fds(parts.theirs, [b'{"runs": true}'], files[:1])
        before = set(os.listdir("/proc/self/fd"))
        spec = type("Spec", (), {"uplink": None})
        pidfd = os.pidfd_open(os.getpid())
        with pytest.raises(StartFailed, match="unexpected answer"):
            asyncio.run(asyncio.wait_for(parts.running(pidfd, spec, no_interface), 10))
        os.close(pidfd)
        assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("said", [[], [{"serves": True}]])
def test_a_program_runs_when_all_have_let_go_of_the_socket_and_serves_if_it_said_so(said):
    with Parts(SLOT) as parts:
        for word in said:
            parts.theirs.send(json.dumps(word).encode())
        parts.theirs.close()
        pidfd = os.pidfd_open(os.getpid())
        spec = type("Spec", (), {"uplink": None})
        launched = asyncio.run(asyncio.wait_for(parts.running(pidfd, spec, no_interface), 10))
        assert launched.serves is bool(said) and launched.pid == os.getpid()
        for fd in (pidfd, launched.activity_fd):
            os.close(fd)
