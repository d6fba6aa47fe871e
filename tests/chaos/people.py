# SPDX-License-Identifier: BSD-3-Clause
"""Users of a host while faults happen: some hold a notebook and run cells with checked state, others claim and release.

Every claim has an Idempotency-Key and is repeated with it until it gets a slot, as a careful caller does, so that a
claim whose response was lost leaves no slot that no caller knows.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field

import websocket

from notebook import Kernel, Notebook
from product import Api
from testhost_driver import Host

# pool.claim_timeout and claims.timeout together are 50 s; the API repeats a call of the supervisor for 30 s.
DEADLINE_S = 60.0
BROKEN = (OSError, http.client.HTTPException)


@dataclass
class Book:
    """Notes of all users. `problems` are observations that must not happen."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    claim_s: list[float] = field(default_factory=list)
    cell_s: list[float] = field(default_factory=list)
    owners: dict[str, str] = field(default_factory=dict)
    deadline_s: float = DEADLINE_S

    @property
    def patience_s(self) -> float:
        """The longest time of a claim with its repetitions, of a release, and of a cell."""
        return 4 * self.deadline_s

    def add(self, name: str, count: int = 1) -> None:
        with self.lock:
            self.counts[name] += count

    def refused(self, reason: str) -> None:
        with self.lock:
            self.refusals[reason] += 1

    def problem(self, text: str) -> None:
        with self.lock:
            self.problems.append(f"{time.strftime('%H:%M:%S')} {text}")

    def owns(self, slot: str, key: str) -> None:
        """Notes the key that got a slot; each slot has one for ever."""
        with self.lock:
            former = self.owners.setdefault(slot, key)
            if former != key:
                self.problems.append(f"slot {slot} was given to two claims, {former} and {key}")


class Caller:
    """A caller of the API, which repeats."""

    def __init__(self, host: Host, book: Book) -> None:
        self.host, self.book = host, book
        # More than the deadline, so that a late response is seen as late and not as none.
        self.api = Api(host, timeout=book.deadline_s + 30)

    def claim(self, **options: object) -> dict[str, object] | None:
        """A slot, by as many repetitions as it takes; None with a problem when there was none in time."""
        key, until_s, pause_s = uuid.uuid4().hex, time.monotonic() + self.book.patience_s, 0.1
        while time.monotonic() < until_s:
            began_s = time.monotonic()
            try:
                answer = self.api.post("/claim", options, **{"Idempotency-Key": key})
            except BROKEN as error:
                # The API was killed with the connection open.
                self.book.refused(f"connection: {type(error).__name__}")
                answer = None
            took_s = time.monotonic() - began_s
            if took_s > self.book.deadline_s:
                status = answer.status if answer else "none"
                self.book.problem(f"a claim was answered after {took_s:.1f} s: {status}")
            if answer is not None and answer.status == 200:
                claim = answer.json()
                with self.book.lock:
                    self.book.claim_s.append(took_s)
                self.book.owns(claim["slot"], key)
                return claim
            if answer is not None:
                self._note(answer, options)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)
        self.book.problem(f"a claim with {options} got no slot in {self.book.patience_s:g} s")
        return None

    def _note(self, answer, options) -> None:
        """Notes a refusal, which has to be a problem document with a status for a repetition."""
        reason = answer.headers.get("content-type", "")
        with contextlib.suppress(ValueError):
            document = answer.json()
            reason = document.get("type", "").rpartition(":")[2]
            if reason == "start-failed":
                reason += f" ({document.get('step', '?')})"
            if reason == "full":
                reason += f" ({document.get('detail', '?')})"
        self.book.refused(f"{answer.status} {reason}")
        if answer.status not in (503,):
            text = answer.body[:300].decode(errors="replace")
            self.book.problem(f"a claim with {sorted(options)} was answered by {answer.status}: {text}")

    def release(self, slot: str) -> None:
        """Ends a slot, by as many repetitions as it takes."""
        until_s = time.monotonic() + self.book.patience_s
        while time.monotonic() < until_s:
            with contextlib.suppress(*BROKEN):
                answer = self.api.delete(f"/slots/{slot}")
                if answer.status in (200, 404):
                    return
                if answer.status != 503:
                    self.book.problem(f"the release of {slot} was answered by {answer.status}: {answer.body[:200]!r}")
                    return
            time.sleep(0.2)
        self.book.problem(f"slot {slot} was not released in {self.book.patience_s:g} s")


