# SPDX-License-Identifier: BSD-3-Clause
"""The parts of a host that are tried, and what a host with a fault offers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import Host, cancelled, kinds, make_image

from nbagent.core.errors import Full, RecordFailed, StartFailed
from nbagent.core.events import Event
from nbagent.supervisor import health
from nbagent.wire.failure import Failure, StepFailed


@contextlib.contextmanager
def router(path: Path, response: bytes) -> Iterator[None]:
    """A router that responds so to each request."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(response)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


REDIRECT = b"HTTP/1.1 308 Permanent Redirect\r\n\r\n"


async def warm(host: Host) -> None:
    await host.until_states("warm")


async def twice(host: Host) -> dict[str, str]:
    await host.supervisor.health.check()
    await host.supervisor.health.check()
    return host.supervisor.health.faults


def test_a_host_without_fault_offers_its_capacity(tmp_path):
    async def run():
        async with Host(tmp_path) as host:
            await warm(host)
            with router(tmp_path / "router-check.sock", REDIRECT):
                assert await twice(host) == {}
            assert host.calls.stats()["available"] == 4 and host.calls.stats()["ready"]

    asyncio.run(run())


@pytest.mark.parametrize("response", [None, b"HTTP/1.1 502 Bad Gateway\r\n\r\n", b""], ids=["stopped", "502", "closed"])
def test_a_host_whose_router_fails_offers_nothing_until_it_serves_again(tmp_path, response):
    async def run():
        path = tmp_path / "router-check.sock"
        async with Host(tmp_path) as host:
            await warm(host)
            if response is None:
                with socket.socket(socket.AF_UNIX) as gone:
                    gone.bind(str(path))
                assert (await twice(host)).keys() == {"router"}
            else:
                with router(path, response):
                    assert (await twice(host)).keys() == {"router"}
            assert host.calls.free_percent() == 0 and not host.calls.stats()["ready"]
            path.unlink()
            with router(path, REDIRECT):
                await host.supervisor.health.check()
            assert host.calls.free_percent() == 100

    asyncio.run(run())


def test_one_failure_is_tried_again_before_it_counts(tmp_path):
    async def run():
        async with Host(tmp_path) as host:
            await warm(host)
            host.systemd.check_error = OSError("no PID 1")
            assert not await host.supervisor.health.check() and not host.supervisor.health.faults
            assert await host.supervisor.health.check() and host.supervisor.health.faults == {"systemd": "no PID 1"}

    asyncio.run(run())


@pytest.mark.parametrize("part", ["systemd", "image"])
def test_a_host_that_cannot_start_slots_offers_its_warm_ones(tmp_path, part):
    async def run():
        async with Host(tmp_path) as host:
            await warm(host)
            if part == "systemd":
                host.systemd.check_error = OSError("no PID 1")
            else:
                host.store.images.clear()
            assert (await twice(host)).keys() == {part}
            assert host.calls.stats()["available"] == 1 and host.calls.free_percent() == 25

    asyncio.run(run())


@pytest.mark.parametrize(("default", "available"), [("none", 1), ("internet", 0)])
def test_a_host_whose_network_fails_offers_warm_slots_to_claims_without_it(tmp_path, default, available):
    async def run():
        allow = sorted({"none", default, "internet"})
        async with Host(tmp_path, network={"allow": allow}, images={"minimal": {"network": default}}) as host:
            await warm(host)
            assert await twice(host) == {}
            host.network.errors["check"] = StartFailed("no table", step="network")
            assert await twice(host) == {"network": "no table"}
            assert host.calls.stats()["available"] == available and not host.calls.stats()["ready"]
            with pytest.raises(StartFailed, match="no table"):
                await host.calls.try_start()
            # A claim is refused at once and leaves the warm slot.
            warm_slot, = await host.until_states("warm")
            with pytest.raises(StartFailed, match="no slot can have a network: no table"):
                await host.claim(network="internet")
            assert await host.until_states("warm") == [warm_slot]
            del host.network.errors["check"]
            # Before the next check, since it is mended.
            assert (await host.claim(network="internet"))["slot"] == warm_slot
            await host.supervisor.health.check()
            assert host.calls.free_percent() == 75

    asyncio.run(run())


