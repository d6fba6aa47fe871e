# SPDX-License-Identifier: BSD-3-Clause
"""A slot's init: it copies the slot's output within a budget, counts the rest, and follows the program's end."""

import os
import socket

import pytest

from nbagent.core.events import Event
from nbagent.linux import journal
from nbagent.runtime import init
from nbagent.wire.channel import Channel


@pytest.fixture
def slot():
    """The slot's end of the pipe, the journal's ends of stream and entries, and the Output between."""
    read_fd, write_fd = os.pipe()
    stream, journal = socket.socketpair()
    entries, entries_journal = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in (journal, entries_journal):
        end.setblocking(False)
    with open(write_fd, "wb", buffering=0) as printed, stream, journal, entries, entries_journal:
        yield printed, journal, entries_journal, init.Output(
            Event.SLOT_OUTPUT_DROPPED, {"slot": "c07-x8q2m4k9w1ze"}, read_fd, stream, entries, "c07-x8q2m4k9w1ze"
        )
    os.close(read_fd)


def received(journal):
    """All that has come through."""
    data = b""
    while True:
        try:
            data += journal.recv(1 << 20)
        except BlockingIOError:
            return data


def flood(slot, text, most=1 << 23):
    """Prints the same again and again until something is dropped; how much came through."""
    printed, journal, _, output = slot
    came = sent = 0
    while output.note_due_s is None:
        assert sent < most, "nothing was dropped"
        sent += printed.write(text)
        output.pass_on()
        came += len(received(journal))
    return came


def test_lines_come_whole_however_they_were_written(slot):
    printed, journal, _, output = slot
    for part in (b"one\ntw", b"o\n", b"\n\nthr", b"ee\n"):
        printed.write(part)
        assert output.pass_on()
    assert received(journal) == b"one\ntwo\nthree\n"
    assert not output.pass_on()
    assert output.note_due_s is None


def test_a_line_without_an_end_is_passed_on_in_pieces(slot):
    printed, journal, _, output = slot
    for _ in range(3):
        printed.write(b"x" * init.LINE_MAX_BYTES)
        output.pass_on()
    assert received(journal) == (b"x" * init.LINE_MAX_BYTES + b"\n") * 3


