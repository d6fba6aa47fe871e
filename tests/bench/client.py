# SPDX-License-Identifier: BSD-3-Clause
"""The benchmarks' client: claims, notebook servers, kernels and cells, any number at a time, by asyncio in one thread.

The thread is in the test host's network namespace, so that its requests come from the host's loopback, as those of a
proxy on the host do. It shares the processors with the measured programs; `cpu_s` is the processor time that it used.
With `at_once` the thread has the policy SCHED_FIFO, because a user's browser is on another machine: loads of the
measured host delay its server, and not itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import aiohttp

from product import API_PORT
from testhost_driver import Host, netns

# A request that takes longer has failed, even on a loaded machine.
TIMEOUT_S = 300


@dataclass(frozen=True)
class Server:
    """A notebook server: `url` ends with a slash; `slot` is its id or number at its side."""

    url: str
    token: str
    slot: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"token {self.token}"}


class Kernel:
    """A kernel's open websocket, which is read until `close`, as an open browser tab does.

    It is read between cells too, because the server sends pings and closes a connection without a pong.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._session = socket, uuid.uuid4().hex
        self._results: dict[str, asyncio.Future[str]] = {}
        self._listener = asyncio.create_task(self._listen())

    async def run(self, code: str) -> str:
        """Runs a cell; its result as text. Raises RuntimeError when there is none, TimeoutError when it is late."""
        if self._listener.done():
            raise RuntimeError(f"the kernel's websocket was closed with {self._socket.close_code}")
        message_id = uuid.uuid4().hex
        header = {"msg_id": message_id, "msg_type": "execute_request", "username": "", "session": self._session,
                  "version": "5.3", "date": ""}
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        result = self._results[message_id] = asyncio.get_running_loop().create_future()
        try:
            await self._socket.send_json(
                {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
            )
            async with asyncio.timeout(TIMEOUT_S):
                return await result
        finally:
            del self._results[message_id]

    async def _listen(self) -> None:
        async for message in self._socket:
            document = json.loads(message.data)
            result = self._results.get(document["parent_header"].get("msg_id", ""))
            if result is not None and not result.done():
                self._resolve(result, document["header"]["msg_type"], document["content"])
        for result in self._results.values():
            if not result.done():
                result.set_exception(RuntimeError(f"the websocket was closed with {self._socket.close_code}"))

    @staticmethod
    def _resolve(result: asyncio.Future[str], kind: str, content: dict[str, Any]) -> None:
        if kind == "execute_result":
            result.set_result(str(content["data"]["text/plain"]))
        # The reply comes on the shell channel and may come first; `idle` is the last message of the iopub channel.
        elif kind == "error" or (kind == "status" and content["execution_state"] == "idle"):
            result.set_exception(RuntimeError(f"no result but {content}"))

    async def close(self) -> None:
        await self._socket.close()
        await self._listener


class Client:
    """A thread with an event loop; `run` executes a coroutine there and waits, from any other thread."""

    def __init__(self, host: Host, *, at_once: bool = False) -> None:
        self._host = host
        self._at_once = at_once
        self.policy = "the default policy"
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="bench-client")

    def __enter__(self) -> Client:
        self._thread.start()
        self._ready.wait()
        self.run(self._open())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _serve(self) -> None:
        netns.enter(netns.path_of(self._host.name))
        if self._at_once:
            self._run_first()
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._ready.set()
        self._loop.run_forever()

    def _run_first(self) -> None:
        """Sets SCHED_FIFO for this thread, and not for its children.

        A kernel with CONFIG_RT_GROUP_SCHED refuses it outside the root of the cpu hierarchy.
        """
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        except OSError as error:
            self.policy += f", because SCHED_FIFO was refused: {error.strerror}"
        else:
            self.policy = "SCHED_FIFO"

    async def _open(self) -> None:
        # No bound on connections, because a burst opens all at once. Addresses are numeric and need no resolver thread.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=600)
        self.http = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S))

    async def _close(self) -> None:
        # After a SIGTERM in the middle of a burst the tasks of the burst are still pending.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.http.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @property
    def cpu_s(self) -> float:
        """Processor seconds of the client's thread so far."""
        return time.clock_gettime(self._clock)

    async def claim(self, image: str | None = None, *, new_connection: bool = False) -> Server:
        """POST /claim. Raises RuntimeError with the response's text when the status is not 200."""
        body = {"image": image} if image else {}
        headers = {"Connection": "close"} if new_connection else None
        async with self.http.post(f"http://127.0.0.1:{API_PORT}/claim", json=body, headers=headers) as answer:
            text = await answer.text()
        if answer.status != 200:
            raise RuntimeError(f"claim: {answer.status} {text}")
        document = json.loads(text)
        return Server(f"http://127.0.0.1:8000/user/{document['slot']}/", document["token"], document["slot"])

    async def ready(self, server: Server, poll_s: float) -> None:
        """Returns at the first 200 of GET api. A server whose port refuses connections is polled."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                try:
                    async with self.http.get(f"{server.url}api", headers=server.headers, allow_redirects=False) as got:
                        await got.read()
                        if got.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(poll_s)

    async def kernel(self, server: Server) -> Kernel:
        """Starts a kernel and opens its websocket."""
        async with self.http.post(f"{server.url}api/kernels", json={}, headers=server.headers) as answer:
            text = await answer.text()
        if answer.status != 201:
            raise RuntimeError(f"{server.url}api/kernels: {answer.status} {text[:300]}")
        return await self._channels(server, json.loads(text)["id"])

    async def attach(self, server: Server) -> Kernel:
        """Opens the websocket of the only kernel, which a page has started."""
        async with self.http.get(f"{server.url}api/kernels", headers=server.headers) as answer:
            [kernel] = await answer.json()
        return await self._channels(server, kernel["id"])

    async def _channels(self, server: Server, kernel: str) -> Kernel:
        url = f"{server.url}api/kernels/{kernel}/channels?session_id={uuid.uuid4().hex}"
        return Kernel(await self.http.ws_connect(url, headers=server.headers, timeout=TIMEOUT_S))

    async def first_cell(self, server: Server) -> Kernel:
        """A new kernel that has run its first cell."""
        kernel = await self.kernel(server)
        if (text := await kernel.run("1+1")) != "2":
            raise RuntimeError(f"1+1 is {text!r} at {server.url}")
        return kernel
