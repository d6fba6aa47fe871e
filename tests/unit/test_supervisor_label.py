# SPDX-License-Identifier: BSD-3-Clause
"""A slot of a former host label, through the API: its id stays valid after the label has changed."""

from __future__ import annotations

from pathlib import Path

from fake_supervisor import FakeSupervisor

from nbagent.api.app import create_app
from nbagent.config import host_config
from nbagent.wire.control import ControlClient


def test_an_api_with_another_label_serves_slots_of_the_former_one(tmp_path: Path) -> None:
    settings = host_config.parse({"host": {"label": "d08"}})
    with FakeSupervisor(tmp_path / "control.sock") as supervisor:
        api = create_app(settings, ControlClient(supervisor.path, 5), tmp_path / "token").test_client()
        key = {"Idempotency-Key": "k1"}
        slot = api.post("/claim", headers=key).json["slot"]
        assert slot.startswith("c07-")
        assert api.get(f"/slots/{slot}").json["slot"] == slot
        assert api.patch(f"/slots/{slot}", json={"ttl": 60}).json["slot"] == slot
        assert api.post("/claim", headers=key).json["slot"] == slot
        assert api.delete(f"/slots/{slot}").json["state"] == "stopping"
