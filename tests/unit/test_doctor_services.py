# SPDX-License-Identifier: BSD-3-Clause
"""The checks of the services, their users and files by `nbagent doctor`."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_supervisor import FakeSupervisor
from host_files import host

from archives import Archive
from nbagent import doctor
from nbagent.config import host_config
from nbagent.doctor import services, system
from nbagent.image.store import ImageStore
from nbagent.wire import control

SETTINGS = host_config.HostConfig()


def test_an_inactive_unit_fails() -> None:
    assert services.check_unit("nbagent.service", lambda unit: "active").status == "ok"
    finding = services.check_unit("nbagent.service", lambda unit: "failed")
    assert (finding.status, finding.found) == ("fail", "failed")
    assert "journalctl" in finding.mend


def test_figures_of_the_supervisor_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    assert services.check_control(path).status == "fail"
    with FakeSupervisor(path) as supervisor:
        assert services.check_control(path).found == "0 claimed, 2 warm, 1000 available"
        supervisor.draining = True
        assert services.check_control(path).mend == "nbagent drain --off"


def test_a_port_without_a_server_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    finding = services.check_http("router", f"http://127.0.0.1:{port}/", "nbagent-router.service")
    assert finding.status == "fail"
    assert "nbagent-router.service" in finding.mend


@pytest.mark.parametrize(("mapping", "status"), [("", "ok"), (" (deleted)", "warn")])
def test_a_router_that_runs_replaced_libraries_is_a_warning(tmp_path: Path, mapping: str, status: str) -> None:
    assert services.check_router_libraries(tmp_path).status == "ok"
    maps = f"7f12a0000000-7f12a0001000 r-xp 00001000 fe:00 1  /usr/lib/libssl.so.3{mapping}\n"
    host(tmp_path, {"run/nbagent-router/pid": "77\n", "proc/77/maps": maps})
    assert services.check_router_libraries(tmp_path).status == status


def test_a_token_that_other_users_can_read_fails(tmp_path: Path) -> None:
    assert services.check_token(tmp_path, "token", "none may call").status == "warn"
    path = host(tmp_path, {"etc/nbagent/token": "x" * 43}) / "etc/nbagent/token"
    for mode, status in ((0o640, "ok"), (0o600, "ok"), (0o644, "fail"), (0o660, "fail")):
        path.chmod(mode)
        assert services.check_token(tmp_path, "token", "none may call").status == status
    path.write_text("short")
    path.chmod(0o640)
    assert services.check_token(tmp_path, "token", "none may call").status == "fail"


def test_an_empty_image_store_fails(tmp_path: Path) -> None:
    assert services.check_images(tmp_path).status == "fail"


@pytest.mark.parametrize(("act", "found"), [
    (lambda tree: None, "files are as they were added, by a sample: minimal"),
    (lambda tree: (tree / "files.json").unlink(),
     r"files are as they were added, by a sample: minimal \(added without checksums\)"),
    (lambda tree: (tree / "rootfs/usr/share/lab/main.js").write_bytes(b""),
     "files of image minimal have changed since it was added: 'usr/share/lab/main.js'$"),
    (lambda tree: shutil.rmtree(tree / "rootfs/usr"),
     "files of image minimal have changed since it was added: 'usr/share/lab/main.js' and 1 more"),
    (lambda tree: (tree / "image.json").write_text("{"), "image minimal cannot be read: .*image.json is damaged"),
    (lambda tree: (tree / "files.json").write_text("["), "image minimal cannot be read: .*files.json is damaged"),
    (lambda tree: shutil.rmtree(tree), "image minimal cannot be read: no image has the name 'minimal'"),
], ids=["whole", "old", "changed", "missing", "record", "checksums", "none"])
def test_an_image_whose_files_have_changed_fails(
    tmp_path: Path, act: Callable[[Path], object], found: str
) -> None:
    store = ImageStore(tmp_path / "var/lib/nbagent/images", chown=lambda *_, **__: None)
    image = store.add(Archive.with_image().save(tmp_path / "minimal.tar"), "minimal")
    act(image.root.parent)
    finding = services.check_images(tmp_path)
    assert re.match(found, finding.found), finding
    whole = found.startswith("files are as")
    assert (finding.status, "image remove minimal" in finding.mend) == (("ok", False) if whole else ("fail", True))


def test_users_of_services_must_exist() -> None:
    sysusers = (Path(__file__).parents[2] / "packaging/nbagent.sysusers").read_text()
    assert services.USERS.keys() == set(re.findall(r"^u (\S+)", sysusers, re.M))
    units = Path(__file__).parents[2] / "units"
    for user, names in services.USERS.items():
        assert f"\nUser={user}\n" in (units / names[-1]).read_text()
    assert services.check_users(services.USERS, lambda user: True).status == "ok"
    finding = services.check_users(services.USERS, lambda user: user != "nbagent-router")
    assert finding.status == "fail" and "missing: nbagent-router; " in finding.found
    assert finding.mend == "systemd-sysusers nbagent.conf; then systemctl restart nbagent-router.service"
    # The DNS update has its user, and does not run on this host.
    assert doctor._users(SETTINGS) == ["nbagent", "nbagent-router"]
    assert doctor._users(host_config.parse({"dns": {"server": "192.0.2.53", "zone": "x.example"}}))[-1] == "nbagent-dns"
    assert system.has_user("root") and not system.has_user("no such user")


@pytest.mark.parametrize(("error", "text"), [
    (subprocess.TimeoutExpired(["journalctl"], 10.0), "no response within 10 s"),
    (OSError("Failed to connect to /run/systemd/journal/io.systemd.journal: Connection refused"), "refused"),
])
def test_a_journal_that_writes_nothing_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def sync() -> None:
        raise error

    assert services.check_journald(lambda: None).status == "ok"
    monkeypatch.setattr(services.os, "geteuid", lambda: 0)
    finding = services.check_journald(sync)
    assert finding.status == "warn" and text in finding.found
    assert finding.mend.startswith("systemctl restart systemd-journald")
    # The socket is root's.
    monkeypatch.setattr(services.os, "geteuid", lambda: 1000)
    assert services.check_journald(sync).mend == "run nbagent doctor as root"


def test_a_fault_of_the_host_is_a_failure_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def __init__(self, *_: object) -> None:
            pass

        def call(self, _: object) -> dict[str, object]:
            return {"claimed": 0, "warm": 1, "available": 0, "faults": {"router": "no response"}, "draining": False,
                    "pools": {}}

    monkeypatch.setattr(control, "ControlClient", Client)
    finding = services.check_control(tmp_path / "control.sock")
    assert finding.status == "fail" and "router: no response" in finding.found
    assert finding.mend.startswith("systemctl restart nbagent-router")


def test_every_part_of_the_host_that_is_tried_has_a_remedy_and_a_metric(tmp_path: Path) -> None:
    from nbagent.api import metrics

    with FakeSupervisor(tmp_path / "control.sock") as fake:
        parts = fake._host.supervisor.health._tries.keys()
    assert parts == services.FAULTS.keys() == set(metrics.PARTS)


def test_a_start_is_tried_by_the_supervisor(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    assert services.check_start(path).status == "fail"
    with FakeSupervisor(path) as fake:
        finding = services.check_start(path)
        assert finding.status == "ok" and finding.found.startswith("by exec in ")
        fake._host.open_error = TimeoutError()
        finding = services.check_start(path)
        assert finding.status == "fail" and finding.mend.startswith("systemctl restart nbagent-launch")
        assert services.check_zygotes(path).status == "ok"
