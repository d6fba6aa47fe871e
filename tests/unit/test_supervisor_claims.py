# SPDX-License-Identifier: BSD-3-Clause
"""Claims over fakes: a slot has one owner, a key gives one slot, and a cancelled caller's slot is not lost."""

from __future__ import annotations

import asyncio
import base64
import datetime
import errno
import math
import time

import pytest
from fakes import Host, cancelled, kinds, turns, until

from nbagent.cli import traces
from nbagent.core.errors import (
    ContentFailed,
    Draining,
    Full,
    IdempotencyMismatch,
    ImageNotFound,
    InvalidField,
    NotReady,
    RecordFailed,
    StartFailed,
)
from nbagent.core.events import Event
from nbagent.core.model import SlotState
from nbagent.supervisor import content_injector, pools
from nbagent.supervisor.content_injector import Injected

INTERNET = {"network": {"allow": ["none", "internet"]}}
FILES = {"a.txt": {"base64": base64.b64encode(b"text").decode()}}


async def test_a_claim_takes_the_warm_slot_and_the_pool_starts_another(tmp_path, journal):
    async with Host(tmp_path) as host:
        warm, = await host.until_states("warm")
        claim = await host.claim(ttl="10min", path="lab/tree/a.ipynb")
        assert claim["slot"] == warm and claim["path"].endswith("/lab/tree/a.ipynb")
        slot = host.slots[warm].slot
        assert (slot.state, slot.ttl_s, slot.token) == (SlotState.CLAIMED, 600.0, claim["token"])
        assert host.records.path.joinpath(warm, "slot.json").exists()
        await host.until_states("claimed", "warm")
        assert kinds(journal).count(Event.SLOT_CLAIMED) == 1


async def test_a_claim_has_the_trace_of_its_caller_in_the_journal(tmp_path, journal):
    async with Host(tmp_path, pool={"warm": 2}) as host:
        await host.until_states("warm", "warm")
        await host.claim(trace=f"{'4b' * 16}-{'00f0' * 4}")
        await host.claim()
        await turns()
    traced, plain = (entry for entry in journal if kinds([entry]) == [Event.SLOT_CLAIMED])
    assert (traced["NBAGENT_TRACE_ID"], traced["NBAGENT_PARENT_SPAN_ID"]) == ("4b" * 16, "00f0" * 4)
    assert not {f"NBAGENT_{name}" for name in ("TRACE_ID", "PARENT_SPAN_ID", "TOOK_US", "WAITED_US")} & plain.keys()
    at = {"_SYSTEMD_UNIT": "nbagent.service", "__REALTIME_TIMESTAMP": datetime.datetime.now(datetime.UTC)}
    first, allocate, prepare = traces.spans(traced | at)
    assert (first.trace, first.parent, first.name) == ("4b" * 16, "00f0" * 4, "claim")
    assert allocate.parent == prepare.parent == first.id and allocate.end_ns == prepare.start_ns
    assert first.start_ns == allocate.start_ns <= allocate.end_ns <= prepare.end_ns == first.end_ns


async def test_a_claim_of_an_empty_pool_waits_for_a_start(tmp_path):
    async with Host(tmp_path, pool={"warm": 0, "starts": 4}) as host:
        gate = host.launcher.hold()
        claiming = asyncio.ensure_future(host.claim())
        slot_id, = await host.until_states("starting")
        assert not claiming.done() and host.launcher.prepared == 1
        gate.set()
        assert (await claiming)["slot"] == slot_id


async def test_while_an_image_has_no_zygote_yet_slots_start_for_claims_alone(tmp_path):
    host = Host(tmp_path)
    host.zygotes.warming = {"minimal"}
    async with host:
        await turns()
        assert not host.slots
        await host.claim()
        await turns()
        assert sorted(host.states().values()) == ["claimed"]
        host.zygotes.warming = set()
        host.wake()
        await host.until_states("claimed", "warm")


async def test_a_slot_that_does_not_say_that_it_serves_is_requested_first(tmp_path):
    async with Host(tmp_path) as host:
        host.launcher.serves = False
        slot_id, = await host.until_states("starting")
        await until(lambda: slot_id in host.systemd.units or host.launcher.launched)
        # The program's socket is the listener of the slot's directory; the fake process does not serve it.
        host.systemd.end(f"nbagent-{slot_id}.scope")
        await until(lambda: host.calls.stats()["counters"]["start_failures"] == 1)


