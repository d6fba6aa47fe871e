# SPDX-License-Identifier: BSD-3-Clause
"""A zygote's event loop runs in its forks, with all that was scheduled before the fork."""

import asyncio
import functools
import json
import os

from nbagent.zygote.kept_loop import KeptLoop


def test_callbacks_timers_and_tasks_run_in_each_fork_after_the_servers_own():
    loop = asyncio.new_event_loop()
    ran = []

    async def task():
        await asyncio.sleep(0)
        ran.append("task")

    loop.call_soon(ran.append, "callback")
    loop.call_later(0.01, ran.append, "timer")
    loop.call_later(3600, ran.append, "late timer")
    running = loop.create_task(task())
    kept = KeptLoop(loop)
    kept.release()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(2):
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                assert kept.restore() and asyncio.get_event_loop() is loop
                loop.call_soon(ran.append, "server")
                loop.run_until_complete(asyncio.wait_for(_until(ran, 4), 30))
                os.write(write_fd, json.dumps(ran).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(write_fd)
        with open(read_fd, "rb") as file:
            found = json.loads(file.read())
        assert os.waitpid(pid, 0)[1] == 0
        assert found[0] == "server" and sorted(found[1:]) == ["callback", "task", "timer"]
    # The descriptors of the loop were closed, and the loop of this process is not used any more.
    assert set(os.listdir("/proc/self/fd")) <= before
    assert not kept.restore() or loop.run_until_complete(running) is None
    loop.close()
    asyncio.set_event_loop(None)


def test_the_zygote_runs_the_coroutines_of_one_module_and_nothing_else():
    loop, ran = asyncio.new_event_loop(), []
    kept = KeptLoop(loop)

    async def same():
        loop.call_later(3600, ran.append, "its timer")
        await loop.run_in_executor(None, ran.append, "same")

    async def fails():
        raise OSError("no network here")

    async def lasts():
        await asyncio.sleep(3600)

    async def other():
        ran.append("other")

    def by_tornado(call):
        loop.create_task(call())

    same.__module__ = fails.__module__ = lasts.__module__ = "of_the_image"
    for function in (same, fails, lasts, other):
        loop.call_later(0, by_tornado, functools.partial(function))
    loop.call_soon(ran.append, "callback")
    errors = kept.run(("of_the_image",), 0.05)
    assert ran == ["same"] and [type(error) for error in errors] == [OSError, asyncio.TimeoutError]
    left = [handle for handle in [*loop._ready, *loop._scheduled] if not handle.cancelled()]
    assert len(left) == 5  # those of fails, lasts, other and the callback, and the timer
    loop._default_executor.shutdown()
    for handle in left:
        handle.cancel()
    loop.close()


async def _until(ran, number):
    while len(ran) < number:
        await asyncio.sleep(0.005)
