# SPDX-License-Identifier: BSD-3-Clause
"""The AppArmor profile of slots: its syntax, whether the kernel has it, and the finding of doctor.

tests/integration/test_isolation.py tries it on Debian 13's kernel.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nbagent.doctor.finding import Finding
from nbagent.doctor.kernel import check_apparmor
from nbagent.linux import apparmor
from nbagent.sandbox.spec import APPARMOR_PROFILE
from nbagent.supervisor import sandbox_specs

FILE = Path(__file__).resolve().parents[2] / "packaging/apparmor" / APPARMOR_PROFILE
PROFILES = "sys/kernel/security/apparmor/policy/profiles"


def kernel(root: Path, mode: str | None) -> Path:
    """The files of a kernel with AppArmor and, if `mode` is not None, with the profile."""
    profiles = {"man_groff.1": "enforce", f"{APPARMOR_PROFILE}-local.2": "complain"}
    profiles |= {} if mode is None else {f"{APPARMOR_PROFILE}.3": mode}
    files = {f"{PROFILES}/{name}/mode": found for name, found in profiles.items()}
    for name, text in (files | {"sys/module/apparmor/parameters/enabled": "Y"}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def test_the_parser_accepts_the_profile_without_a_warning() -> None:
    command = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", "--warn=all", "--names", str(FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [APPARMOR_PROFILE]
    # Of a machine whose kernel has no AppArmor.
    about_kernel = ("interface file missing", "Cache")
    assert [line for line in done.stderr.splitlines() if not any(known in line for known in about_kernel)] == []


def test_the_mode_is_that_of_the_profile_of_this_name(tmp_path: Path) -> None:
    assert apparmor.mode_of(APPARMOR_PROFILE, tmp_path) is None
    assert apparmor.mode_of(APPARMOR_PROFILE, kernel(tmp_path, None)) is None
    assert apparmor.mode_of(APPARMOR_PROFILE, kernel(tmp_path, "enforce")) == "enforce"


def test_slots_have_the_profile_if_the_kernel_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, expected in ((None, ""), ("enforce", APPARMOR_PROFILE), ("complain", APPARMOR_PROFILE)):
        monkeypatch.setattr(apparmor, "mode_of", lambda _, mode=mode: mode)
        assert sandbox_specs.apparmor_profile() == expected


def test_doctor_finds_a_profile_that_is_not_enforced(tmp_path: Path) -> None:
    assert check_apparmor(tmp_path).status == "ok"
    missing = check_apparmor(kernel(tmp_path, None))
    assert missing.status == "warn" and missing.mend == (
        f"apt install apparmor && apparmor_parser -r /etc/apparmor.d/{APPARMOR_PROFILE}"
    )
    assert check_apparmor(kernel(tmp_path, "complain")).status == "warn"
    assert check_apparmor(kernel(tmp_path, "enforce")) == Finding(
        "AppArmor", "ok", f"profile {APPARMOR_PROFILE} is enforced in slots"
    )
