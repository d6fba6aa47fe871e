"""For every unit test: tests that are coroutines run in an event loop, and a test cleans up after itself."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import Any

import pytest

TEST_TIMEOUT_S = 30


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


@pytest.fixture(autouse=True)
def journal(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The entries that a test would write to the journal, which gets none."""
    from systemd import journal as library

    entries: list[dict[str, str]] = []
    monkeypatch.setattr(library, "sendv", lambda *fields: entries.append(dict(f.split("=", 1) for f in fields)))
    return entries


class Clock:
    """CLOCK_BOOTTIME as the code under test reads it: it goes on as it does, and jumps by `advance`."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    def advance(self, seconds: float) -> None:
        self.offset_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that the test can advance."""
    clock, read = Clock(), time.clock_gettime
    monkeypatch.setattr(time, "clock_gettime", lambda which: read(which) + clock.offset_s)
    return clock
