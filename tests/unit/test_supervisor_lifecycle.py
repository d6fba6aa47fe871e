# SPDX-License-Identifier: BSD-3-Clause
"""The life of slots over fakes: starts and their failures, retirement, ends, a reload and the end of the supervisor."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest
from fakes import Host, kinds, make_image, turns, until

from nbagent.core.errors import IllegalMove, InvalidField, RecordFailed, SlotNotFound, StartFailed
from nbagent.core.events import Event
from nbagent.core.model import SlotState, now
from nbagent.policy.pool import TRY_S
from nbagent.supervisor import images, scope_limits, slot_stopper
from nbagent.supervisor.systemd import JobFailed

POOL = {"warm": 2, "starts": 4}


async def test_a_pool_is_filled_and_each_slot_has_its_scope_and_its_files(tmp_path, journal):
    async with Host(tmp_path, pool=POOL) as host:
        first, second = await host.until_states("warm", "warm")
        assert set(host.systemd.units) == {f"nbagent-{first}.scope", f"nbagent-{second}.scope"}
        for name in (first, second):
            files = {path.name for path in (host.records.path / name).iterdir()}
            assert files == {"slot.json", "http.sock", "static", "meminfo", "online"}
        assert host.slots[first].slot.uid != host.slots[second].slot.uid
        assert kinds(journal).count(Event.SLOT_WARM) == 2


async def test_no_more_slots_start_at_a_time_than_is_set(tmp_path):
    async with Host(tmp_path, pool={"warm": 4, "starts": 2}) as host:
        gate = host.launcher.hold()
        await host.until_states("starting", "starting")
        await turns()
        assert len(host.slots) == 2
        gate.set()
        await host.until_states("warm", "warm", "warm", "warm")


@pytest.mark.parametrize("error", [
    StartFailed("exec: ENOENT", step="exec", errno=2), OSError("no descriptor left"), JobFailed("job 7 failed"),
])
async def test_a_start_that_fails_leaves_nothing_and_pauses_the_pool(tmp_path, journal, clock, error):
    async with Host(tmp_path, pool={"warm": 1, "starts": 4, "backoff": "10s"}) as host:
        host.launcher.error = error
        await until(lambda: Event.POOL_BACKOFF in kinds(journal) and not host.slots)
        assert not host.systemd.units and not list(host.records.path.iterdir())
        assert host.calls.stats()["pools"]["minimal"]["failures"] == 1 and not host.calls.stats()["ready"]
        # HAProxy sends no claims to a host whose weight is 0.
        assert host.calls.stats()["available"] == 0 and host.calls.free_percent() == 0
        host.wake()
        await turns()
        assert len(host.launcher.launched) == 1
        # The second failure pauses twice as long.
        clock.advance(10.5)
        host.wake()
        await until(lambda: kinds(journal).count(Event.POOL_BACKOFF) == 2 and not host.slots)
        clock.advance(10.5)
        host.wake()
        await turns()
        assert len(host.launcher.launched) == 2
        host.launcher.error = None
        clock.advance(10.5)
        host.wake()
        await host.until_states("warm")
        assert host.calls.stats()["pools"]["minimal"]["failures"] == 0 and host.calls.stats()["ready"]
        assert host.calls.free_percent() > 0


async def test_a_claim_has_a_slot_soon_after_the_cause_of_failed_starts_is_mended(tmp_path, journal, clock):
    async with Host(tmp_path, pool={"warm": 1, "starts": 4, "backoff": "60s", "claim_timeout": "600s"}) as host:
        host.launcher.error = StartFailed("nbagent-network: no response", step="network")
        await until(lambda: Event.POOL_BACKOFF in kinds(journal) and not host.slots)
        claim = asyncio.ensure_future(host.claim())
        await turns()
        host.launcher.error = None
        clock.advance(TRY_S - 0.5)
        host.wake()
        await turns()
        assert len(host.launcher.launched) == 1
        assert now() < host.supervisor.pools.next_start_s(now(), now() + 10) <= now() + 0.5
        clock.advance(1)
        host.wake()
        assert (await claim)["slot"]
        assert host.calls.stats()["pools"]["minimal"]["failures"] == 0


@pytest.mark.parametrize("error", [ValueError("x" * 200_000), OverflowError(), KeyError("fds"), AssertionError()])
async def test_an_unexpected_error_of_a_start_frees_its_place_and_is_reported(tmp_path, journal, error):
    reports = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, report: reports.append(report))
    async with Host(tmp_path, pool={"warm": 1, "starts": 1, "backoff": "10ms", "backoff_max": "10ms"}) as host:
        host.launcher.error = error
        await until(lambda: kinds(journal).count(Event.SLOT_FAILED) >= 2)
        assert reports[0]["exception"] is error
        host.launcher.error = None
        await host.until_states("warm")
    failed = next(entry for entry in journal if kinds([entry]) == [Event.SLOT_FAILED])
    assert f"unexpected error: {type(error).__name__}" in failed["MESSAGE"]


async def test_a_slot_that_cannot_be_recorded_is_ended(tmp_path, journal, monkeypatch):
    pool = {"warm": 1, "starts": 1, "backoff": "10ms", "backoff_max": "10ms"}
    async with Host(tmp_path, pool=pool) as host:
        await host.until_states("warm")
        save = host.records.save

        def full(slot):
            if slot.state is SlotState.WARM:
                raise OSError(28, "No space left on device")
            save(slot)

        monkeypatch.setattr(host.records, "save", full)
        first, = host.slots
        host.calls.release(first, "192.0.2.1")
        await until(lambda: Event.SLOT_FAILED in kinds(journal))
        monkeypatch.setattr(host.records, "save", save)
        await host.until_states("warm")
        assert first not in host.slots


async def test_a_scope_that_systemd_refuses_fails_the_start(tmp_path, journal):
    host = Host(tmp_path, pool={"warm": 1, "starts": 4, "backoff": "1h", "backoff_max": "1h"})
    host.systemd.scope_error = JobFailed("job ended as canceled")
    async with host:
        await until(lambda: Event.SLOT_FAILED in kinds(journal) and not host.slots)


async def test_a_start_that_takes_too_long_fails(tmp_path, journal):
    pool = {"warm": 1, "starts": 4, "backoff": "1h", "backoff_max": "1h"}
    async with Host(tmp_path, pool=pool, slots={"start_timeout": "10ms", "capacity": 4}) as host:
        host.launcher.hold()
        await until(lambda: Event.SLOT_FAILED in kinds(journal) and not host.slots)
        failed, = [entry for entry in journal if kinds([entry]) == [Event.SLOT_FAILED]]
        assert "not ready after 0.01 s" in failed["MESSAGE"]


async def test_an_image_that_is_replaced_ends_the_pause_of_its_pool(tmp_path, journal):
    async with Host(tmp_path, pool={"warm": 1, "starts": 4, "backoff": "1h", "backoff_max": "1h"}) as host:
        host.launcher.error = StartFailed("broken image", step="exec")
        await until(lambda: Event.POOL_BACKOFF in kinds(journal) and not host.slots)
        host.launcher.error = None
        host.store.images["minimal"] = make_image(tmp_path, digest="sha256-1")
        host.refresh_images()
        slot_id, = await host.until_states("warm")
        assert host.slots[slot_id].slot.digest == "sha256-1"


async def test_warm_slots_of_a_replaced_image_are_retired_when_new_ones_are_warm(tmp_path):
    async with Host(tmp_path) as host:
        old, = await host.until_states("warm")
        gate = host.launcher.hold()
        host.store.images["minimal"] = make_image(tmp_path, digest="sha256-1")
        host.refresh_images()
        await host.until_states("warm", "starting")
        gate.set()
        new, = await _only(host, lambda: old not in host.slots)
        assert host.slots[new].slot.digest == "sha256-1" and host.store.used == {"sha256-1"}


async def test_an_image_is_in_use_while_a_slot_runs_on_it(tmp_path, journal):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        claim = await host.claim()
        await host.until_states("claimed", "warm")
        host.store.images["minimal"] = make_image(tmp_path, digest="sha256-1")
        host.refresh_images()
        await until(lambda: "sha256-1" in {live.slot.digest for live in host.slots.values()} and len(host.slots) == 2)
        assert host.store.used == {"sha256-0", "sha256-1"}
        host.store.removed = ["sha256-0"]
        host.calls.release(claim["slot"], "192.0.2.1")
        await until(lambda: host.store.used == {"sha256-1"})
        await until(lambda: Event.IMAGE_REMOVED in kinds(journal))


async def test_an_error_of_the_images_disk_concerns_one_image_and_is_followed_by_another_try(
    tmp_path, journal, monkeypatch
):
    monkeypatch.setattr(images, "AGAIN_S", 0.02)
    host = Host(tmp_path)
    host.store.images["other"] = make_image(tmp_path, "other", "sha256-1")
    host.store.unreadable["other"] = OSError(errno.EIO, "Input/output error")
    host.store.retire_error = OSError(errno.EROFS, "Read-only file system")
    async with host:
        await until(lambda: "warm" in host.states().values())
        assert [image["name"] for image in host.calls.images()] == ["minimal"]
        await asyncio.sleep(0.1)
        # Reported once, and not at each try.
        assert kinds(journal).count(Event.IMAGE_UNREADABLE) == 1
        host.store.unreadable.clear()
        host.store.retire_error = None
        await until(lambda: len(host.calls.images()) == 2 and host.store.used == {"sha256-0", "sha256-1"})


async def test_warm_slots_of_a_removed_image_end(tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        host.store.images.clear()
        host.refresh_images()
        await host.until_states()
        assert host.calls.images() == [] and not host.calls.stats()["ready"]


async def test_a_warm_slot_that_is_too_old_is_replaced(tmp_path, clock):
    async with Host(tmp_path) as host:
        old, = await host.until_states("warm")
        clock.advance(7 * 3600)
        host.wake()
        new, = await _only(host, lambda: old not in host.slots)
        assert host.states()[new] == "warm"


async def test_a_recycled_pool_has_other_slots(tmp_path):
    async with Host(tmp_path, pool=POOL) as host:
        former = await host.until_states("warm", "warm")
        assert host.calls.recycle_pool() == {"drained": 2}
        await until(lambda: not set(former) & set(host.slots))
        await host.until_states("warm", "warm")


async def test_an_ended_slot_is_removed_at_once_from_the_router_and_then_from_systemd(tmp_path, journal):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        name = (await host.claim())["slot"]
        assert host.calls.release(name, "192.0.2.1")["state"] == "stopping"
        assert not (host.records.path / name).exists()
        assert f"nbagent-{name}.scope" in host.systemd.units
        # A second release is no error as long as the slot is known.
        assert host.calls.release(name, "192.0.2.1")["state"] == "stopping"
        await host.gone(name)
        assert host.systemd.stopped().count(f"nbagent-{name}.scope") == 1
        assert ("stop", f"nbagent-{name}.scope", False) in host.systemd.calls
        with pytest.raises(SlotNotFound):
            host.calls.release(name, "192.0.2.1")
        assert host.calls.stats()["counters"]["released"] == 1
        assert kinds(journal).count(Event.SLOT_RELEASED) == 1 == kinds(journal).count(Event.SLOT_GONE)


async def test_no_descriptor_of_an_ended_slot_is_left_open(tmp_path):
    async with Host(tmp_path, pool={"warm": 0, "starts": 4}) as host:
        for _ in range(3):
            name = (await host.claim())["slot"]
            before = set(os.listdir("/proc/self/fd"))
            host.calls.release(name, "192.0.2.1")
            await host.gone(name)
            assert len(set(os.listdir("/proc/self/fd"))) == len(before) - 2


@pytest.mark.parametrize("claimed", [False, True])
async def test_a_slot_whose_processes_end_is_removed(tmp_path, journal, claimed):
    async with Host(tmp_path) as host:
        name, = await host.until_states("warm")
        if claimed:
            await host.claim()
        host.systemd.end(f"nbagent-{name}.scope")
        await host.gone(name)
        assert Event.SLOT_DIED in kinds(journal) and host.calls.stats()["counters"]["died"] == 1
        await host.until_states("warm")


async def test_a_slot_that_systemd_cannot_stop_is_stopped_when_it_can(tmp_path, journal, monkeypatch):
    monkeypatch.setattr(slot_stopper, "STOP_PAUSE_S", 0.01)
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        name = (await host.claim())["slot"]
        host.systemd.stop_error = OSError("not connected to systemd")
        host.calls.release(name, "192.0.2.1")
        await until(lambda: kinds(journal).count(Event.SLOT_STOP_FAILED) >= 2)
        assert host.states()[name] == "stopping"
        host.systemd.stop_error = None
        await host.gone(name)


async def test_a_record_that_cannot_be_removed_is_removed_when_it_can(tmp_path, journal, monkeypatch):
    monkeypatch.setattr(slot_stopper, "STOP_PAUSE_S", 0.01)
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        name = (await host.claim())["slot"]

        def refuse(path):
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "rmdir", refuse)
            host.calls.release(name, "192.0.2.1")
            await until(lambda: Event.SLOT_STOP_FAILED in kinds(journal))
            assert host.states()[name] == "stopping"
        await host.gone(name)
        assert name not in os.listdir(host.records.path)


async def test_a_slot_ends_while_the_supervisor_has_no_descriptor_left(tmp_path, monkeypatch):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        name = (await host.claim())["slot"]

        def exhausted(*arguments, **options):
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as patch:
            for call in ("open", "listdir", "scandir"):
                patch.setattr(os, call, exhausted)
            host.calls.release(name, "192.0.2.1")
        await host.gone(name)
        assert name not in os.listdir(host.records.path)


async def test_the_supervisor_ends_although_systemd_stops_no_slot(tmp_path, journal, monkeypatch):
    monkeypatch.setattr(slot_stopper, "STOP_PAUSE_S", 0.01)
    host = Host(tmp_path)
    await host.start()
    await host.until_states("warm")
    name = (await host.claim())["slot"]
    host.systemd.stop_error = OSError("not connected to systemd")
    host.calls.release(name, "192.0.2.1")
    await until(lambda: Event.SLOT_STOP_FAILED in kinds(journal))
    await asyncio.wait_for(host.stop(), 10)
    host.systemd.close()


async def test_the_supervisors_end_leaves_warm_and_claimed_slots_and_ends_incomplete_ones(tmp_path, journal):
    host = Host(tmp_path, pool=POOL)
    await host.start()
    await host.until_states("warm", "warm")
    claim = await host.claim()
    gate = host.launcher.hold()
    await host.until_states("claimed", "warm", "starting")
    await until(lambda: len(host.launcher.launched) == 3)
    started, = [name for name, state in host.states().items() if state == "starting"]
    await host.stop()
    assert set(host.states()) >= {claim["slot"]} and len(host.systemd.units) == 2
    assert f"nbagent-{started}.scope" in host.systemd.stopped()
    assert sorted(path.name for path in host.records.path.iterdir()) == sorted(
        name for name in host.states() if name != started)
    assert not gate.is_set()
    host.systemd.close()


async def test_a_claim_that_waits_when_the_supervisor_ends_does_not_hang(tmp_path):
    host = Host(tmp_path, pool={"warm": 0, "starts": 4})
    await host.start()
    host.launcher.hold()
    claiming = asyncio.ensure_future(host.claim())
    await host.until_states("starting")
    claiming.cancel()
    await host.stop()
    await asyncio.gather(claiming, return_exceptions=True)
    assert claiming.cancelled() and not host.systemd.units
    host.systemd.close()


# Reloads


async def test_after_a_reload_with_another_label_slots_keep_their_ids_and_new_ones_get_the_label(tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        claim = await host.claim("k1")
        old = claim["slot"]
        assert old.startswith("c07-")
        host.reload(host={"label": "d08", "memory_reserve": "1M"}, pool={"warm": 3, "starts": 4})
        await host.until_states("claimed", "warm", "warm", "warm")
        labels = {name.partition("-")[0] for name in host.slots}
        assert labels == {"c07", "d08"} and host.calls.stats()["label"] == "d08"
        assert host.calls.slot(old)["slot"] == old
        assert (await host.calls.update(old, {"ttl": 60}, "192.0.2.1"))["slot"] == old
        assert (await host.claim("k1"))["slot"] == old
        assert host.calls.release(old, "192.0.2.1")["slot"] == old


async def test_a_changed_hostname_is_the_label_of_new_slots_where_it_is_automatic(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "one.example.org")
    async with Host(tmp_path, host={"memory_reserve": "1M"}) as host:
        first, = await host.until_states("warm")
        monkeypatch.setattr("socket.gethostname", lambda: "two.example.org")
        assert (await host.claim())["slot"] == first
        await host.until_states("claimed", "warm")
        assert {name.partition("-")[0] for name in host.slots} == {"one", "two"}
        assert host.calls.stats()["label"] == "two" and host.calls.slot(first)


async def test_a_reload_changes_the_pools_size(tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        host.reload(pool={"warm": 3, "starts": 4})
        await host.until_states("warm", "warm", "warm")
        host.reload(pool={"warm": 0, "starts": 4})
        await host.until_states()


async def test_a_reload_that_allows_a_network_replaces_warm_slots_without_an_interface(tmp_path):
    async with Host(tmp_path) as host:
        old, = await host.until_states("warm")
        host.reload(network={"allow": ["none", "internet"]})
        new, = await _only(host, lambda: old not in host.slots)
        await host.until_states("warm")
        assert host.slots[new].slot.addresses and "set_up" in host.network.calls


async def test_a_network_that_cannot_be_set_up_is_an_event_and_no_end(tmp_path, journal):
    async with Host(tmp_path) as host:
        host.network.errors["set_up"] = StartFailed("nft: EPERM", step="network")
        host.reload(network={"allow": ["none", "internet"]})
        await until(lambda: Event.NETWORK_FAILED in kinds(journal))


# Updates and documents


async def test_an_update_changes_limits_and_life_of_a_claimed_slot_alone(tmp_path, journal):
    async with Host(tmp_path) as host:
        warm, = await host.until_states("warm")
        with pytest.raises(IllegalMove, match="only a claimed slot"):
            await host.calls.update(warm, {"ttl": 60}, "192.0.2.1")
        name = (await host.claim())["slot"]
        document = await host.calls.update(name, {"memory": "512M", "ttl": 60}, "192.0.2.1")
        assert document["limits"]["memory_bytes"] == 512 << 20
        assert host.systemd.limits[f"nbagent-{name}.scope"].memory_bytes == 512 << 20
        assert 59 <= host.slots[name].slot.ttl_s <= 61
        with pytest.raises(InvalidField, match="ttl"):
            await host.calls.update(name, {"ttl": "25h"}, "192.0.2.1")
        with pytest.raises(InvalidField):
            await host.calls.update(name, {"image": "minimal"}, "192.0.2.1")
        host.systemd.limits_error = OSError("no such unit")
        with pytest.raises(IllegalMove, match="no such unit"):
            await host.calls.update(name, {"memory": "256M"}, "192.0.2.1")
        assert host.slots[name].slot.limits.memory_bytes == 512 << 20
        assert dict(host.records.load())[name].limits.memory_bytes == 512 << 20
        assert Event.SLOT_UPDATED in kinds(journal)


async def test_a_slot_that_is_released_during_its_update_ends(tmp_path, monkeypatch):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        name = (await host.claim())["slot"]

        async def release(scope, limits):
            host.calls.release(name, "192.0.2.1")

        monkeypatch.setattr(host.systemd, "set_limits", release)
        document = await host.calls.update(name, {"memory": "512M"}, "192.0.2.1")
        assert document["state"] == "stopping"
        await host.gone(name)


async def test_two_updates_at_a_time_are_both_made(tmp_path, monkeypatch):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        name = (await host.claim())["slot"]

        async def later(scope, limits):
            await asyncio.sleep(0.01)
            host.systemd.limits[scope] = limits

        monkeypatch.setattr(host.systemd, "set_limits", later)
        await asyncio.gather(
            host.calls.update(name, {"memory": "512M"}, "192.0.2.1"),
            host.calls.update(name, {"cpu_weight": 7}, "192.0.2.1"),
        )
        for limits in (host.slots[name].slot.limits, host.systemd.limits[f"nbagent-{name}.scope"]):
            assert (limits.memory_bytes, limits.cpu_weight) == (512 << 20, 7)


async def test_an_update_does_not_undo_what_guards_have_lowered_and_their_end_restores_the_update(tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        name = (await host.claim(memory="1G"))["slot"]
        live, guards = host.slots[name], host.supervisor.memory_guard._limits
        await guards.lower(live, memory_bytes=256 << 20)
        await guards.lower(live, cpu_part=0.05)
        document = await host.calls.update(name, {"memory": "2G", "cpu_weight": 400}, "192.0.2.1")
        in_force = host.systemd.limits[f"nbagent-{name}.scope"]
        assert (in_force.memory_bytes, in_force.cpu_weight) == (256 << 20, 20)
        assert document["limits_in_force"] == in_force.document()
        assert (document["limits"]["memory_bytes"], document["limits"]["cpu_weight"]) == (2 << 30, 400)
        await guards.lower(live, memory_bytes=None)
        await guards.lower(live, cpu_part=1.0)
        recorded = dict(host.records.load())[name].limits
        assert host.systemd.limits[f"nbagent-{name}.scope"] == live.slot.limits == recorded


async def test_a_change_of_limits_that_systemd_makes_after_the_refusal_is_taken_back(tmp_path, monkeypatch):
    monkeypatch.setattr(scope_limits, "RENEW_PAUSE_S", 0.02)
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        name = (await host.claim(memory="1G", cpu_weight=50))["slot"]
        scope, own, tries = f"nbagent-{name}.scope", host.slots[name].slot.limits, []

        async def late(unit, limits):
            tries.append(limits)
            if len(tries) < 3:
                # PID 1 has the message, and carries it out when it runs again.
                asyncio.get_running_loop().call_later(0.01, host.systemd.limits.__setitem__, unit, limits)
                raise TimeoutError("nbagent-units: set_limits: no response within 25 s")
            host.systemd.limits[unit] = limits

        monkeypatch.setattr(host.systemd, "set_limits", late)
        with pytest.raises(IllegalMove, match="no response"):
            await host.calls.update(name, {"memory": "64M", "cpu_weight": 7}, "192.0.2.1")
        await until(lambda: host.systemd.limits[scope].memory_bytes == 64 << 20)
        await until(lambda: host.systemd.limits[scope] == own)
        assert len(tries) <= 3 and host.slots[name].slot.limits == own == dict(host.records.load())[name].limits
        await asyncio.sleep(0.1)
        assert tries[1:] == [own, own]


async def test_an_update_that_cannot_be_recorded_changes_nothing(tmp_path, monkeypatch):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        name = (await host.claim())["slot"]
        before = host.slots[name].slot

        def full(slot):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(host.records, "save", full)
        with pytest.raises(RecordFailed, match="No space left on device"):
            await host.calls.update(name, {"memory": "512M", "ttl": 60}, "192.0.2.1")
        assert host.slots[name].slot == before
        assert host.systemd.limits[before.scope].memory_bytes == before.limits.memory_bytes


async def test_documents_list_all_slots_and_show_no_token(tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        claim = await host.claim()
        await host.until_states("claimed", "warm")
        documents = host.calls.list_slots()
        assert sorted(document["state"] for document in documents) == ["claimed", "warm"]
        assert claim["token"] not in str(documents)
        assert host.calls.slot(claim["slot"])["slot"] == claim["slot"]
        with pytest.raises(SlotNotFound):
            host.calls.slot("c07-absent")


async def test_stats_add_up(tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        await host.claim(ttl=60)
        await host.until_states("claimed", "warm")
        stats = host.calls.stats()
        assert (stats["capacity"], stats["claimed"], stats["warm"], stats["available"]) == (4, 1, 1, 3)
        assert host.calls.free_percent() == stats["free_percent"] == 75
        assert 50 <= stats["next_end_s"] <= 60
        assert stats["pools"] == {"minimal": {"wanted": 1, "warm": 1, "starting": 0, "failures": 0, "paused_s": 0}}
        assert host.calls.images() == [
            {"name": "minimal", "digest": "sha256-0", "launch": "exec", "launch_now": "exec",
             "launch_reason": 'launch = "exec" in the manifest', "warm": 1, "wanted": 1, "default": True}]


async def test_a_claimed_slot_is_culled_when_its_time_is_up(tmp_path, clock, journal):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        name = (await host.claim(ttl=60))["slot"]
        clock.advance(90)
        host.wake()
        await host.gone(name)
        assert Event.SLOT_CULLED in kinds(journal)
        assert host.calls.stats()["counters"]["culled_age"] == 1


async def _only(host, condition):
    """The ids of the slots once a condition holds and no slot is ending or starting."""
    await until(lambda: condition() and set(host.states().values()) == {"warm"}, host.states)
    assert all(live.slot.state is SlotState.WARM for live in host.slots.values())
    return list(host.slots)
