# SPDX-License-Identifier: BSD-3-Clause
"""Init of a slot: the first process of its pid namespace, host code among the slot's own processes.

It reaps orphans, forwards SIGTERM to the program, and copies the slot's output to the journal: the slot's processes
write into a pipe, and only init holds the journal. So a slot that prints without end cannot fill the journal, because
lines beyond a budget are dropped, and a journal entry has their number.

It guarantees: output within the budget reaches the journal, up to the last line; the slot's output blocks for STALL_S
at most, once, when the journal accepts nothing, and for PAUSE_S a read when the budget is spent; init buffers at most
LINE_MAX_BYTES and one read. No process of its pid namespace can kill or stop it (pid_namespaces(7)), and because it is
not dumpable, none can trace it or take its descriptors.

Standard library only, and little of it, because it is memory of every slot; Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from typing import Iterable, Mapping, NoReturn, Optional, Set, Tuple

from nbagent.core.events import Event, entry
from nbagent.linux import journal
from nbagent.wire import fields
from nbagent.wire.channel import Channel, Message
from nbagent.wire.fields import MalformedMessage

# A server prints 6 KiB when it starts, and the rest is enough for some hundred tracebacks. A day of the rate is 350 MB,
# a tenth of what journald keeps by default, so that one slot alone cannot displace the entries of others.
BUDGET_BYTES = 1 << 20
BUDGET_BYTES_PER_S = 4096
# journald stores an entry with its fields for each line: 350 bytes beside the text in the mean of 100,000 with systemd
# 252, rounded up.
LINE_COST_BYTES = 512
LINE_MAX_BYTES = 16384
# From the first dropped line to its journal entry, and from one such entry to the next.
NOTE_FIRST_S, NOTE_NEXT_S = 1.0, 60.0
STALL_S = 5.0
# Between two reads while lines are dropped: 800 KB/s. Without a pause, writer and init would use two processors.
PAUSE_S = 0.02
# The two messages of a fork server to its slot's init are shorter.
FORK_SERVER_MAX_BYTES = 256
PID_MAX = 1 << 22  # the kernel's PID_MAX_LIMIT
# At the end no more is read than a pipe can hold (fs.pipe-max-size), because a writer may be left.
LAST_READS = (1 << 20) // LINE_MAX_BYTES


class Output:
    """Copies the output of a slot or a zygote from a pipe to the journal. Owns `source_fd`.

    `dropped` is the event for lines beyond the budget, and `subject` its fields that name the slot or zygote.
    `stream` is a connection to journald, which ends with journald when that is stopped and not merely restarted.
    Then lines become native entries of `identifier`: `entries` sends datagrams to a socket that systemd holds.
    """

    def __init__(
        self, dropped: Event, subject: Mapping[str, object], source_fd: int, stream: socket.socket,
        entries: socket.socket, identifier: str,
    ) -> None:
        self.identifier = identifier
        self._streams = True
        self.event, self.subject = dropped, subject
        self.source_fd, self.stream, self.entries = source_fd, stream, entries
        os.set_blocking(source_fd, False)
        entries.setblocking(False)
        self.note_due_s: Optional[float] = None
        self.paused_until_s = 0.0
        self._open = True
        self._began = b""
        self._budget = float(BUDGET_BYTES)
        self._counted_s = time.monotonic()
        self._noted_s = -NOTE_NEXT_S
        self._lines = self._bytes = 0
        self._stalled = False

    def wait(self, fds: Iterable[int], until_s: Optional[float] = None) -> Set[int]:
        """The readable ones of `fds`, as soon as there are any; none after `until_s`. Copies output meanwhile."""
        while True:
            now_s = time.monotonic()
            if self.note_due_s is not None and now_s >= self.note_due_s:
                self.note()
            paused = now_s < self.paused_until_s
            waiting = select.poll()
            for fd in fds:
                waiting.register(fd, select.POLLIN)
            if self._open and not paused:
                waiting.register(self.source_fd, select.POLLIN)
            due_s = [at_s for at_s in (until_s, self.note_due_s, self.paused_until_s if paused else None) if at_s]
            ready = {fd for fd, _ in waiting.poll(max(0.0, min(due_s) - now_s) * 1000 if due_s else None)}
            if self.source_fd in ready:
                ready.remove(self.source_fd)
                self._open = self.pass_on()
            if ready or (until_s is not None and time.monotonic() >= until_s):
                return ready

    def pass_on(self) -> bool:
        """Reads once and copies the lines within the budget; returns whether there was anything to read."""
        try:
            data = os.read(self.source_fd, LINE_MAX_BYTES)
        except BlockingIOError:
            return False
        dropped = self._lines
        *lines, self._began = (self._began + data).split(b"\n")
        if len(self._began) >= LINE_MAX_BYTES or not data:
            lines.append(self._began)
            self._began = b""
        self._write([line for line in lines if line and self._affords(line)])
        if self._lines > dropped:
            self.paused_until_s = time.monotonic() + PAUSE_S
        return bool(data)

    def finish(self, last_line: str = "") -> None:
        """Copies the rest, and then a last line, which needs no budget."""
        for _ in range(LAST_READS):
            if not self.pass_on():
                break
        self.note()
        self._write([*filter(None, [self._began, last_line.encode()])])

    def note(self) -> None:
        """Writes a journal entry with the number of dropped lines and bytes, if there are any."""
        self.note_due_s = None
        if not self._lines:
            return
        fields = entry(self.event, lines=self._lines, bytes=self._bytes, **self.subject)
        self._noted_s = time.monotonic()
        # When the journal accepts nothing now, the next entry counts these lines too.
        with contextlib.suppress(OSError):
            self.entries.send(journal.encode(fields))
            self._lines = self._bytes = 0

    def _affords(self, line: bytes) -> bool:
        now_s = time.monotonic()
        earned = (now_s - self._counted_s) * BUDGET_BYTES_PER_S
        self._budget, self._counted_s = min(BUDGET_BYTES, self._budget + earned), now_s
        cost = len(line) + LINE_COST_BYTES
        if cost > self._budget:
            self._dropped([line])
            return False
        self._budget -= cost
        return True

    def _write(self, lines: list[bytes]) -> None:
        if not lines:
            return
        if self._streams:
            self.stream.settimeout(0 if self._stalled else STALL_S)
            try:
                self.stream.sendall(b"\n".join(lines) + b"\n")
                self._stalled = False
                return
            except ConnectionError:
                self._streams = False
            except OSError:
                self._stalled = True
                self._dropped(lines)
                return
        for line in lines:
            self.entries.settimeout(0 if self._stalled else STALL_S)
            try:
                self.entries.send(journal.line_entry(self.identifier, line))
                self._stalled = False
            except OSError:
                self._stalled = True
                self._dropped([line])
        self.entries.setblocking(False)

    def _dropped(self, lines: list[bytes]) -> None:
        self._lines += len(lines)
        self._bytes += sum(map(len, lines))
        if self.note_due_s is None:
            self.note_due_s = max(time.monotonic() + NOTE_FIRST_S, self._noted_s + NOTE_NEXT_S)


class Program:
    """The processes that the slot ends with: its program, and perhaps a forwarder, by their pids; 0 is none.

    A program that was forked is a child of its fork server, not of init; `fork_server` is the channel to that.
    The fork server sends {"program": pid}, and {"exited": status} at the program's end; when the fork server ends
    first, the program becomes init's child.
    `end` is the reason for the end as text, and an exit status, negative for a signal.
    """

    def __init__(self, pid: int = 0, forwarder: int = 0, fork_server: Optional[Channel] = None) -> None:
        self.pid, self.forwarder, self.fork_server = pid, forwarder, fork_server
        self.end: Optional[Tuple[str, int]] = None

    def receive(self) -> None:
        """Reads a message of the fork server, which is an image's code. A malformed one counts as its end."""
        if self.fork_server is None:
            return
        with contextlib.suppress(MalformedMessage), self.fork_server.receive() or Message({}, {}) as message:
            if "program" in message.body:
                self.pid = fields.integer(message.body, "program", 1, PID_MAX)
                return
            if "exited" in message.body:
                self._ended("program", fields.integer(message.body, "exited", -signal.NSIG, 255))
                return
        self.fork_server.close()
        self.fork_server = None
        if not self.pid:
            self.end = self.end or ("the slot's program exited before it started", 1)

    def reap(self) -> None:
        """Reaps all children that have ended."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] in (self.pid, self.forwarder):
                    name = "program" if ended[0] == self.pid else "forwarder"
                    self._ended(name, os.waitstatus_to_exitcode(ended[1]))

    def _ended(self, name: str, code: int) -> None:
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with status {code}"
        self.end = self.end or (f"the slot's {name} {how}", code)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # the real-time signals but the first and the last
        return f"signal {number}"


def run(program: Program, output: Output) -> NoReturn:
    """Runs until the program or its forwarder has ended; then it exits, and the kernel kills all other processes."""
    def forward(number: int, _frame: object) -> None:
        if program.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(program.pid, number)

    wake_read, wake_write = os.pipe()
    for fd in (wake_read, wake_write):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, forward)
    # Only a signal with a handler is written to the wake-up descriptor.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    program.reap()
    while program.end is None:
        fork_server = [] if program.fork_server is None else [program.fork_server.fileno()]
        ready = output.wait([wake_read, *fork_server])
        if wake_read in ready:
            os.read(wake_read, 512)
        if program.fork_server is not None and program.fork_server.fileno() in ready:
            program.receive()
        program.reap()
    last_line, code = program.end
    output.finish(last_line)
    os._exit(code if code >= 0 else 128 - code)