def test_a_host_without_networks_asks_no_network_service(tmp_path):
    async def run():
        async with Host(tmp_path) as host:
            await warm(host)
            host.network.errors["check"] = StartFailed("no table", step="network")
            assert await twice(host) == {} and not host.network.calls

    asyncio.run(run())


def test_a_host_that_cannot_write_records_offers_nothing(tmp_path, monkeypatch):
    async def run():
        async with Host(tmp_path) as host:
            await warm(host)
            # One file can be written, and not as many as a slot needs.
            (tmp_path / "slots" / ".check-1").mkdir()
            assert (await twice(host)).keys() == {"records"}
            assert host.calls.free_percent() == 0
            assert [path.name for path in (tmp_path / "slots").glob(".*")] == [".check-1"]
            # A claim is refused at once and leaves the warm slot, which the first claim after the mend gets.
            slot_id, = await host.until_states("warm")
            with pytest.raises(RecordFailed, match="no slot can be recorded"):
                await host.claim()
            (tmp_path / "slots" / ".check-1").rmdir()
            assert (await host.claim())["slot"] == slot_id

    asyncio.run(run())


def test_a_claim_that_waits_is_refused_when_slots_cannot_be_recorded(tmp_path):
    async def run():
        async with Host(tmp_path, pool={"warm": 0, "starts": 4, "claim_timeout": "600s"}) as host:
            gate, claiming = host.launcher.hold(), asyncio.ensure_future(host.claim())
            await host.until_states("starting")
            (tmp_path / "slots" / ".check-1").mkdir()
            assert (await twice(host)).keys() == {"records"}
            with pytest.raises(RecordFailed, match="no slot can be recorded"):
                await claiming
            (tmp_path / "slots" / ".check-1").rmdir()
            gate.set()
            assert (await host.claim())["slot"]

    asyncio.run(run())