async def test_two_claims_that_race_for_one_slot_get_two_slots(tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        first, second = await asyncio.gather(host.claim(), host.claim())
        assert first["slot"] != second["slot"] and first["token"] != second["token"]


async def test_limits_of_a_claim_are_set_on_its_scope(tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        claim = await host.claim(memory="512M", cpu_weight=50)
        limits = host.systemd.limits[f"nbagent-{claim['slot']}.scope"]
        assert (limits.memory_bytes, limits.cpu_weight) == (512 << 20, 50)
        assert claim["limits"]["memory_bytes"] == 512 << 20


async def test_limits_that_systemd_refuses_end_the_slot_and_fail_the_claim(tmp_path):
    async with Host(tmp_path) as host:
        slot_id, = await host.until_states("warm")
        host.systemd.limits_error = OSError("no such unit")
        with pytest.raises(StartFailed, match="no such unit"):
            await host.claim(memory="512M")
        await host.gone(slot_id)
        assert host.calls.stats()["counters"]["claims_refused"] == 1


@pytest.mark.parametrize("options", [{}, {"memory": "512M"}])
async def test_a_claim_that_cannot_be_recorded_is_refused_and_its_slot_ended(tmp_path, monkeypatch, options):
    async with Host(tmp_path) as host:
        slot_id, = await host.until_states("warm")

        def full(slot):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(host.records, "save", full)
            with pytest.raises(RecordFailed, match="No space left on device") as failed:
                await host.claim(key="k1", **options)
            assert failed.value.http_status == 503
            await host.gone(slot_id)
        await host.until_states("warm")
        assert (await host.claim(key="k1", **options))["slot"] != slot_id


async def test_the_record_of_a_slot_is_incomplete_while_its_limits_change(tmp_path, monkeypatch):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        states, set_limits = [], host.systemd.set_limits

        async def note(name, limits):
            states.extend(slot.state for _, slot in host.records.load() if slot.scope == name)
            await set_limits(name, limits)

        monkeypatch.setattr(host.systemd, "set_limits", note)
        claim = await host.claim(memory="64M")
        assert states == [SlotState.PREPARING]
        recorded = dict(host.records.load())[claim["slot"]]
        assert (recorded.state, recorded.limits.memory_bytes) == (SlotState.CLAIMED, 64 << 20)


@pytest.mark.parametrize("options", [{"memory": "lots"}, {"image": "absent"}, {"network": "internet"}, {"size": 1}])
async def test_options_that_are_refused_take_no_slot(tmp_path, options):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        with pytest.raises(InvalidField):
            await host.claim(**options)
        assert list(host.states().values()) == ["warm"]


async def test_the_default_image_that_is_absent_is_not_the_callers_fault(tmp_path):
    host = Host(tmp_path, pool={"image": "absent", "warm": 0})
    async with host:
        with pytest.raises(ImageNotFound, match="minimal"):
            await host.claim()


# Keys


async def test_a_key_gives_its_slot_again(tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        first = await host.claim("k1", ttl=60)
        await host.calls.update(first["slot"], {"cpu_weight": 7}, "192.0.2.1")
        again = await host.claim("k1", ttl=60)
        assert (again["slot"], again["token"]) == (first["slot"], first["token"])
        assert again["limits"]["cpu_weight"] == 7
        assert host.calls.stats()["counters"]["claims"] == 1


async def test_a_key_with_other_options_is_refused(tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        await host.claim("k1", ttl=60)
        with pytest.raises(IdempotencyMismatch):
            await host.claim("k1", ttl=61)


async def test_a_key_with_other_options_is_refused_while_its_claim_waits(tmp_path):
    async with Host(tmp_path, pool={"warm": 0, "starts": 4}) as host:
        gate = host.launcher.hold()
        claiming = asyncio.ensure_future(host.claim("k1", ttl=60))
        await host.until_states("starting")
        with pytest.raises(IdempotencyMismatch):
            await host.claim("k1", ttl=61)
        gate.set()
        await claiming


async def test_two_callers_with_one_key_get_one_slot(tmp_path):
    async with Host(tmp_path, pool={"warm": 0, "starts": 4}) as host:
        gate = host.launcher.hold()
        callers = [asyncio.ensure_future(host.claim("k1")) for _ in range(3)]
        await host.until_states("starting")
        gate.set()
        assert len({claim["slot"] for claim in await asyncio.gather(*callers)}) == 1


@pytest.mark.parametrize("ended", [False, True])
async def test_a_key_of_a_slot_that_ended_claims_anew(tmp_path, ended):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        first = await host.claim("k1", ttl=60)
        host.calls.release(first["slot"], "192.0.2.1")
        if ended:
            await host.gone(first["slot"])
        second = await host.claim("k1", ttl=61)
        assert second["slot"] != first["slot"]
        await host.gone(first["slot"])
        assert (await host.claim("k1", ttl=61))["slot"] == second["slot"]


async def test_a_key_whose_claim_failed_claims_anew(tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        host.systemd.limits_error = OSError("refused")
        with pytest.raises(StartFailed):
            await host.claim("k1", memory="512M")
        host.systemd.limits_error = None
        assert await host.claim("k1", memory="512M")


async def test_the_next_caller_with_a_key_gets_no_slot_of_a_cancelled_first(tmp_path):
    async with Host(tmp_path, pool={"warm": 0, "starts": 4}) as host:
        gate = host.launcher.hold()
        first = asyncio.ensure_future(host.claim("k1"))
        second = asyncio.ensure_future(host.claim("k1"))
        await host.until_states("starting")
        await cancelled(first)
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.set()
        assert (await host.claim("k1"))["slot"] in host.slots


async def test_a_cancelled_second_caller_leaves_the_first_its_slot(tmp_path):
    async with Host(tmp_path, pool={"warm": 0, "starts": 4}) as host:
        gate = host.launcher.hold()
        first = asyncio.ensure_future(host.claim("k1"))
        second = asyncio.ensure_future(host.claim("k1"))
        await host.until_states("starting")
        await cancelled(second)
        gate.set()
        assert await first


# Callers that leave


async def test_the_slot_of_a_cancelled_caller_goes_to_the_next_that_waits(tmp_path):
    async with Host(tmp_path, pool={"warm": 0, "starts": 4}, slots={"capacity": 2}) as host:
        gate = host.launcher.hold()
        first, second = (asyncio.ensure_future(host.claim()) for _ in range(2))
        await host.until_states("starting", "starting")
        await cancelled(first)
        gate.set()
        claim = await second
        # The other slot has no claim and no place in a pool of no warm slots.
        await host.until_states("claimed")
        assert claim["slot"] in host.slots


async def test_a_slot_that_was_handed_to_a_caller_that_is_cancelled_goes_back_to_the_pool(tmp_path):
    async with Host(tmp_path, pool={"warm": 0, "starts": 4}) as host:
        gate = host.launcher.hold()
        first = asyncio.ensure_future(host.claim())
        slot_id, = await host.until_states("starting")
        host.reload(pool={"warm": 1, "starts": 4})
        gate.set()
        # In the turn of the loop in which the slot becomes warm, the claim has been given it but has not run yet.
        await until(lambda: host.states().get(slot_id) == "warm")
        await cancelled(first)
        assert (await host.claim())["slot"] == slot_id


async def test_a_slot_that_is_offered_in_the_turn_in_which_the_wait_times_out_has_an_owner(tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        host.launcher.hold()
        waits_s, pools = 0.05, host.supervisor.pools
        live = pools.take("minimal")
        wait = asyncio.ensure_future(pools.wait("minimal", waits_s))
        await turns(1)
        asyncio.get_running_loop().call_later(waits_s - 0.02, pools.offer, live)
        time.sleep(2 * waits_s)  # so that the offer and the end of the wait are due in the same turn
        assert await wait is live


async def test_a_released_claim_that_was_not_received_ends(tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        claim = await host.claim()
        host.calls.abandon(claim["slot"])
        host.calls.abandon(claim["slot"])
        host.calls.abandon("c07-absent")
        await host.gone(claim["slot"])


# Full, late and draining


async def test_a_full_host_refuses_with_the_time_of_the_next_end(tmp_path, journal):
    async with Host(tmp_path, slots={"capacity": 1}) as host:
        await host.until_states("warm")
        await host.claim(ttl=30)
        with pytest.raises(Full, match="all 1 slots are in use") as refused:
            await host.claim()
        assert 25 <= refused.value.details["retry_after_s"] <= 30
        assert Event.HOST_FULL in kinds(journal)


async def test_the_claim_queue_is_no_longer_than_the_slots_that_can_come(tmp_path):
    async with Host(tmp_path, pool={"warm": 0, "starts": 4}, slots={"capacity": 1}) as host:
        gate = host.launcher.hold()
        first = asyncio.ensure_future(host.claim())
        await turns(1)
        with pytest.raises(Full):
            await host.claim()
        gate.set()
        await first


async def test_a_claim_that_waits_too_long_is_refused(tmp_path):
    async with Host(tmp_path, pool={"warm": 0, "starts": 4, "claim_timeout": "10ms"}) as host:
        gate = host.launcher.hold()
        host.supervisor.health.faults["systemd"] = "no response"
        with pytest.raises(NotReady, match=r"within 0\.01 s; 1 are being started, by exec because .*; systemd: no"):
            await host.claim()
        gate.set()


async def test_a_claim_that_waits_while_starts_fail_has_the_reason(tmp_path):
    pool = {"warm": 0, "starts": 4, "claim_timeout": "50ms", "backoff": "1h", "backoff_max": "1h"}
    async with Host(tmp_path, pool=pool) as host:
        host.launcher.error = StartFailed("mount: no such device", step="mount")
        host.supervisor.health.faults["systemd"] = "no response"
        with pytest.raises(StartFailed, match="no such device; systemd: no response") as failed:
            await host.claim()
        assert failed.value.details["step"] == "mount"


async def test_claims_that_wait_are_refused_when_starts_have_failed_for_long(tmp_path, monkeypatch):
    pool = {"warm": 0, "starts": 4, "claim_timeout": "600s", "backoff": "1ms", "backoff_max": "1ms"}
    async with Host(tmp_path, pool=pool) as host:
        host.launcher.error = StartFailed("fork: EAGAIN", step="launch", errno=errno.EAGAIN)
        claiming = asyncio.ensure_future(host.claim())
        await until(lambda: host.supervisor.pools["minimal"].failures >= 3)
        assert not claiming.done()
        monkeypatch.setattr(pools, "LASTING_S", 0.0)
        with pytest.raises(StartFailed, match="EAGAIN") as failed:
            await claiming
        assert failed.value.details["errno"] == errno.EAGAIN
        # The time counts from the first failure after a success.
        monkeypatch.setattr(pools, "LASTING_S", 600.0)
        host.launcher.error = None
        assert (await host.claim())["slot"]
        assert host.supervisor.pools["minimal"].failing_s == math.inf


async def test_a_draining_host_refuses_claims_and_ends_warm_slots_alone(tmp_path, journal):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        claim = await host.claim("k1")
        await host.until_states("claimed", "warm")
        assert host.calls.set_draining(True) == {"draining": True, "claimed": 1, "warm": 1}
        await host.until_states("claimed")
        with pytest.raises(Draining):
            await host.claim()
        # The slot of a key is still its caller's.
        assert (await host.claim("k1"))["slot"] == claim["slot"]
        assert host.calls.free_percent() == 0 and host.calls.stats()["available"] == 0
        host.calls.set_draining(True)
        host.calls.set_draining(False)
        await host.until_states("claimed", "warm")
        events = kinds(journal)
        assert (events.count(Event.DRAIN_STARTED), events.count(Event.DRAIN_ENDED)) == (1, 1)


# Network and content


async def test_a_claim_with_network_opens_its_interface(tmp_path):
    async with Host(tmp_path, **INTERNET) as host:
        slot_id, = await host.until_states("warm")
        assert host.network.interfaces == {slot_id: "closed"}
        claim = await host.claim(network="internet")
        assert claim["network"] == "internet" and host.network.interfaces[slot_id] == "open"


async def test_a_claim_without_network_has_its_interface_removed(tmp_path):
    async with Host(tmp_path, **INTERNET) as host:
        slot_id, = await host.until_states("warm")
        await host.claim()
        await until(lambda: slot_id not in host.network.interfaces)


async def test_a_network_that_cannot_be_opened_ends_the_slot(tmp_path, journal):
    async with Host(tmp_path, **INTERNET) as host:
        slot_id, = await host.until_states("warm")
        host.network.errors["open"] = StartFailed("nbagent-network: open: EIO", step="network")
        with pytest.raises(StartFailed, match="EIO"):
            await host.claim(network="internet")
        await host.gone(slot_id)
        assert Event.SLOT_NOT_PREPARED in kinds(journal)


async def test_a_slot_without_an_interface_is_not_claimed_with_network(tmp_path):
    async with Host(tmp_path) as host:
        first, = await host.until_states("warm")
        # The pool still has a slot that was started before the reload.
        live = host.slots[first]
        host.reload(**INTERNET)
        claim = await host.claim(network="internet")
        assert claim["slot"] != first and live.slot.state is not SlotState.CLAIMED


@pytest.fixture
def injected(monkeypatch):
    """Replaces the injection of content; the list has what was injected, its first element may be an exception."""
    calls: list = []

    async def inject(slot, pidfd, content, settings, join_scope):
        await join_scope(1)
        calls.append((slot.id, slot.state, content))
        await asyncio.sleep(0)
        if isinstance(calls[0], BaseException):
            raise calls[0]
        if isinstance(calls[0], asyncio.Event):
            await calls[0].wait()
        return Injected(len(content.files), 0)

    monkeypatch.setattr(content_injector, "inject", inject)
    return calls


async def test_content_is_in_the_slot_before_it_is_claimed(tmp_path, injected, journal):
    async with Host(tmp_path) as host:
        slot_id, = await host.until_states("warm")
        claim = await host.claim(files=FILES)
        (name, state, content), = injected
        assert (name, state, content.files[0].data) == (slot_id, SlotState.PREPARING, b"text")
        assert claim["slot"] == slot_id and ("attach", f"nbagent-{slot_id}.scope") in host.systemd.calls
        assert Event.CONTENT_DELIVERED in kinds(journal)


async def test_content_that_fails_ends_the_slot(tmp_path, injected):
    injected.append(ContentFailed("no space"))
    async with Host(tmp_path) as host:
        slot_id, = await host.until_states("warm")
        with pytest.raises(ContentFailed, match="no space"):
            await host.claim(files=FILES)
        await host.gone(slot_id)


async def test_a_supervisor_without_a_descriptor_for_the_preparation_refuses_the_claim(tmp_path, injected):
    injected.append(OSError(errno.EMFILE, "Too many open files"))
    async with Host(tmp_path) as host:
        slot_id, = await host.until_states("warm")
        with pytest.raises(StartFailed, match="preparation: Too many open files"):
            await host.claim(files=FILES)
        await host.gone(slot_id)


async def test_a_slot_that_ends_while_it_is_prepared_fails_its_claim(tmp_path, injected):
    gate = asyncio.Event()
    injected.append(gate)
    async with Host(tmp_path) as host:
        slot_id, = await host.until_states("warm")
        claiming = asyncio.ensure_future(host.claim(files=FILES))
        await until(lambda: host.states().get(slot_id) == "preparing")
        host.systemd.end(f"nbagent-{slot_id}.scope")
        await until(lambda: host.states().get(slot_id) != "preparing")
        gate.set()
        with pytest.raises(StartFailed, match="ended"):
            await claiming
        await host.gone(slot_id)


async def test_a_caller_cancelled_while_its_slot_is_prepared_ends_the_slot(tmp_path, injected):
    injected.append(asyncio.Event())
    async with Host(tmp_path) as host:
        slot_id, = await host.until_states("warm")
        claiming = asyncio.ensure_future(host.claim(files=FILES))
        await until(lambda: host.states().get(slot_id) == "preparing")
        await cancelled(claiming)
        await host.gone(slot_id)
        assert host.calls.stats()["counters"]["claims"] == 0


async def test_an_archive_needs_the_internet(tmp_path):
    url = "https://data.example.org/one.tar.gz"
    claims = {"archives": ["https://data.example.org/"]}
    async with Host(tmp_path, claims=claims) as host:
        with pytest.raises(InvalidField, match=r"network\.allow"):
            await host.claim(archive=url)
    async with Host(tmp_path, claims=claims, **INTERNET) as host:
        with pytest.raises(InvalidField, match='"internet"'):
            await host.claim(archive=url)


async def test_a_slot_that_ends_before_its_claim_would_is_retired(tmp_path):
    async with Host(tmp_path) as host:
        first, = await host.until_states("warm")
        host.reload(slots={"capacity": 4, "ttl_max": "3d"})
        claim = await host.claim(ttl="2d")
        assert claim["slot"] != first
        await host.gone(first)
