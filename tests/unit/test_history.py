# SPDX-License-Identifier: BSD-3-Clause
"""`nbagent history`, of entries that the real supervisor writes."""

from __future__ import annotations

import datetime
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from fakes import Host, turns

from nbagent import cli
from nbagent.cli import history

NOW = datetime.datetime(2026, 11, 28, 12, 0, tzinfo=datetime.UTC)
THIS_BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
FORMER_BOOT = "0123456789abcdef" * 2


class Reader:
    """The journal with these entries, as systemd.journal.Reader returns them."""

    entries: ClassVar[list[dict[str, str]]] = []

    def __init__(self) -> None:
        self.matches: dict[str, str] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add_match(self, **fields: str) -> None:
        self.matches |= fields

    def seek_realtime(self, at_s: float) -> None:
        # sd_journal_seek_realtime_usec(3) has an unsigned number.
        assert 0 <= at_s * 1e6 < 1 << 64

    def seek_tail(self) -> None:
        pass

    def get_previous(self) -> dict[str, object]:
        return [*self][-1]

    def __iter__(self) -> Iterator[dict[str, object]]:
        for number, entry in enumerate(self.entries):
            fields = {"_SYSTEMD_UNIT": "nbagent.service", "_BOOT_ID": THIS_BOOT, **entry}
            if all(fields.get(name) == value for name, value in self.matches.items()):
                at, ids = NOW + datetime.timedelta(seconds=number), {"MESSAGE_ID", "_BOOT_ID"} & fields.keys()
                yield {**fields, **{name: uuid.UUID(fields[name]) for name in ids}, "__REALTIME_TIMESTAMP": at}


@pytest.fixture
def entries(journal, monkeypatch):
    from systemd import journal as library

    monkeypatch.setattr(library, "Reader", Reader)
    monkeypatch.setattr(Reader, "entries", journal)
    return journal


async def release(tmp_path):
    """A slot that was claimed, changed and released."""
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        slot = (await host.claim(memory="2G", cpu_quota="50%"))["slot"]
        await turns()
        await host.calls.update(slot, {"memory": "1G"}, "192.0.2.7")
        host.calls.release(slot, "192.0.2.8")
        await host.gone(slot)
        return slot


async def test_a_slots_history_has_who_did_what_with_which_limits(entries, tmp_path):
    released = await release(tmp_path)
    found = history.of_slot(released).document()
    assert found["client"] == "192.0.2.1" and found["image"] == "minimal" and found["network"] == "none"
    assert found["limits"] == {"memory_bytes": 2 << 30, "cpu_weight": 100, "cpu_quota": 0.5, "tasks": 256}
    assert [(change["client"], change["text"]) for change in found["changes"]] == [("192.0.2.7", "memory=1G")]
    assert found["end"] == "released by 192.0.2.8"
    assert found["cpu_s"] == 2 and found["oom_kills"] == 0 and found["peak_bytes"] == 123 << 20
    names = [event["event"] for event in found["events"]]
    assert names == ["slot_starting", "slot_warm", "slot_claimed", "slot_updated", "slot_released", "slot_gone"]


async def test_the_history_of_a_time_is_a_table_of_claimed_slots(entries, tmp_path, capsys):
    released = await release(tmp_path)
    cli.main(["history", "--since", "1h"])
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["SLOT", "IMAGE", "CLAIMED", "CLIENT"]
    assert line.startswith(released) and line.endswith("released by 192.0.2.8") and "123M" in line
    cli.main(["history", "--since", "1h", "--json"])
    assert [one["slot"] for one in json.loads(capsys.readouterr().out)] == [released]
    cli.main(["history", "--since", "1h", "--json", "--all"])
    assert len(json.loads(capsys.readouterr().out)) == 2


async def test_a_slot_that_died_out_of_memory(entries, tmp_path):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        slot = (await host.claim())["slot"]
        (tmp_path / "cgroup" / "memory.events").write_text("oom 1\noom_kill 3\n")
        host.systemd.end(f"nbagent-{slot}.scope")
        await host.gone(slot)
    found = history.of_slot(slot)
    assert found.oom_kills == 3 and found.end == "ended unexpectedly: its processes ended"


async def test_entries_of_other_programs_are_not_read(entries, tmp_path):
    released = await release(tmp_path)
    entries.append({**entries[-1], "_SYSTEMD_UNIT": "user@1000.service", "NBAGENT_CPU_S": "999"})
    assert history.of_slot(released).cpu_s == 2


async def test_a_slot_of_a_former_boot_has_ended_with_its_host(entries, tmp_path, capsys):
    async with Host(tmp_path) as host:
        await host.until_states("warm")
        slot = (await host.claim())["slot"]
        await turns()
    claimed = len(entries)
    cli.main(["history", "--since", "1h"])
    assert capsys.readouterr().out.splitlines()[1].endswith(" runs")
    for entry in entries:
        entry["_BOOT_ID"] = FORMER_BOOT
    # The last entry of that boot, of another program.
    entries.append({"_SYSTEMD_UNIT": "cron.service", "_BOOT_ID": FORMER_BOOT, "MESSAGE_ID": "0" * 32})
    entries.append({"_SYSTEMD_UNIT": "cron.service", "MESSAGE_ID": "0" * 32})
    found = history.of_slot(slot)
    assert found.end == history.HOST_ENDED and found.ended_at == NOW + datetime.timedelta(seconds=claimed)
    cli.main(["history", "--since", "1h"])
    assert capsys.readouterr().out.splitlines()[1].endswith(history.HOST_ENDED)


@pytest.mark.parametrize("since", ["30000d", "9999999999d", "0s"])
async def test_a_time_before_all_clocks_is_the_begin_of_the_journal(entries, tmp_path, capsys, since):
    released = await release(tmp_path)
    cli.main(["history", "--since", since, "--json"])
    assert [one["slot"] for one in json.loads(capsys.readouterr().out)] == [released]


@pytest.mark.parametrize(("arguments", "status"), [
    (["c07-000000000000"], 3), (["c07-\udcff"], 3), ([], 2),
    (["--since", "yesterday"], 2), (["c07-000000000000", "--since", "1h"], 2),
])
def test_an_unknown_slot_and_wrong_usage(entries, capsys, arguments, status):
    with pytest.raises(SystemExit) as end:
        cli.main(["history", *arguments])
    assert end.value.code == status and capsys.readouterr().err
