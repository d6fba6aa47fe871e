"""The benchmarks' client: claims, notebook servers, kernels and cells, any number at a time, by asyncio in one thread.

The thread is in the test host's network namespace, so what it asks for comes from the host's loopback, as a proxy's
requests do that runs there. It shares the processors with what it measures; `cpu_s` says what it used.
"""

from __future__ import annotations

import asyncio
import json
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

# No request of a benchmark takes longer, however loaded the machine: what does has failed.
TIMEOUT_S = 300


@dataclass(frozen=True)
class Server:
    """A notebook server: `url` ends with a slash; `slot` is what its maker calls it."""

    url: str
    token: str
    slot: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"token {self.token}"}


class Kernel:
    """A kernel's open websocket, which is listened to until `close`, as an open browser tab does.

    Not only while a cell runs: the server pings, and hangs up on who does not answer.
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
                self._tell(result, document["header"]["msg_type"], document["content"])
        for result in self._results.values():
            if not result.done():
                result.set_exception(RuntimeError(f"the websocket was closed with {self._socket.close_code}"))

    @staticmethod
    def _tell(result: asyncio.Future[str], kind: str, content: dict[str, Any]) -> None:
        if kind == "execute_result":
            result.set_result(str(content["data"]["text/plain"]))
        # The reply comes by another way, and may come first; idle comes last of what the result comes by.
        elif kind == "error" or (kind == "status" and content["execution_state"] == "idle"):
            result.set_exception(RuntimeError(f"no result but {content}"))

    async def close(self) -> None:
        await self._socket.close()
        await self._listener


class Client:
    """A thread with a loop; `run` gives it work and waits, from any other thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
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
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._ready.set()
        self._loop.run_forever()

    async def _open(self) -> None:
        # No bound on connections: a burst is a burst. Addresses are numbers, so no resolver thread is needed.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=600)
        self.http = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S))

    async def _close(self) -> None:
        # Who is told to end in the middle of a burst leaves all of it.
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
        """POST /claim. Raises RuntimeError with the API's own words when it is not answered 200."""
        body = {"image": image} if image else {}
        headers = {"Connection": "close"} if new_connection else None
        async with self.http.post(f"http://127.0.0.1:{API_PORT}/claim", json=body, headers=headers) as answer:
            text = await answer.text()
        if answer.status != 200:
            raise RuntimeError(f"claim: {answer.status} {text}")
        document = json.loads(text)
        return Server(f"http://127.0.0.1:8000/user/{document['slot']}/", document["token"], document["slot"])

    async def ready(self, server: Server, poll_s: float) -> None:
        """Returns at the first 200 of GET api. A server that cannot be waited for is asked again and again."""
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
        url = f"{server.url}api/kernels/{json.loads(text)['id']}/channels?session_id={uuid.uuid4().hex}"
        return Kernel(await self.http.ws_connect(url, headers=server.headers, timeout=TIMEOUT_S))

    async def first_cell(self, server: Server) -> Kernel:
        """A new kernel that has run its first cell, and said what it has to say."""
        kernel = await self.kernel(server)
        if (text := await kernel.run("1+1")) != "2":
            raise RuntimeError(f"1+1 is {text!r} at {server.url}")
        return kernel