class User(threading.Thread):
    """A person with one notebook: runs cells that count, and checks that the kernel has counted each.

    `closings()`: how often the router has ended, which closes websockets. Then the user opens another to the same
    kernel, as a browser does.
    """

    def __init__(self, host: Host, book: Book, number: int, stop: threading.Event, closings, pause_s: float) -> None:
        super().__init__(name=f"user {number}", daemon=True)
        self.host, self.book, self.stop, self.closings, self.pause_s = host, book, stop, closings, pause_s
        self.caller = Caller(host, book)
        self.count = 0
        self.claimed: dict[str, object] | None = None
        self.ready = threading.Event()

    def run(self) -> None:
        try:
            self._live()
        except Exception as error:
            self.book.problem(f"{self.name} with {self.slot}: {type(error).__name__}: {error}"[:400])
        finally:
            self.ready.set()

    @property
    def slot(self) -> str:
        return str(self.claimed["slot"]) if self.claimed else "no slot"

    def _live(self) -> None:
        self.claimed = self.caller.claim()
        if self.claimed is None:
            return
        notebook, opened = Notebook(self.host, self.claimed), self.closings()
        kernel = notebook.kernel()
        assert kernel.run("import os; n = 0; born = os.getpid()").status == "ok"
        self.ready.set()
        source = random.Random(self.name)
        while not self.stop.is_set():
            began_s = time.monotonic()
            try:
                result = kernel.run("n += 1; n", self.book.patience_s)
                if result.text != str(self.count + 1):
                    self.book.problem(f"{self.name} with {self.slot}: cell {self.count + 1} was {result}")
                    return
                self.count += 1
                self.book.add("cells")
                with self.book.lock:
                    self.book.cell_s.append(time.monotonic() - began_s)
            except (OSError, websocket.WebSocketException) as error:
                if self.closings() == opened:
                    self.book.problem(f"{self.name} with {self.slot}: websocket: {type(error).__name__}: {error}")
                    self.book.add("websockets closed without a cause")
                opened, kernel, found = self._resume(notebook, kernel.id)
                # The cell has been executed or not.
                if found not in (self.count, self.count + 1):
                    self.book.problem(f"{self.name} with {self.slot}: {found} cells instead of {self.count}")
                self.count = found
            self.stop.wait(source.uniform(0.5, 1.5) * self.pause_s)
        if kernel.run("n", self.book.patience_s).text != str(self.count):
            self.book.problem(f"{self.name} with {self.slot}: the last state was wrong")
        kernel.close()

    def _resume(self, notebook: Notebook, kernel_id: str) -> tuple[int, Kernel, int]:
        """The number of closings, another websocket to the kernel, and what the kernel has counted.

        Opens one more when the router has ended meanwhile.
        """
        while True:
            opened = self.closings()
            kernel = self._again(notebook, kernel_id)
            self.book.add("websockets opened again")
            try:
                return opened, kernel, int(kernel.run("n", self.book.patience_s).text)
            except (OSError, websocket.WebSocketException):
                if self.closings() == opened:
                    raise

    def _again(self, notebook: Notebook, kernel_id: str) -> Kernel:
        until_s = time.monotonic() + self.book.patience_s
        while True:
            try:
                return Kernel(notebook, kernel_id)
            except (OSError, websocket.WebSocketException, json.JSONDecodeError):
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.5)


CLAIMS = (
    {}, {}, {"memory": "300M"}, {"ttl": "1h"}, {"files": {"a.txt": "x" * 3000}}, {"cpu_weight": 50},
    {"memory": "200M", "files": {"b/c.txt": "y"}}, {"network": "internet"},
)


class Claimer(threading.Thread):
    """A caller that claims, opens the slot and releases it, one after another. It has no slot while `turn` is free."""

    def __init__(self, host: Host, book: Book, number: int, stop: threading.Event, seed: int, hold_s: float) -> None:
        super().__init__(name=f"claimer {number}", daemon=True)
        self.host, self.book, self.stop, self.hold_s = host, book, stop, hold_s
        self.source, self.turn = random.Random(f"{seed} {number}"), threading.Lock()
        self.caller, self.router = Caller(host, book), Api(host, 8000)

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                with self.turn:
                    self._once()
                # A lock is not fair.
                self.stop.wait(0.05)
        except Exception as error:
            self.book.problem(f"{self.name}: {type(error).__name__}: {error}"[:400])

    def _once(self) -> None:
        options = self.source.choice(CLAIMS)
        claim = self.caller.claim(**options)
        if claim is None:
            return
        self.book.add("claims")
        if "memory" in options and claim["limits"]["memory_bytes"] != int(options["memory"][:-1]) << 20:
            self.book.problem(f"slot {claim['slot']} has {claim['limits']} for {options}")
        self._open(claim, options)
        self.stop.wait(self.source.uniform(0, self.hold_s))
        self.caller.release(claim["slot"])
        self.book.add("releases")

    def _open(self, claim, options) -> None:
        """Requests the slot's API through the router, and its files."""
        path = f"/user/{claim['slot']}/api/contents"
        headers = {"Authorization": f"token {claim['token']}"}
        until_s = time.monotonic() + self.book.deadline_s
        status = None
        while time.monotonic() < until_s:
            with contextlib.suppress(*BROKEN):
                answer = self.router.call("GET", path, headers=headers)
                status = answer.status
                if status == 200:
                    names = {entry["name"] for entry in answer.json()["content"]}
                    missing = {name.partition("/")[0] for name in options.get("files", {})} - names
                    if missing:
                        self.book.problem(f"slot {claim['slot']} lacks {missing}")
                    return
            time.sleep(0.3)
        self.book.problem(f"slot {claim['slot']} did not serve in {self.book.deadline_s:g} s: {status}")
