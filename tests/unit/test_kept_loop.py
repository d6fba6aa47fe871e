# SPDX-License-Identifier: BSD-3-Clause
"""A zygote's event loop runs in its forks, with all that was scheduled before the fork."""

import asyncio
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


async def _until(ran, number):
    while len(ran) < number:
        await asyncio.sleep(0.005)
