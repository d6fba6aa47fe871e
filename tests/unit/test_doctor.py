# SPDX-License-Identifier: BSD-3-Clause
"""All checks of `nbagent doctor` together, and a check that cannot be carried out."""

from __future__ import annotations

import errno
import re
import subprocess
from pathlib import Path

import pytest

from nbagent import doctor
from nbagent.doctor.finding import Finding


def test_the_sockets_of_the_services_that_the_supervisor_uses_are_looked_at() -> None:
    unit = (Path(doctor.__file__).parents[2] / "units/nbagent.service").read_text()
    wanted = {name for line in re.findall(r"^Wants=(.*)", unit, re.M) for name in line.split() if ".socket" in name}
    # Its own two are tried by calls, and the network service where slots may have a network.
    own = {"nbagent.socket", "nbagent-check.socket", "nbagent-network.socket"}
    assert len(wanted) > len(own) and wanted - own <= set(doctor.UNITS)


def test_a_refused_configuration_does_not_stop_the_other_checks(tmp_path: Path) -> None:
    path = tmp_path / "nbagent.toml"
    path.write_text("[api]\nworkres = 1\n")
    findings = doctor.examine(path, "http://127.0.0.1:1")
    assert findings[0].status == "fail" and "workers" in findings[0].found
    assert len(findings) > 15


def test_a_check_without_permission_is_a_warning(tmp_path: Path) -> None:
    def check_secret() -> Finding:
        raise PermissionError(13, "Permission denied")

    finding = doctor._guarded(check_secret)
    assert (finding.name, finding.status) == ("secret", "warn")
    assert "root" in finding.mend


@pytest.mark.parametrize(("error", "mend"), [
    (OSError(errno.ENOSPC, "No space left on device"), "delete files of the full file system"),
    (OSError(errno.EIO, "Input/output error"), "errors of the disk"),
    (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "processes"),
    (subprocess.TimeoutExpired(["nft"], 3.0), "as root|--reinstall"),
])
def test_a_check_that_a_fault_of_the_host_stops_names_its_remedy(error: Exception, mend: str) -> None:
    def check_files() -> Finding:
        raise error

    finding = doctor._guarded(check_files)
    assert finding.status == "warn" and str(error) in finding.found and re.search(mend, finding.mend)


def test_a_check_whose_file_is_missing_names_the_package_to_root(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_files() -> Finding:
        raise FileNotFoundError(2, "No such file or directory", "/usr/lib/nbagent/router.conf")

    for uid, mend in ((0, "apt install --reinstall nbagent"), (1000, "run nbagent doctor as root")):
        monkeypatch.setattr(doctor.os, "geteuid", lambda uid=uid: uid)
        assert mend in doctor._guarded(check_files).mend
