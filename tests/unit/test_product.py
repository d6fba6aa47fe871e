# SPDX-License-Identifier: BSD-3-Clause
"""The builds of `make up`: side by side, with one line for each step and the rest in a log that a failure names."""

from __future__ import annotations

from pathlib import Path

import pytest

import product

# Each build waits until the other has begun.
BUILD = """#!/bin/sh
echo "output of apt in $0"
echo "warning in $0" >&2
touch "$0.began"
for n in $(seq 300); do [ -e "{other}.began" ] && break; sleep 0.1; done
[ -e "{other}.began" ] || {{ echo "the other build has not begun" >&2; exit 1; }}
echo /dist/{package}_1_all.deb
"""


@pytest.fixture
def packaging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of build-deb and build-image-deb, as two scripts that wait for each other."""
    directory = tmp_path / "packaging"
    directory.mkdir()
    names = {"build-deb": "nbagent", "build-image-deb": "nbagent-image-minimal"}
    for (name, package), other in zip(names.items(), reversed(names), strict=True):
        (directory / name).write_text(BUILD.format(other=directory / other, package=package))
        (directory / name).chmod(0o755)
    monkeypatch.setattr(product, "TOP", tmp_path)
    monkeypatch.setattr(product, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(product, "DIST", tmp_path / "cache/dist")
    return directory


def test_builds_run_side_by_side_and_print_one_line_each(packaging: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    built = product.build(lines.append, ("nbagent-image-minimal", "nbagent"))
    assert built == [Path("/dist/nbagent-image-minimal_1_all.deb"), Path("/dist/nbagent_1_all.deb")]
    assert {"building the program", "building nbagent-image-minimal"} <= set(lines)
    assert capfd.readouterr() == ("", "")


def test_a_failed_build_shows_the_end_of_its_log_and_names_it(packaging: Path) -> None:
    (packaging / "build-deb").write_text("#!/bin/sh\nseq 1000 >&2\necho 'E: no space left' >&2\nexit 3\n")
    (packaging / "build-image-deb").write_text("#!/bin/sh\necho /dist/nbagent-image-minimal_1_all.deb\n")
    with pytest.raises(SystemExit) as failure:
        product.build(lambda line: None, ("nbagent",))
    text, log = str(failure.value), packaging.parent / "cache/log/build-deb.log"
    assert text.endswith(f"building the program failed with status 3; the whole log is {log}")
    assert "E: no space left" in text and len(text.splitlines()) == product.LOG_LINES + 1
    assert log.read_text().startswith("1\n2\n")
    assert [path.name for path in log.parent.iterdir()] == ["build-deb.log"]
