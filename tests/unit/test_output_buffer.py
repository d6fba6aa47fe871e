# SPDX-License-Identifier: BSD-3-Clause
"""The output for a closed page is kept within a limit, and a message stands for the output that was dropped."""

from __future__ import annotations

from nbagent.zygote.output_buffer import Item, OutputBuffer


def output(number: int, size: int = 1000) -> Item:
    return "iopub", [b"stream", b"<IDS|MSG>", b"signature", b"{}", b"%d" % number, b"x" * size]


def status(number: int) -> Item:
    return "iopub", [b"status", b"<IDS|MSG>", b"signature", b'{"msg_type": "status"}', b"%d" % number]


def note(dropped: int, parts: list[bytes]) -> list[bytes]:
    return [b"note", b"%d dropped, the newest" % dropped, parts[4]]


def size(buffer: OutputBuffer) -> int:
    return sum(len(part) for _, parts in buffer for part in parts)


def test_output_within_the_limit_is_kept() -> None:
    buffer = OutputBuffer(note, 20_000)
    items = [output(number) for number in range(15)]
    for item in items:
        buffer.append(item)
    assert buffer == items


def test_the_oldest_output_is_dropped_and_one_message_stands_for_it() -> None:
    buffer = OutputBuffer(note, 20_000)
    for number in range(500):
        buffer.append(output(number))
        assert size(buffer) <= 20_000
    first, *rest = buffer
    dropped = 500 - len(rest)
    assert first == ("iopub", [b"note", b"%d dropped, the newest" % dropped, b"%d" % (dropped - 1)])
    assert rest == [output(number) for number in range(dropped, 500)] and len(rest) >= 9


def test_states_and_replies_are_kept_in_their_order() -> None:
    buffer = OutputBuffer(note, 20_000)
    reply = ("shell", [b"reply", b"x" * 100])
    buffer.append(status(1))
    for number in range(100):
        buffer.append(output(number))
    for item in (status(2), reply, output(100), status(3)):
        buffer.append(item)
    assert buffer[0] == status(1) and buffer[1][1][0] == b"note" and buffer[-4:] == [
        status(2), reply, output(100), status(3)]


def test_a_single_message_beyond_the_limit_is_dropped() -> None:
    buffer = OutputBuffer(note, 20_000)
    buffer.append(output(1, 50_000))
    buffer.append(status(1))
    assert buffer == [("iopub", [b"note", b"1 dropped, the newest", b"1"]), status(1)]
