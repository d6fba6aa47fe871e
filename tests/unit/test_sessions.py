# SPDX-License-Identifier: BSD-3-Clause
"""The file of a session: its end, and the reason after the end."""

from __future__ import annotations

import json
import stat
import time

import pytest
from fakes import Host, kinds, turns

from nbagent.core.events import Event
from nbagent.supervisor import sessions as sessions_of
from nbagent.supervisor.sessions import Sessions


def read(host, slot):
    return json.loads((host.records.path.parent / "sessions" / f"{slot}.json").read_text())


async def test_a_claimed_slot_has_its_end_and_an_update_changes_it(tmp_path):
    async with Host(tmp_path) as host:
        warm, = await host.until_states("warm")
        assert not list((tmp_path / "sessions").iterdir())
        claim = await host.claim(ttl="1h")
        await turns()
        assert claim["slot"] == warm
        assert read(host, warm) == {
            "slot": warm, "state": "claimed", "claimed_at": claim["claimed_at"], "expires_at": claim["expires_at"],
        }
        updated = await host.calls.update(warm, {"ttl": "2h"}, "192.0.2.1")
        assert read(host, warm)["expires_at"] == updated["expires_at"] != claim["expires_at"]
        mode = (tmp_path / "sessions" / f"{warm}.json").stat().st_mode
        assert stat.S_IMODE(mode) == 0o640


async def test_an_ended_slot_has_the_reason_without_the_callers_address(tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        slot = (await host.claim())["slot"]
        await turns()
        host.calls.release(slot, "192.0.2.8")
        await host.gone(slot)
        found = read(host, slot)
        assert found["state"] == "ended" and found["reason"] == "released by the service that started it"
        assert "192.0.2.8" not in json.dumps(found) and found["ended_at"]


async def test_at_a_shutdown_the_sessions_of_claimed_slots_end_with_the_reason(tmp_path):
    async with Host(tmp_path, pool={"warm": 2}) as host:
        await host.until_states("warm", "warm")
        slot = (await host.claim())["slot"]
        await turns()
        host.supervisor.sessions.host_stops(live.slot for live in host.supervisor.slots.values())
        assert [file.stem for file in (tmp_path / "sessions").iterdir()] == [slot]
        assert (read(host, slot)["state"], read(host, slot)["reason"]) == ("ended", "its host shuts down")
        host.calls.release(slot, "192.0.2.8")
        await host.gone(slot)
        assert read(host, slot)["reason"] == "its host shuts down"


@pytest.mark.parametrize(("host_stops", "event", "reason"), [
    (False, Event.SLOT_DIED, "its processes ended"), (True, Event.SLOT_CULLED, "its host shuts down"),
])
async def test_a_slot_that_a_shutdown_ends_before_the_supervisor_has_the_reason(
    tmp_path, journal, host_stops, event, reason
):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        slot = (await host.claim())["slot"]
        await turns()
        host.systemd.host_stops = host_stops
        host.systemd.end(f"nbagent-{slot}.scope")
        await host.gone(slot)
        assert read(host, slot)["reason"] == reason and event in kinds(journal)


async def test_a_slot_that_ended_while_no_supervisor_ran_is_ended(tmp_path):
    sessions = Sessions(tmp_path)
    sessions.open({})
    (tmp_path / "h-1.json").write_text('{"state": "claimed"}')
    (tmp_path / "h-2.json").write_text("broken")
    Sessions(tmp_path).open({})
    for name in ("h-1", "h-2"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["reason"] == sessions_of.LOST


def test_only_the_last_ended_sessions_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions_of, "ENDED_MAX", 3)
    sessions = Sessions(tmp_path)
    sessions.open({})
    for number in range(5):
        sessions._note_end(f"h-{number}", "idle for 60 s")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["h-2.json", "h-3.json", "h-4.json"]
    later = Sessions(tmp_path)
    later.open({})
    later._note_end("h-5", "idle for 60 s")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_cannot_be_written_is_left_out(tmp_path):
    sessions = Sessions(tmp_path / "sessions")
    sessions.open({})
    (tmp_path / "sessions").rmdir()
    sessions._note_end("h-1", "idle for 60 s")


async def test_a_step_of_the_wall_clock_moves_the_end_that_the_page_reads(tmp_path, monkeypatch):
    """A host may boot with a wrong clock, which is set when the network is up."""
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        claim = await host.claim(ttl="1h")
        await turns()
        slots = [live.slot for live in host.supervisor.slots.values()]
        host.supervisor.sessions.review(slots)
        assert read(host, claim["slot"])["expires_at"] == claim["expires_at"]
        wall_s = time.time
        monkeypatch.setattr(time, "time", lambda: wall_s() + 7200)
        host.supervisor.sessions.review(slots)
        listed = host.calls.slot(claim["slot"])
        assert read(host, claim["slot"])["expires_at"] == listed["expires_at"] != claim["expires_at"]
        assert read(host, claim["slot"])["state"] == "claimed"
