"""Init of a slot: the first process of its pid namespace, host code among the slot's own processes.

It reaps orphans, passes SIGTERM on, and stands between what the slot prints and the journal: the
slot's processes write into a pipe, and only init holds the journal. So a slot that prints without
end fills no journal with it: beyond a budget its lines are dropped, and an entry says how many.

It promises: what is printed within the budget reaches the journal, the last words too; the slot
waits for a journal that stands still for STALL_S at most, once, and for PAUSE_S a read when its
budget is spent; init holds LINE_MAX_BYTES of output and a read more. The kernel keeps it safe: no
process of its pid namespace can kill or stop it, and as it is not dumpable, none can trace it or
take its descriptors.

Standard library only, and little of it: this is memory of every slot. Python 3.9 and up.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
from typing import NoReturn, Optional, Tuple

from nbagent.core.events import Event, entry
from nbagent.linux import journal

# A server that starts prints 6 KiB, one in trouble some hundred tracebacks; then it has said enough. A day of
# the rate is 350 MB, a tenth of what journald keeps by default: no slot alone drives out what others said.
BUDGET_BYTES = 1 << 20
BUDGET_BYTES_PER_S = 4096
# What journald stores with a line beside its text, an entry with its fields: 350 bytes in the mean of 100,000 by
# systemd 252, rounded up.
LINE_COST_BYTES = 512
LINE_MAX_BYTES = 16384
# From the first line dropped to the entry that says so, and from that to the next.
NOTE_FIRST_S, NOTE_NEXT_S = 1.0, 60.0
STALL_S = 5.0
# Between two reads of what is dropped: 800 KB/s. Read as fast as it is written, it would keep two processors busy.
PAUSE_S = 0.02
# Of a fork server's two words to its slot's init.
NEWS_MAX_BYTES = 256
# What a pipe holds at the most (fs.pipe-max-size) is read out at the end, and no more: a writer may be left.
LAST_READS = (1 << 20) // LINE_MAX_BYTES


class Output:
    """What the slot prints, on its way from a pipe to the journal. Owns `source_fd`."""

    def __init__(self, slot: str, source_fd: int, stream: socket.socket, entries: socket.socket) -> None:
        self.slot, self.source_fd, self.stream, self.entries = slot, source_fd, stream, entries
        os.set_blocking(source_fd, False)
        entries.setblocking(False)
        self.note_due_s: Optional[float] = None
        self.paused_until_s = 0.0
        self._began = b""
        self._budget = float(BUDGET_BYTES)
        self._counted_s = time.monotonic()
        self._noted_s = -NOTE_NEXT_S
        self._lines = self._bytes = 0
        self._stalled = False

    def pass_on(self) -> bool:
        """Reads once and passes on what the budget allows; whether there was anything to read."""
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

    def finish(self, words: str) -> None:
        """Passes on what is left, and then the slot's last words, which need no budget."""
        for _ in range(LAST_READS):
            if not self.pass_on():
                break
        self.note()
        self._write([*filter(None, [self._began]), words.encode()])

    def note(self) -> None:
        """Says in the journal how much was dropped, if anything was."""
        self.note_due_s = None
        if not self._lines:
            return
        fields = entry(Event.SLOT_OUTPUT_DROPPED, slot=self.slot, lines=self._lines, bytes=self._bytes)
        self._noted_s = time.monotonic()
        # A journal that takes nothing now is told at the next time.
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
        self.stream.settimeout(0 if self._stalled else STALL_S)
        try:
            self.stream.sendall(b"\n".join(lines) + b"\n")
            self._stalled = False
        except OSError:
            self._stalled = True
            self._dropped(lines)

    def _dropped(self, lines: list[bytes]) -> None:
        self._lines += len(lines)
        self._bytes += sum(map(len, lines))
        if self.note_due_s is None:
            self.note_due_s = max(time.monotonic() + NOTE_FIRST_S, self._noted_s + NOTE_NEXT_S)


class Program:
    """What a slot is nothing without: its program, and perhaps a forwarder, by their pids; 0 is none.

    A program that was forked is a child of its fork server, not of init; `fork_server` is the socket to that.
    The fork server sends the program's pid, and its exit status; when the fork server ends first, the program
    becomes init's child.
    `end` is how it came to an end, in words and as an exit status, negative for a signal.
    """

    def __init__(self, pid: int = 0, forwarder: int = 0, fork_server: Optional[socket.socket] = None) -> None:
        self.pid, self.forwarder, self.fork_server = pid, forwarder, fork_server
        self.end: Optional[Tuple[str, int]] = None

    def hear(self) -> None:
        """Takes in what the fork server says."""
        if self.fork_server is None:
            return
        said = self.fork_server.recv(NEWS_MAX_BYTES)
        news = json.loads(said or "{}")
        if "program" in news:
            self.pid = int(news["program"])
        elif "exited" in news:
            self._ended("program", int(news["exited"]))
        else:
            self.fork_server.close()
            self.fork_server = None
            if not self.pid:
                self.end = "what was to be the slot's program ended before it was", 1

    def reap(self) -> None:
        """Takes in all children that have ended."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] in (self.pid, self.forwarder):
                    name = "program" if ended[0] == self.pid else "forwarder"
                    self._ended(name, os.waitstatus_to_exitcode(ended[1]))

    def _ended(self, name: str, code: int) -> None:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        self.end = self.end or (f"the slot's {name} {how}", code)


def run(program: Program, output: Output) -> NoReturn:
    """Until the program ends, or the forwarder it is nothing without; then the kernel ends all others."""
    def forward(number: int, _frame: object) -> None:
        if program.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(program.pid, number)

    wake_read, wake_write = os.pipe()
    for fd in (wake_read, wake_write):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, forward)
    # Without a handler of its own the signal would wake nobody.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    printed = True
    program.reap()
    while program.end is None:
        now_s = time.monotonic()
        if output.note_due_s is not None and now_s >= output.note_due_s:
            output.note()
        paused = now_s < output.paused_until_s
        waiting = select.poll()
        waiting.register(wake_read, select.POLLIN)
        if printed and not paused:
            waiting.register(output.source_fd, select.POLLIN)
        if program.fork_server is not None:
            waiting.register(program.fork_server, select.POLLIN)
        due_s = output.paused_until_s if paused else output.note_due_s
        ready = {fd for fd, _ in waiting.poll(None if due_s is None else max(0.0, due_s - now_s) * 1000)}
        if wake_read in ready:
            os.read(wake_read, 512)
        if output.source_fd in ready:
            printed = output.pass_on()
        if program.fork_server is not None and program.fork_server.fileno() in ready:
            program.hear()
        program.reap()
    words, code = program.end
    output.finish(words)
    os._exit(code if code >= 0 else 128 - code)