def test_a_fault_is_in_the_journal_when_it_lasts(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(health, "emit", lambda event, **fields: seen.append((event, fields["part"])))

    async def run():
        async with Host(tmp_path) as host:
            host.systemd.check_error = OSError("no PID 1")
            await twice(host)
            assert not seen
            monkeypatch.setattr(health, "REPORT_S", 0.0)
            await twice(host)
            assert seen == [(Event.HEALTH_LOST, "systemd")]
            host.systemd.check_error = None
            await twice(host)
            assert seen[1:] == [(Event.HEALTH_RESTORED, "systemd")]

    asyncio.run(run())


def test_a_trial_starts_a_slot_requests_it_and_ends_it(tmp_path):
    async def run():
        async with Host(tmp_path) as host:
            slot, = await host.until_states("warm")
            with router(tmp_path / "router-check.sock", REDIRECT):
                result = await host.calls.try_start()
            assert result["launch"] == "exec" and result["router_ms"] is not None and result["slot"] != slot
            assert await host.until_states("warm") == [slot]

    asyncio.run(run())


def test_a_trial_reports_a_slot_that_the_router_does_not_serve_and_ends_it(tmp_path):
    async def run():
        async with Host(tmp_path) as host:
            slot, = await host.until_states("warm")
            failing = router(tmp_path / "router-check.sock", b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            with failing, pytest.raises(StartFailed, match="not through the router"):
                await host.calls.try_start()
            assert await host.until_states("warm") == [slot]
            # The pool goes on, because the slot itself has started.
            assert not host.calls.stats()["pools"]["minimal"]["failures"]

    asyncio.run(run())


def test_a_trial_reports_a_start_that_fails(tmp_path):
    async def run():
        async with Host(tmp_path) as host:
            await warm(host)
            host.launcher.error = StartFailed("no program", step="exec")
            with pytest.raises(StartFailed, match="no program"):
                await host.calls.try_start()
            await warm(host)
            # A full pool starts no slot that could end its failures.
            assert not host.calls.stats()["pools"]["minimal"]["failures"]


def test_a_trial_that_succeeds_ends_the_pause_after_failed_starts(tmp_path):
    async def run():
        async with Host(tmp_path) as host:
            await warm(host)
            host.supervisor.pools.start_failed("minimal", StartFailed("no program", step="exec"))
            await host.calls.try_start()
            assert not host.calls.stats()["pools"]["minimal"]["failures"]

    asyncio.run(run())


@pytest.mark.parametrize("error", [
    TimeoutError(), ConnectionRefusedError("refused"), StepFailed(Failure("launch", 0, "no response within 20 s")),
])
def test_a_trial_reports_a_launch_service_that_does_not_respond(tmp_path, error):
    async def run():
        async with Host(tmp_path) as host:
            await warm(host)
            host.open_error = error
            with pytest.raises(StartFailed, match=r"gets no content of a claim: (no resp|refused|launch)") as raised:
                await host.calls.try_start()
            assert raised.value.details["step"] == "launch"
            await warm(host)

    asyncio.run(run())


@pytest.mark.parametrize(("forks", "reason"), [(True, "its zygote failed: it ended"), (False, "")])
def test_a_trial_has_the_reason_for_a_start_by_exec_where_slots_are_forked(tmp_path, forks, reason):
    async def run():
        async with Host(tmp_path) as host:
            await warm(host)
            host.supervisor.pools["minimal"].image = make_image(tmp_path, launch="fork" if forks else "exec")
            host.launcher.reason = "its zygote failed: it ended"
            assert (await host.calls.try_start())["launch_reason"] == reason

    asyncio.run(run())


def test_a_trial_that_is_cancelled_ends_its_slot_before_that_has_started(tmp_path, journal):
    async def run():
        async with Host(tmp_path) as host:
            slot, = await host.until_states("warm")
            host.launcher.hold()
            trial = asyncio.ensure_future(host.calls.try_start())
            await host.until_states("starting", "warm")
            await cancelled(trial)
            assert await host.until_states("warm") == [slot]
            assert Event.SLOT_FAILED not in kinds(journal) and list(host.systemd.units) == [f"nbagent-{slot}.scope"]
            assert not host.calls.stats()["pools"]["minimal"]["failures"]

    asyncio.run(run())


def test_no_trial_takes_the_last_room(tmp_path):
    async def run():
        async with Host(tmp_path, slots={"capacity": 1}) as host:
            await warm(host)
            with pytest.raises(Full, match="all 1 slots are in use"):
                await host.calls.try_start()

    asyncio.run(run())


def test_a_pool_that_pauses_starts_at_once_when_the_fault_is_mended(tmp_path):
    async def run():
        async with Host(tmp_path, pool={"warm": 1, "backoff": "60s"}) as host:
            await warm(host)
            host.systemd.check_error = host.systemd.scope_error = OSError("no PID 1")
            await twice(host)
            await host.claim()
            while not host.supervisor.pools["minimal"].failures:
                await asyncio.sleep(0.01)
            assert host.supervisor.pools["minimal"].not_before_s > 0
            host.systemd.check_error = host.systemd.scope_error = None
            await host.supervisor.health.check()
            await host.until_states("warm", "claimed")

    asyncio.run(run())


async def test_an_image_whose_reading_fails_after_the_timeout_is_no_unexpected_error(tmp_path, monkeypatch):
    logged = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
    monkeypatch.setattr(health, "TIMEOUT_S", 0.01)
    async with Host(tmp_path) as host:
        parts, gate = host.supervisor.health, threading.Event()

        def fail() -> None:
            gate.wait(10)
            raise OSError("input/output error")

        monkeypatch.setattr(parts, "_read_image", fail)
        assert isinstance(await parts._try("image"), TimeoutError)
        gate.set()
        await asyncio.wait({parts._reading})
        parts._reading = None
        gc.collect()
        await asyncio.sleep(0)
    assert not logged
