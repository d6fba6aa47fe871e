# SPDX-License-Identifier: BSD-3-Clause
"""Lent slots over fakes: kept by the click, given back, or ended after a minute; counted by client; recorded."""

from __future__ import annotations

import json

import pytest
from fakes import Host, kinds, until

from nbagent.core.errors import Full, InvalidField, RecordFailed, SlotNotFound
from nbagent.core.events import Event
from nbagent.core.model import Slot, SlotState
from nbagent.policy import lending
from nbagent.wire.operations import own_key

POOL = {"pool": {"warm": 8, "starts": 8}, "slots": {"capacity": 100}}
CLIENT = "192.0.2.7"


async def lend(host, path="lab/tree/a.ipynb", client=CLIENT):
    return await host.calls.lend({"path": path} if path else {}, own_key(), client)


async def test_a_lent_slot_is_claimed_by_keep_and_lives_from_then_on(tmp_path, journal):
    async with Host(tmp_path, **POOL) as host:
        await host.until_states(*["warm"] * 8)
        lent = await lend(host)
        live = host.slots[lent["slot"]]
        assert (live.slot.state, live.slot.ttl_s, live.slot.lent_to) == (SlotState.CLAIMED, lending.LENT_S, CLIENT)
        assert lent["path"] == f"/user/{lent['slot']}/lab/tree/a.ipynb"
        await until(lambda: Event.SLOT_LENT in kinds(journal))
        assert Event.SLOT_CLAIMED not in kinds(journal)
        record = host.records.path / lent["slot"] / "slot.json"
        assert Slot.restore(json.loads(record.read_text())).lent_to == CLIENT
        for _ in range(2):
            kept = host.calls.keep(lent["slot"], lent["token"], CLIENT)
            assert kept["slot"] == lent["slot"]
        assert live.slot.lent_to is None and live.slot.ttl_s == host.config.value.slots.ttl
        assert "lent_to" not in json.loads(record.read_text())
        assert kinds(journal).count(Event.SLOT_CLAIMED) == 1
        counters = host.calls.stats()["counters"]
        assert (counters["lent"], counters["lent_kept"], counters["claims"]) == (1, 1, 1)
        host.calls.give_back(lent["slot"], lent["token"], CLIENT)
        assert live.slot.state is SlotState.CLAIMED


async def test_a_lent_slot_ends_when_it_is_given_back_or_after_a_minute(tmp_path, journal, monkeypatch):
    async with Host(tmp_path, **POOL) as host:
        await host.until_states(*["warm"] * 8)
        first = await lend(host)
        host.calls.give_back(first["slot"], first["token"], CLIENT)
        monkeypatch.setattr(lending, "LENT_S", 0.05)
        second = await lend(host)
        await until(lambda: second["slot"] not in host.slots and first["slot"] not in host.slots)
        assert kinds(journal).count(Event.SLOT_RETURNED) == 2
        with pytest.raises(SlotNotFound):
            host.calls.keep(second["slot"], second["token"], CLIENT)


async def test_only_the_token_keeps_or_returns_a_slot(tmp_path):
    async with Host(tmp_path, **POOL) as host:
        await host.until_states(*["warm"] * 8)
        lent = await lend(host)
        for act in (host.calls.keep, host.calls.give_back):
            for slot, token in ((lent["slot"], "x"), (lent["slot"], "ä"), ("x-000000000000", lent["token"])):
                with pytest.raises(SlotNotFound):
                    act(slot, token, CLIENT)
        assert host.slots[lent["slot"]].slot.lent_to == CLIENT


async def test_a_client_has_few_lent_slots_and_others_get_theirs(tmp_path):
    async with Host(tmp_path, **POOL) as host:
        for number in range(lending.CLIENT_MAX):
            await until(lambda: list(host.states().values()).count("warm") == 8)
            await lend(host, client=f"2001:db8::{number}")
        await until(lambda: list(host.states().values()).count("warm") == 8)
        with pytest.raises(Full, match="to this client"):
            await lend(host, client="2001:db8::ffff")
        await lend(host, client="2001:db8:0:1::1")


async def test_a_lending_with_a_wrong_path_takes_no_slot(tmp_path):
    async with Host(tmp_path, **POOL) as host:
        await host.until_states(*["warm"] * 8)
        with pytest.raises(InvalidField):
            await lend(host, path="../x")
        assert list(host.states().values()).count("warm") == 8


async def test_a_slot_stays_lent_when_its_record_cannot_be_written(tmp_path, monkeypatch):
    async with Host(tmp_path, **POOL) as host:
        await host.until_states(*["warm"] * 8)
        lent = await lend(host)

        def fail(slot):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(host.records, "save", fail)
            with pytest.raises(RecordFailed):
                host.calls.keep(lent["slot"], lent["token"], CLIENT)
        assert host.slots[lent["slot"]].slot.lent_to == CLIENT
