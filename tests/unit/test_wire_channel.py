# SPDX-License-Identifier: BSD-3-Clause
"""Channels: messages arrive whole with their descriptors, and malformed ones are refused without a leak."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket

import pytest
from malformed_messages import open_fds

from nbagent.wire import aio, fields, memfd
from nbagent.wire.channel import FDS_MAX, PACKET_MAX_BYTES, Channel, report_failure
from nbagent.wire.failure import ERRNO_MAX, Failure, StepFailed
from nbagent.wire.fields import MalformedMessage

LARGE = 1 << 20


@pytest.fixture
def pair():
    one, other = Channel.pair(LARGE)
    with one, other:
        yield one, other


def packet(channel, payload, fds=()):
    """Sends a packet that need not be a message."""
    socket.send_fds(channel.socket, [payload], list(fds))


@pytest.mark.parametrize("size", [0, 10, PACKET_MAX_BYTES, LARGE - 100])
def test_a_message_of_any_allowed_size_arrives_whole(pair, file, size):
    before = open_fds()
    pair[0].send({"text": "x" * size}, {"file": file})
    with pair[1].receive() as message:
        assert message.body == {"text": "x" * size}
        assert os.path.sameopenfile(message.fds["file"], file)
        assert fcntl.fcntl(message.fds["file"], fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert open_fds() == before


def test_a_taken_descriptor_stays_open_and_the_others_are_closed(pair, file):
    pair[0].send({}, {"one": file, "other": file})
    before = open_fds()
    with pair[1].receive() as message:
        taken = message.take("other")
        with pytest.raises(MalformedMessage, match="no descriptor 'other'"):
            message.take("other")
    assert open_fds() == {*before, str(taken)}
    os.close(taken)


def test_the_end_is_none_also_when_the_peer_left_messages_unread(pair):
    pair[1].send({"unread": True})
    pair[0].close()
    while (message := pair[1].receive()) is not None:
        message.close()
    assert pair[1].receive() is None


def test_an_empty_packet_is_the_end_and_its_descriptors_are_closed(pair, file):
    packet(pair[0], b"", [file])
    before = open_fds()
    assert pair[1].receive() is None
    assert open_fds() == before


@pytest.mark.parametrize("payload", [
    b"\xff", b"{", b"[]", b"7", b"null", b'"text"', b"[" * 60000, b"x" * 200_000, b"{}", b'{"fds": []}',
    b'{"fds": ["a", "b"]}', b'{"fds": ["a", "a"]}', b'{"fds": "a"}', b'{"fds": {"a": 0}}', b'{"fds": [0]}',
    b'{"fds": null}', b'{"fds": ["body"]}', b"{" + b" " * 200_000,
])
def test_a_malformed_packet_is_one_error_and_leaks_no_descriptor(pair, file, payload):
    packet(pair[0], payload, [file])
    before = open_fds()
    with pytest.raises(MalformedMessage, match="malformed message: "):
        pair[1].receive()
    assert open_fds() == before
    pair[0].send({"next": 1})
    assert pair[1].receive().body == {"next": 1}


@pytest.mark.parametrize("count", [FDS_MAX + 1, FDS_MAX + 2, 200])
def test_too_many_descriptors_are_refused_and_closed(pair, file, count):
    packet(pair[0], b"{}", [file] * count)
    before = open_fds()
    with pytest.raises(MalformedMessage, match=f"more than {FDS_MAX} descriptors"):
        pair[1].receive()
    assert open_fds() == before


def test_as_many_descriptors_as_are_allowed_arrive(pair, file):
    pair[0].send({}, {str(number): file for number in range(FDS_MAX)})
    with pair[1].receive() as message:
        assert len(message.fds) == FDS_MAX


def unsealed():
    return os.memfd_create("x", os.MFD_ALLOW_SEALING)


def half_sealed():
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def directory():
    return os.open("/", os.O_RDONLY)


def pipe():
    read, write = os.pipe()
    os.close(write)
    return read


@pytest.mark.parametrize("make", [unsealed, half_sealed, directory, pipe])
def test_a_body_is_read_from_a_sealed_memfd_only(pair, make):
    fd = make()
    try:
        packet(pair[0], b'{"fds": ["body"]}', [fd])
        before = open_fds()
        with pytest.raises(MalformedMessage, match="sealed memfd"):
            pair[1].receive()
        assert open_fds() == before
    finally:
        os.close(fd)


@pytest.mark.parametrize("payload", [b"[]", b"x", b"x" * (LARGE + 1)])
def test_a_malformed_or_too_large_body_in_a_memfd_is_refused(pair, payload):
    fd = memfd.create("x", [payload])
    try:
        packet(pair[0], b'{"fds": ["body"]}', [fd])
        before = open_fds()
        with pytest.raises(MalformedMessage):
            pair[1].receive()
        assert open_fds() == before
    finally:
        os.close(fd)


def test_a_channel_with_a_small_limit_refuses_a_longer_packet():
    one, other = Channel.pair(64)
    with one, other:
        one.send({"text": "x" * 100})
        with pytest.raises(MalformedMessage, match="more than 64 bytes"):
            other.receive()


def test_a_channel_knows_the_user_of_its_peer(pair):
    assert pair[0].peer_uid() == os.getuid()


def test_a_failure_arrives_as_the_exception_that_was_raised(pair):
    pid = os.fork()
    if pid == 0:
        report_failure(pair[1], "open", lambda: os.open("/none/such", os.O_RDONLY))
    os.waitpid(pid, 0)
    with pair[0].receive() as message, pytest.raises(StepFailed, match=r"open: .*No such file") as failed:
        message.raise_failure()
    assert (failed.value.failure.step, failed.value.failure.errno) == ("open", 2)


@pytest.mark.parametrize("failure", [
    7, None, {}, {"step": "x", "errno": 0}, {"step": 1, "errno": 0, "text": ""}, {"step": "x", "errno": 0, "text": []},
    *({"step": "x", "errno": errno, "text": ""} for errno in (-1, ERRNO_MAX + 1, True, 1.0, "0", None)),
])
def test_a_malformed_failure_is_a_malformed_message(pair, failure):
    pair[0].send({"failure": failure})
    with pair[1].receive() as message, pytest.raises(MalformedMessage):
        message.raise_failure()


def test_infinity_is_not_an_error_number(pair):
    packet(pair[0], b'{"failure": {"step": "x", "errno": 1e999, "text": ""}}')
    with pair[1].receive() as message, pytest.raises(MalformedMessage, match="'errno' is not an integer"):
        message.raise_failure()


def test_the_text_of_a_failure_is_bounded_and_printable():
    restored = Failure.restore({"failure": {"step": "a\x1bb", "errno": 5, "text": "x\n\ud800" + "y" * 5000}})
    assert restored.step == "a?b" and restored.text.startswith("x??y") and len(restored.text) == 1000


def test_a_failure_that_was_saved_is_restored():
    failure = Failure.of(PermissionError(13, "Permission denied"), "mount")
    assert Failure.restore(failure.save()) == failure == ("mount", 13, "[Errno 13] Permission denied")
    assert Failure.of(StepFailed(failure), "other") == failure
    assert Failure.of(RuntimeError("x"), "step") == ("step", 0, "RuntimeError('x')")


def test_typed_reads_refuse_other_types():
    values = {"text": "x", "number": 3, "flag": True, "list": ["a", 1], "object": {}}
    assert fields.text(values, "text") == "x" and fields.integer(values, "number", 0, 3) == 3
    for read in (
        lambda: fields.text(values, "number"), lambda: fields.text(values, "none"),
        lambda: fields.texts(values, "list"),
        lambda: fields.mapping(values, "list"), lambda: fields.integer(values, "flag", 0, 1),
        lambda: fields.integer(values, "number", 0, 2), lambda: fields.integer(values, "text", 0, 2),
    ):
        with pytest.raises(MalformedMessage):
            read()


def test_receiving_in_an_event_loop_lets_other_tasks_run(pair):
    async def exchange():
        receiving = asyncio.ensure_future(aio.receive(pair[1]))
        await asyncio.sleep(0)
        assert not receiving.done()
        pair[0].send({"number": 1})
        first = await receiving
        pair[0].close()
        return first.body, await aio.receive(pair[1])

    assert asyncio.run(exchange()) == ({"number": 1}, None)


def test_a_cancelled_receive_leaves_the_message_and_no_reader(pair):
    async def exchange():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await aio.receive(pair[1])
        pair[0].send({"number": 1})
        return (await aio.receive(pair[1])).body

    assert asyncio.run(exchange()) == {"number": 1}


def test_a_closed_peer_is_an_error_of_send(pair):
    pair[1].close()
    with pytest.raises(OSError):
        pair[0].send({"x": 1})
