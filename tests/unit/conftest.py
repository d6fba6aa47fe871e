# SPDX-License-Identifier: BSD-3-Clause
"""For every unit test: coroutine tests run in an event loop, the journal is a list, and a test must clean up."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from nbagent.core.journald import Journal
from nbagent.wire.channel import Channel

TEST_TIMEOUT_S = 30
# A run of the unit tests has the same examples each time. The profile "deep" is that of `make fuzz`.
_COMMON = {
    "deadline": None, "database": None, "print_blob": True, "suppress_health_check": list(hypothesis.HealthCheck),
    # An example that fails because it waits for something takes seconds, and is small enough as it is.
    "phases": [hypothesis.Phase.explicit, hypothesis.Phase.generate],
}
hypothesis.settings.register_profile("unit", max_examples=40, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("deep", max_examples=1000, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("NBAGENT_HYPOTHESIS", "unit"))
# A thread that has been asked to end, or a socketpair that is collected, takes a moment.
SETTLE_S = 10.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test that is a coroutine function in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(_run(pyfuncitem.obj, arguments))
    return True


async def _run(test: Any, arguments: dict[str, Any]) -> None:
    async with asyncio.timeout(TEST_TIMEOUT_S):
        await test(**arguments)
    # A cancelled task needs one more turn of the loop to end.
    await asyncio.sleep(0)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"the test left tasks behind: {left}"


class Remains:
    """The processes, threads, descriptors and temporary files of this process at one time."""

    def __init__(self) -> None:
        self.children = _children()
        self.threads = {thread for thread in threading.enumerate() if thread.is_alive()}
        self.descriptors = _descriptors()
        self.files = _temporary_files()

    def since(self, before: Remains) -> list[str]:
        """Descriptions of all that `before` did not have."""
        left = [f"process {pid}" for pid in self.children - before.children]
        left += [f"thread {thread.name}" for thread in self.threads - before.threads]
        # A fake supervisor of a wider fixture opens descriptors of its own during a test.
        if "fake-supervisor" not in {thread.name for thread in before.threads}:
            left += [f"descriptor {fd}: {path}" for fd, path in self.descriptors.items() - before.descriptors.items()]
        return left + [f"file {path}" for path in self.files - before.files]


def _children() -> set[str]:
    children: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            children.update((task / "children").read_text().split())
        except OSError:
            continue  # the thread has ended
    return children


def _descriptors() -> dict[int, str]:
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the descriptor of the directory itself
    return found


def _temporary_files() -> set[Path]:
    """Files of nbagent directly below the directory for temporary files, and those of this process in /dev/shm.

    Test runs at the same time share /dev/shm, so that names there have the pid of their run.
    """
    files = set(Path(tempfile.gettempdir()).glob("nbagent-*"))
    return files | set(Path("/dev/shm").glob(f"nbagent-*-{os.getpid()}-*"))


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    """Fails a test that leaves a process, thread, descriptor or temporary file behind. Tasks are checked in `_run`."""
    before = Remains()
    yield
    deadline_s = time.monotonic() + SETTLE_S
    while left := Remains().since(before):
        gc.collect()
        if time.monotonic() > deadline_s:
            pytest.fail(f"the test left behind: {', '.join(left)}")
        time.sleep(0.01)


_CLOCK_GETTIME = time.clock_gettime


class Clock:
    """CLOCK_BOOTTIME as the code under test reads it: it goes on as it does unless stopped, and jumps by `advance`."""

    def __init__(self) -> None:
        self._offset_s = 0.0
        self._stopped_s: float | None = None

    def advance(self, seconds: float) -> None:
        self._offset_s += seconds

    def stop(self) -> None:
        """Lets time pass by `advance` only, for code that divides by it: a busy machine's pauses change the result."""
        self._stopped_s = _CLOCK_GETTIME(time.CLOCK_BOOTTIME)

    def read(self, which: int) -> float:
        return (_CLOCK_GETTIME(which) if self._stopped_s is None else self._stopped_s) + self._offset_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that the test can advance."""
    clock = Clock()
    monkeypatch.setattr(time, "clock_gettime", clock.read)
    return clock


@pytest.fixture(autouse=True)
def journal(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The entries that a test would write to the journal, which gets none."""
    entries: list[dict[str, str]] = []
    monkeypatch.setattr(Journal, "send", lambda _, fields: entries.append(dict(fields)))
    return entries


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """The descriptor of a file."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    one, other = Channel.pair()
    with one, other:
        yield one, other
