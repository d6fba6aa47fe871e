# SPDX-License-Identifier: BSD-3-Clause
"""The copy of an image's home: links, holes, modes and times are kept, and nothing of another file system is copied."""

import os
import stat

import pytest

from nbagent.sandbox import steps


@pytest.fixture
def copied(tmp_path):
    """A function that copies `source` and returns `target`."""
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()

    def copy():
        steps._copy_tree(str(tmp_path / "source"), str(tmp_path / "target"), os.getuid(), {})
        return tmp_path / "target"

    copy.source = tmp_path / "source"
    return copy


def test_modes_times_and_links_are_kept(copied):
    directory = copied.source / "a" / "b"
    directory.mkdir(parents=True)
    (directory / "file").write_bytes(b"content" * 100_000)
    (directory / "file").chmod(0o640)
    os.link(directory / "file", copied.source / "second")
    (copied.source / "link").symlink_to("../../outside")
    os.utime(directory / "file", ns=(1, 1_500_000_000_123_456_789))
    directory.chmod(0o2750)
    os.utime(directory, ns=(2, 1_400_000_000_000_000_001))
    target = copied()
    assert (target / "a/b/file").read_bytes() == b"content" * 100_000
    assert os.path.samefile(target / "a/b/file", target / "second")
    assert os.readlink(target / "link") == "../../outside"
    found = [(target / name).stat() for name in ("a/b/file", "a/b")]
    assert [stat.S_IMODE(status.st_mode) for status in found] == [0o640, 0o2750]
    assert [status.st_mtime_ns for status in found] == [1_500_000_000_123_456_789, 1_400_000_000_000_000_001]


def test_holes_are_kept(copied):
    with (copied.source / "sparse").open("wb") as file:
        file.seek(8 << 20)
        file.write(b"middle")
        file.truncate(64 << 20)
    copy = copied() / "sparse"
    status = copy.stat()
    assert status.st_size == 64 << 20 and status.st_blocks * 512 <= 1 << 20
    with copy.open("rb") as file:
        file.seek(8 << 20)
        assert file.read(7) == b"middle\0"


def test_directories_of_other_file_systems_are_left_out(copied, monkeypatch):
    """As when the image's home is a link to its root directory, where the slot's /proc is."""
    (copied.source / "own").mkdir()
    real = os.stat
    other = real("/proc").st_dev

    class Moved:
        def __init__(self, status):
            self._status = status

        def __getattr__(self, name):
            return other if name == "st_dev" else getattr(self._status, name)

    with monkeypatch.context() as patch:
        patch.setattr(steps.os, "stat", lambda path: Moved(real(path)))
        target = copied()
    assert os.listdir(target) == []
