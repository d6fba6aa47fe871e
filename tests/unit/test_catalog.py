# SPDX-License-Identifier: BSD-3-Clause
"""packaging/nbagent.catalog has an entry for each event of nbagent.core.events."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nbagent.core.events import Event, entry

CATALOG = Path(__file__).resolve().parents[2] / "packaging/nbagent.catalog"
FIELDS = re.compile(r"%\((\w+)\)s")
NAMES = re.compile(r"@([A-Z0-9_]+)@")


def _entries() -> dict[str, str]:
    entries: dict[str, str] = {}
    for part in re.split(r"^-- ", CATALOG.read_text(), flags=re.MULTILINE)[1:]:
        message_id, _, text = part.partition("\n")
        assert message_id not in entries, f"{message_id} twice"
        entries[message_id] = text
    return entries


def test_the_catalog_has_exactly_the_events() -> None:
    ids = [event.value.message_id for event in Event]
    assert len(set(ids)) == len(ids)
    assert set(_entries()) == set(ids)


@pytest.mark.parametrize("event", Event, ids=lambda event: event.name)
def test_an_entry_has_a_header_and_a_text(event: Event) -> None:
    head, _, body = _entries()[event.value.message_id].partition("\n\n")
    keys = [line.split(":", 1)[0] for line in head.splitlines()]
    assert keys == ["Subject", "Defined-By", "Support", "Documentation"]
    assert body.strip()


@pytest.mark.parametrize("event", Event, ids=lambda event: event.name)
def test_an_entry_uses_only_fields_of_its_event(event: Event) -> None:
    fields = {f"NBAGENT_{name.upper()}" for name in FIELDS.findall(event.value.text)}
    assert set(NAMES.findall(_entries()[event.value.message_id])) <= fields


@pytest.mark.skipif(not shutil.which("journalctl"), reason="needs journalctl")
def test_journalctl_accepts_the_catalog(tmp_path: Path) -> None:
    directory = tmp_path / "usr/lib/systemd/catalog"
    directory.mkdir(parents=True)
    shutil.copy(CATALOG, directory / "nbagent.catalog")
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)
    journalctl = ["journalctl", f"--root={tmp_path}", "--no-pager"]
    done = subprocess.run([*journalctl, "--update-catalog"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([*journalctl, "--list-catalog"], capture_output=True, text=True, check=True)
    assert {line.split(" ", 1)[0] for line in done.stdout.splitlines()} == {e.value.message_id for e in Event}


@pytest.mark.parametrize("text", ["::1\nslot x removed", "a\rb", "\x1b[2K", "\u2028", "\u202e", "\ud800", "\x9b", "\0"])
def test_text_of_a_caller_or_an_image_stays_on_one_line_of_the_journal(text: str) -> None:
    fields = entry(Event.SLOT_CLAIMED, slot="x", client=text, ttl_s="60")
    for value in fields.values():
        assert value.isprintable(), value
        assert value.encode()
    assert fields["NBAGENT_CLIENT"] != text
    assert entry(Event.SLOT_CLAIMED, slot="x", client="ä 1", ttl_s=60)["MESSAGE"] == "slot x claimed by ä 1 for 60 s"