@pytest.mark.parametrize("length", [0, 1, 100, 8000])
def test_the_budget_bounds_lines_of_any_length(slot, length):
    line = b"x" * length + b"\n"
    if not length:
        # Nothing is stored of an empty line, so it costs nothing.
        slot[0].write(line * 1000)
        assert slot[3].pass_on() and received(slot[1]) == b"" and slot[3].note_due_s is None
        return
    came = flood(slot, line * max(1, 4096 // len(line)))
    cost = came // len(line) * (length + init.LINE_COST_BYTES)
    # The rate adds what the time of the test is worth.
    assert init.BUDGET_BYTES - 20_000 < cost < init.BUDGET_BYTES + 60 * init.BUDGET_BYTES_PER_S


def test_an_entry_has_the_number_of_dropped_lines_and_the_next_one_starts_at_zero(slot):
    _, _, entries, output = slot
    flood(slot, b"x" * 4000 + b"\n")
    assert received(entries) == b""
    output.note()
    fields = dict(line.split("=", 1) for line in received(entries).decode().splitlines())
    assert fields["MESSAGE_ID"] == Event.SLOT_OUTPUT_DROPPED.value.message_id
    assert fields["NBAGENT_SLOT"] == "c07-x8q2m4k9w1ze" and fields["PRIORITY"] == "4"
    assert int(fields["NBAGENT_BYTES"]) == int(fields["NBAGENT_LINES"]) * 4000 > 0
    assert output.note_due_s is None
    output.note()
    assert received(entries) == b""


def test_the_last_line_needs_no_budget(slot):
    printed, journal, entries, output = slot
    flood(slot, b"x" * 4000 + b"\n")
    printed.write(b"x" * 8000 + b"\n")
    output.finish("the slot's program exited with status 0")
    assert received(journal) == b"the slot's program exited with status 0\n"
    assert b"NBAGENT_LINES=" in received(entries)


def test_the_rest_of_the_pipe_is_copied_before_the_last_line(slot):
    printed, journal, _, output = slot
    printed.write(b"one\ntwo\nthr")
    output.finish("the end")
    assert received(journal) == b"one\ntwo\nthr\nthe end\n"


def test_lines_become_entries_when_journald_has_ended_the_stream(slot):
    printed, journal, entries, output = slot
    journal.close()
    printed.write(b"one\ntwo\xff\n")
    output.pass_on()
    header = b"SYSLOG_IDENTIFIER=c07-x8q2m4k9w1ze\nPRIORITY=6\nMESSAGE="
    assert [entries.recv(1000), entries.recv(1000)] == [header + b"one\n", header + b"two\xff\n"]
    output.finish("the end")
    assert entries.recv(1000) == header + b"the end\n"
    assert output.note_due_s is None  # nothing was dropped


def test_a_slot_starts_while_journald_is_stopped_with_its_sockets(slot, tmp_path):
    """The lines are counted, because nothing has them."""
    printed, _, _, connected = slot
    path = tmp_path / "socket"
    for is_there in (False, True):
        if is_there:
            with socket.socket(socket.AF_UNIX) as closed:
                closed.bind(str(path))
        with journal.stream("a", "a.scope", str(path)) as stream, journal.entries(str(path)) as entries:
            output = init.Output(connected.event, connected.subject, connected.source_fd, stream, entries, "a")
            printed.write(b"one\ntwo\n")
            assert output.pass_on()
            assert output._lines == 2


def test_a_journal_that_accepts_nothing_blocks_the_slot_once(slot, monkeypatch):
    monkeypatch.setattr(init, "STALL_S", 0.2)
    printed, journal, _, output = slot
    output.stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    while output.note_due_s is None:
        printed.write(b"x" * 4000 + b"\n")
        output.pass_on()
    monkeypatch.setattr(init, "STALL_S", 600)
    for _ in range(10):
        printed.write(b"lost\n")
        assert output.pass_on()
    assert b"lost" not in received(journal)
    printed.write(b"found\n")
    output.pass_on()
    assert received(journal).endswith(b"found\n")


@pytest.fixture
def forked():
    """A program that was forked, and its fork server's end of the channel."""
    own, peer = Channel.pair(init.FORK_SERVER_MAX_BYTES)
    with own, peer:
        yield init.Program(fork_server=own), peer


def test_the_fork_server_reports_the_programs_pid_and_exit_status(forked):
    program, fork_server = forked
    fork_server.send({"program": 3})
    program.receive()
    assert (program.pid, program.end) == (3, None)
    fork_server.send({"exited": -9})
    program.receive()
    assert program.end == ("the slot's program was killed by SIGKILL", -9)


def test_a_real_time_signal_has_no_name(forked):
    program, fork_server = forked
    fork_server.send({"exited": -40})
    program.receive()
    assert program.end == ("the slot's program was killed by signal 40", -40)


def test_the_program_of_a_fork_server_that_ended_first_is_reaped_by_init(forked):
    program, fork_server = forked
    child = os.fork()
    if child == 0:
        os._exit(3)
    fork_server.send({"program": child})
    program.receive()
    fork_server.close()
    program.receive()
    assert (program.fork_server, program.end) == (None, None)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    program.reap()
    assert program.end == ("the slot's program exited with status 3", 3)


def test_a_slot_ends_when_its_fork_server_ends_before_the_program_starts(forked):
    program, fork_server = forked
    fork_server.close()
    program.receive()
    assert program.end is not None and "before it started" in program.end[0] and program.end[1] != 0


@pytest.mark.parametrize("payload", [
    b"{", b"[]", b'{"exited": 1e999}', b'{"exited": 7000}', b'{"program": -1}', b'{"program": true}', b"x" * 1000,
])
def test_a_malformed_message_counts_as_the_fork_servers_end(forked, payload):
    program, fork_server = forked
    fork_server.send({"program": 3})
    program.receive()
    fork_server.socket.send(payload)
    program.receive()
    assert (program.pid, program.fork_server, program.end) == (3, None, None)
