# SPDX-License-Identifier: BSD-3-Clause
"""A supervisor that starts: it adopts the warm and claimed slots that run, and removes all that is incomplete."""

from __future__ import annotations

import contextlib
import json
import os
import signal

import pytest
from fakes import Host, kinds, until

from nbagent.core.errors import IdempotencyMismatch
from nbagent.core.events import Event
from nbagent.core.model import Limits, Slot, SlotState, now
from nbagent.launch import requests
from nbagent.linux import cgroup
from nbagent.policy.lending import LENT_S
from nbagent.sandbox.spec import ACTIVITY_FD
from nbagent.supervisor import launch_service
from nbagent.supervisor.systemd import INFINITY
from nbagent.wire import activity
from nbagent.wire.failure import Failure, StepFailed


class Processes:
    """Real processes that hold an activity page, as a slot's init does, and the unit of each."""

    def __init__(self):
        self.units = {}

    def start(self, unit, *, page=True):
        """Starts a process in `unit`; returns its pid."""
        fd = activity.create()
        actions = [(os.POSIX_SPAWN_DUP2, fd, ACTIVITY_FD)] if page else []
        pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], {}, file_actions=actions)
        os.close(fd)
        self.units[pid] = unit
        return pid

    def end(self, pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        del self.units[pid]


@pytest.fixture
def processes(monkeypatch):
    processes = Processes()
    monkeypatch.setattr(cgroup, "unit_of_process", lambda pid: processes.units.get(pid, ""))

    async def open_slot(scope, pid):
        try:
            return requests.open_slot(scope, pid)
        except OSError as error:
            raise StepFailed(Failure.of(error, "launch")) from error

    monkeypatch.setattr(launch_service, "open_slot", open_slot)
    yield processes
    for pid in list(processes.units):
        processes.end(pid)


def record(host, name, pid, state=SlotState.WARM, **changes):
    """Writes a slot's file as a former supervisor has left it; returns the slot."""
    claimed = {"claimed_s": now(), "ttl_s": 600.0} if state is SlotState.CLAIMED else {}
    changes = claimed | changes
    slot = Slot(
        id=name, image="minimal", digest="sha256-0", id_base=1 << 20, uid=2001, state=state,
        limits=Limits(1 << 30, 100, None, 256), token="secret", created_s=now(), ends_s=now() + 10**6, pid=pid,
        **changes,
    )
    (host.records.path / name).mkdir()
    host.records.save(slot)
    host.systemd.units[slot.scope] = None
    return slot


def removed(journal):
    return {e["NBAGENT_SLOT"]: e["NBAGENT_TEXT"] for e in journal if kinds([e]) == [Event.SLOT_REMOVED]}


async def test_warm_and_claimed_slots_are_adopted(tmp_path, processes, journal):
    host = Host(tmp_path)
    for name, state in (("c07-warm", SlotState.WARM), ("c07-claimed", SlotState.CLAIMED)):
        record(host, name, processes.start(f"nbagent-{name}.scope"), state)
    async with host:
        assert host.states() == {"c07-warm": "warm", "c07-claimed": "claimed"}
        assert kinds(journal).count(Event.SLOT_ADOPTED) == 2 and not removed(journal)
        assert (await host.claim())["slot"] == "c07-warm"


@pytest.mark.parametrize(("in_scope", "event", "changes"), [
    (Limits(1 << 30, 100, None, 256), None, ""),
    (Limits(64 << 20, 100, None, 256), Event.SLOT_LIMITS_RESTORED, f"memory_bytes from {64 << 20} to {1 << 30}"),
    (Limits(1 << 30, 5, None, 256), Event.SLOT_LIMITS_RESTORED, "cpu_weight from 5 to 100"),
    (Limits(1 << 30, 200, None, 256), Event.SLOT_LIMITS_MENDED, "cpu_weight from 200 to 100"),
    (Limits(2 << 30, 100, None, 256), Event.SLOT_LIMITS_MENDED, f"memory_bytes from {2 << 30} to {1 << 30}"),
    (Limits(1 << 29, 5, None, 8), Event.SLOT_LIMITS_MENDED, "tasks from 8 to 256"),
    (Limits(INFINITY, 0, None, INFINITY), Event.SLOT_LIMITS_MENDED, "cpu_weight from 0 to 100"),
    (
        Limits(2 << 30, 50, 0.5, 8), Event.SLOT_LIMITS_MENDED,
        "cpu_weight from 50 to 100, cpu_quota from 0.5 to None, tasks from 8 to 256",
    ),
])
async def test_an_adopted_scope_has_the_limits_of_its_record(tmp_path, processes, journal, in_scope, event, changes):
    host = Host(tmp_path)
    slot = record(host, "c07-warm", processes.start("nbagent-c07-warm.scope"))
    host.systemd.limits[slot.scope] = in_scope
    async with host:
        assert host.systemd.limits[slot.scope] == slot.limits
        mends = (Event.SLOT_LIMITS_MENDED, Event.SLOT_LIMITS_RESTORED)
        mended = [entry for entry in journal if kinds([entry])[0] in mends]
        assert kinds(mended) == ([] if event is None else [event])
        assert all(changes in entry["NBAGENT_TEXT"] for entry in mended)


async def test_a_key_survives_a_restart(tmp_path, processes):
    first = Host(tmp_path)
    await first.start()
    await first.until_states("warm")
    claim = await first.claim("k1", ttl=600)
    await first.stop()
    first.systemd.close()
    host = Host(tmp_path)
    slot = first.slots[claim["slot"]].slot
    pid = processes.start(slot.scope)
    for directory in list(host.records.path.iterdir()):
        host.records.remove(directory.name)
    (host.records.path / slot.id).mkdir()
    host.records.save(Slot.restore(slot.save() | {"pid": pid}))
    host.systemd.units[slot.scope] = None
    async with host:
        again = await host.claim("k1", ttl=600)
        assert (again["slot"], again["token"]) == (claim["slot"], claim["token"])
        with pytest.raises(IdempotencyMismatch):
            await host.claim("k1", ttl=601)
        host.calls.release(claim["slot"], "192.0.2.1")
        processes.end(pid)
        assert (await host.claim("k1", ttl=601))["slot"] != claim["slot"]


async def test_a_lent_slot_outlives_the_supervisor_and_is_kept_by_the_next_one(tmp_path, processes):
    host = Host(tmp_path)
    pid = processes.start("nbagent-c07-lent.scope")
    slot = record(host, "c07-lent", pid, SlotState.CLAIMED, lent_to="192.0.2.7")
    async with host:
        assert host.slots["c07-lent"].slot.lent_to == "192.0.2.7"
        host.calls.keep("c07-lent", slot.token, "192.0.2.7")
        assert host.slots["c07-lent"].slot.lent_to is None


@pytest.mark.parametrize("left_s", [0.2, -1.0], ids=["it has time left", "its time is over"])
async def test_an_adopted_lent_slot_ends_at_the_time_of_its_record(tmp_path, processes, journal, left_s):
    host = Host(tmp_path)
    pid, lent_s = processes.start("nbagent-c07-lent.scope"), now() + left_s - LENT_S
    slot = record(host, "c07-lent", pid, SlotState.CLAIMED, lent_to="192.0.2.7", claimed_s=lent_s, ttl_s=LENT_S)
    async with host:
        if left_s > 0:
            assert host.states()["c07-lent"] == "claimed"
        await until(lambda: host.states()["c07-lent"] == "stopping")
        assert now() >= slot.expires_s
        processes.end(pid)
        await host.gone("c07-lent")
        assert Event.SLOT_RETURNED in kinds(journal) and Event.SLOT_CULLED not in kinds(journal)


async def test_an_adopted_slot_whose_process_ends_is_removed(tmp_path, processes, journal):
    host = Host(tmp_path)
    pid = processes.start("nbagent-c07-claimed.scope")
    record(host, "c07-claimed", pid, SlotState.CLAIMED)
    async with host:
        processes.end(pid)
        await host.gone("c07-claimed")
        assert Event.SLOT_DIED in kinds(journal)


@pytest.mark.parametrize("state", [SlotState.STARTING, SlotState.PREPARING, SlotState.STOPPING])
async def test_an_incomplete_slot_is_removed(tmp_path, processes, journal, state):
    host = Host(tmp_path, pool={"warm": 0})
    record(host, "c07-x", processes.start("nbagent-c07-x.scope"), state)
    async with host:
        assert not host.slots and list(removed(journal)) == ["c07-x"]
        assert ("stop", "nbagent-c07-x.scope", True) in host.systemd.calls
        assert not (host.records.path / "c07-x").exists()


async def test_a_slot_of_another_units_process_is_removed(tmp_path, processes, journal):
    host = Host(tmp_path, pool={"warm": 0})
    record(host, "c07-x", processes.start("ssh.service"))
    async with host:
        assert not host.slots and list(removed(journal)) == ["c07-x"]


@pytest.mark.parametrize("pid", [None, 2**22 + 1])
async def test_a_slot_of_a_process_that_ended_is_removed(tmp_path, processes, journal, pid):
    host = Host(tmp_path, pool={"warm": 0})
    record(host, "c07-x", pid)
    async with host:
        assert not host.slots and list(removed(journal)) == ["c07-x"]


async def test_a_slot_whose_scope_ended_is_removed(tmp_path, processes, journal):
    host = Host(tmp_path, pool={"warm": 0})
    slot = record(host, "c07-x", processes.start("nbagent-c07-x.scope"))
    del host.systemd.units[slot.scope]
    async with host:
        assert not host.slots and list(removed(journal)) == ["c07-x"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "c07-x"}', json.dumps({"id": "c07-other", "state": "warm"})])
async def test_a_slot_with_a_broken_file_is_removed(tmp_path, processes, journal, text):
    host = Host(tmp_path, pool={"warm": 0})
    (host.records.path / "c07-x").mkdir()
    (host.records.path / "c07-x" / "slot.json").write_text(text)
    async with host:
        assert not host.slots and not list(host.records.path.iterdir())
        assert removed(journal) == {"c07-x": removed(journal)["c07-x"]}


async def test_a_scope_without_a_file_is_stopped(tmp_path, journal):
    host = Host(tmp_path, pool={"warm": 0})
    host.systemd.units["nbagent-c07-x.scope"] = None
    async with host:
        assert not host.systemd.units and list(removed(journal)) == ["c07-x"]


async def test_interfaces_that_no_slot_has_are_removed(tmp_path, processes):
    host = Host(tmp_path, pool={"warm": 0}, network={"allow": ["none", "internet"]})
    record(host, "c07-x", processes.start("nbagent-c07-x.scope"), SlotState.CLAIMED, addresses=("198.18.0.9",))
    host.network.interfaces = {"c07-x": "open", "c07-former": "open"}
    async with host:
        await until(lambda: host.network.interfaces == {"c07-x": "open"})


async def test_the_swap_that_a_former_supervisor_allowed_is_taken_back(tmp_path, processes, monkeypatch):
    monkeypatch.setattr(cgroup.Cgroup, "may_swap", lambda group: True)
    host = Host(tmp_path)
    record(host, "c07-x", processes.start("nbagent-c07-x.scope"))
    async with host:
        assert ("set_swap", "nbagent-c07-x.scope", 0) in host.systemd.calls
