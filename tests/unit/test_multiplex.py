# SPDX-License-Identifier: BSD-3-Clause
"""Many requests at a time over one connection: order, ends of either side, full buffers, malformed messages."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbagent.wire import multiplex
from nbagent.wire.channel import Channel
from nbagent.wire.failure import StepFailed
from nbagent.wire.multiplex import Requests


class Service:
    """A service that responds to "echo" at once, and to "wait" when `gate` opens."""

    def __init__(self, path: Path) -> None:
        self.path, self.served = path, 0
        self.gate = asyncio.Event()
        self._connections: list[tuple[Channel, asyncio.Task[None]]] = []

    async def __aenter__(self) -> Service:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._listener.setblocking(False)
        self._accepting = asyncio.ensure_future(self._accept())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._accepting.cancel()
        await self.end_connections()
        self._listener.close()

    async def _accept(self) -> None:
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            channel = Channel(connection)
            channel.socket.setblocking(False)
            self._connections.append((channel, asyncio.ensure_future(multiplex.serve(channel, "test", self._respond))))

    async def end_connections(self) -> None:
        """As when the service is killed."""
        for channel, task in self._connections:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            channel.close()
        self._connections.clear()

    def connections(self) -> int:
        return len(self._connections)

    async def _respond(self, body: object) -> dict[str, object]:
        assert isinstance(body, dict)
        if body["op"] == "wait":
            await self.gate.wait()
        self.served += 1
        return {"ok": body["value"]}


@contextlib.asynccontextmanager
async def connected(path: Path) -> AsyncIterator[tuple[Service, Requests]]:
    async with Service(path / "test.sock") as service:
        with contextlib.closing(Requests(str(path / "test.sock"))) as requests:
            yield service, requests


async def test_each_request_gets_its_own_response_in_any_order(tmp_path: Path) -> None:
    async with connected(tmp_path) as (service, requests):
        slow = asyncio.ensure_future(requests.request({"op": "wait", "value": "slow"}))
        quick = await asyncio.gather(*(requests.request({"op": "echo", "value": value}) for value in range(50)))
        assert [response.body["ok"] for response in quick] == list(range(50))
        assert not slow.done()
        service.gate.set()
        assert (await slow).body["ok"] == "slow"
        assert service.connections() == 1


async def test_more_requests_than_the_buffers_hold_are_all_served(tmp_path: Path) -> None:
    async with connected(tmp_path) as (_, requests):
        text = "x" * 10_000
        responses = await asyncio.gather(*(requests.request({"op": "echo", "value": text}) for _ in range(500)))
        assert {response.body["ok"] for response in responses} == {text}


async def test_a_request_fails_when_the_service_ends_and_the_next_goes_over_a_new_connection(tmp_path: Path) -> None:
    async with connected(tmp_path) as (service, requests):
        waiting = asyncio.ensure_future(requests.request({"op": "wait", "value": 1}))
        assert (await requests.request({"op": "echo", "value": 2})).body["ok"] == 2
        await service.end_connections()
        with pytest.raises(ConnectionError, match="ended before the response"):
            await waiting
        assert (await requests.request({"op": "echo", "value": 3})).body["ok"] == 3


async def test_a_request_after_an_end_that_the_loop_has_not_seen_is_sent_once(tmp_path: Path) -> None:
    async with connected(tmp_path) as (service, requests):
        await requests.request({"op": "echo", "value": 1})
        for channel, _ in service._connections:
            channel.socket.shutdown(socket.SHUT_RDWR)
        # Without a return to the event loop in between.
        assert (await requests.request({"op": "echo", "value": 2})).body["ok"] == 2
        assert service.served == 2


async def test_a_cancelled_request_is_carried_out_and_disturbs_no_other(tmp_path: Path) -> None:
    async with connected(tmp_path) as (service, requests):
        cancelled = asyncio.ensure_future(requests.request({"op": "wait", "value": 1}))
        await requests.request({"op": "echo", "value": 2})
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        service.gate.set()
        assert (await requests.request({"op": "echo", "value": 3})).body["ok"] == 3
        assert service.served == 3


@pytest.mark.parametrize("payload", [b"{", b"[]", b"{}", b'{"number": -1}', b'{"number": true}', b'{"number": 1e9}'])
async def test_a_malformed_message_ends_the_connection_with_a_failure(tmp_path: Path, payload: bytes) -> None:
    async with connected(tmp_path) as (service, requests):
        with Channel.unconnected() as channel:
            channel.socket.settimeout(10)
            channel.socket.connect(str(service.path))
            channel.socket.send(payload)
            response = await asyncio.to_thread(channel.receive)
            assert response is not None
            with response, pytest.raises(StepFailed):
                response.raise_failure()
        assert service.served == 0
        assert (await requests.request({"op": "echo", "value": 1})).body["ok"] == 1


async def test_a_service_that_sends_nonsense_fails_the_request(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "test.sock"))
        listener.listen()
        with contextlib.closing(Requests(str(tmp_path / "test.sock"))) as requests:
            waiting = asyncio.ensure_future(requests.request({"op": "echo", "value": 1}))
            await asyncio.sleep(0)
            connection, _ = listener.accept()
            with connection:
                connection.send(b'{"number": "0"}')
                with pytest.raises(ConnectionError):
                    await waiting
