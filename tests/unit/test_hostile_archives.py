# SPDX-License-Identifier: BSD-3-Clause
"""Hostile archives end in the reader's own error: not in another exception, a hang, or more bytes than the limit.

Each document of tests/hostile.py goes to every reader that accepts its format: the import of images, their layers, and
the content of claims.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gzip
import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hostile
from archives import Archive, Layers
from nbagent.content.beneath_writer import BeneathWriter
from nbagent.content.unpack import UnpackLimits, unpack
from nbagent.core.errors import FetchFailed, ImageInvalid
from nbagent.image import archive as archives
from nbagent.image import fetch, manifest, oci
from nbagent.image.archive import ImageArchiveLimits
from nbagent.image.static import publish
from nbagent.untrusted import tar
from nbagent.untrusted.refusal import Refused
from nbagent.untrusted.tree import NotInTree, Tree

LIMIT_BYTES, LIMIT_ENTRIES = 1 << 20, 100
# A hang is no failure without it. No reader takes more than a second.
HANG_S = 60


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def hang(number: int, frame: object) -> None:
        pytest.fail(f"the reader did not end within {HANG_S} s")

    previous = signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANG_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def no_chown(
    path: str, uid: int, gid: int, *, dir_fd: int | None = None, follow_symlinks: bool = True
) -> None:
    pass


def extract(document: bytes, root: Path, *, layered: bool = False) -> None:
    fd = os.memfd_create("nbagent-archive")
    try:
        os.write(fd, document)
        limits = ImageArchiveLimits(LIMIT_BYTES, LIMIT_ENTRIES)
        if layered:
            archives.extract_layers([fd], root, 0, limits, no_chown)
        else:
            archives.extract(fd, root, 0, limits, no_chown)
    finally:
        os.close(fd)


class Trickle:
    """A source that returns at most 700 bytes a read, as a network does."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def read(self, size: int = -1, /) -> bytes:
        end = self._at + (min(size, 700) if size >= 0 else 700)
        chunk, self._at = self._content[self._at:end], min(end, len(self._content))
        return chunk


def deliver(document: bytes, root: Path) -> int:
    with BeneathWriter(str(root)) as home:
        return unpack(Trickle(document), home, UnpackLimits(LIMIT_BYTES, LIMIT_ENTRIES))


def check_written(root: Path) -> None:
    found = [path.lstat() for path in root.rglob("*")]
    assert sum(status.st_size for status in found if not stat.S_ISDIR(status.st_mode)) <= LIMIT_BYTES + 5000
    assert len(found) <= LIMIT_ENTRIES + 1
    assert [path.name for path in root.parent.iterdir()] == [root.name], "written outside of the root"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "root"
    root.mkdir()
    yield root
    check_written(root)


# Home directories accept what an image may not have: owners are ignored.
ACCEPTED_BY_CONTENT = {"owner-negative", "owner-2^40", "owner-in-pax", "size-of-a-link"}


@pytest.mark.parametrize("name", hostile.TARS)
@pytest.mark.parametrize("layered", [False, True], ids=["archive", "layer"])
def test_a_hostile_archive_is_an_invalid_image(root: Path, name: str, layered: bool) -> None:
    document, reason = hostile.TARS[name]
    with pytest.raises(ImageInvalid, match=reason):
        extract(document, root, layered=layered)


@pytest.mark.parametrize("name", sorted({*hostile.TARS} - ACCEPTED_BY_CONTENT))
def test_a_hostile_archive_is_refused_content(root: Path, name: str) -> None:
    document, reason = hostile.TARS[name]
    with pytest.raises(Refused, match=reason) as refused:
        deliver(document, root)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("name", hostile.ZIPS)
def test_a_hostile_zip_archive_is_refused_content(root: Path, name: str) -> None:
    document, reason = hostile.ZIPS[name]
    with pytest.raises(Refused, match=reason):
        deliver(document, root)


@pytest.mark.parametrize("name", hostile.VALID_TARS)
def test_unusual_values_that_are_valid_are_accepted(root: Path, name: str) -> None:
    extract(hostile.VALID_TARS[name], root)


def test_a_sparse_file_is_written_with_its_holes(root: Path) -> None:
    extract(hostile.VALID_TARS["sparse"], root)
    assert (root / "s").read_bytes() == bytes(1000) + b"abc" + bytes(2997) + b"de" + bytes(998)


@pytest.mark.parametrize("name", ["negative-sparse", "sparse", "gzip", "zip"])
def test_an_archive_that_is_cut_anywhere_is_refused(root: Path, name: str) -> None:
    whole = {"negative-sparse": hostile.NEGATIVE_SPARSE, "sparse": hostile.VALID_TARS["sparse"],
             "gzip": gzip.compress(hostile.VALID_TARS["sparse"]), "zip": hostile.zipped()}[name]
    for end in range(0, len(whole) - hostile.BLOCK if "sparse" in name else len(whole), 37 if len(whole) > 2000 else 1):
        with pytest.raises(Refused):
            deliver(whole[:end], root)
        if name != "zip":
            with pytest.raises(ImageInvalid):
                extract(whole[:end], root)
        for path in root.iterdir():
            path.unlink()


MEASURE = """
import sys
from pathlib import Path
from nbagent.image import archive


def peak_kib():
    # Not ru_maxrss, which a process inherits from its parent.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


before = peak_kib()
limits = archive.ImageArchiveLimits(1 << 30, int(sys.argv[3]))
archive.extract(int(sys.argv[1]), Path(sys.argv[2]), 0, limits, lambda *args, **more: None)
print(peak_kib() - before)
"""


def memory_kib(document: bytes, root: Path, entries: int) -> int:
    """The memory that a process takes to unpack an image, above what it has before."""
    fd = os.memfd_create("nbagent-archive")
    try:
        os.write(fd, document)
        argv = [sys.executable, "-c", MEASURE, str(fd), str(root), str(entries)]
        done = subprocess.run(argv, capture_output=True, text=True, check=True, pass_fds=[fd])
    finally:
        os.close(fd)
    return int(done.stdout)


def test_directories_with_large_headers_do_not_accumulate_in_memory(root: Path) -> None:
    document = gzip.compress(b"".join(
        hostile.pax({"comment": "c" * 500_000, "path": f"d{number}"}) + hostile.header("d", tarfile.DIRTYPE)
        for number in range(90)
    ) + hostile.END)
    assert memory_kib(document, root, 100) < 20_000, "90 directories with headers of 500 KB"


def test_the_headers_of_all_entries_together_are_limited(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = b"".join(hostile.pax({"comment": "c" * 5000, "path": f"x{number}"}) + hostile.file("x", b"1" * 9000)
                        for number in range(20)) + hostile.END
    monkeypatch.setattr(tar, "_ALL_HEADERS_MAX_BYTES", 130_000)
    extract(document, root)
    for path in root.iterdir():
        path.unlink()
    monkeypatch.setattr(tar, "_ALL_HEADERS_MAX_BYTES", 100_000)
    with pytest.raises(ImageInvalid, match="headers of the archive"):
        extract(document, root)


# Layouts whose documents are hostile. Each is the index, or the manifest, or the configuration of an image.
DIGEST = "sha256:" + "0" * 64
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
TAGGED = {"annotations": {"org.opencontainers.image.ref.name": "\x1b[2J\ud800" * 1000}}
INDEXES = [
    b"", b"[]", b"null", b"1e999", b'{"manifests": 1e999}', b'{"manifests": {}}', b'{"manifests": [1]}',
    b'{"manifests": []}', b"[" * 100_000, b'{"manifests": ' + b"[" * 50_000, b'{"manifests": [' + b"9" * 5000 + b"]}",
    b'{"manifests": [{"mediaType": 1e999}]}', b'{"manifests": [{"mediaType": "\\ud800"}]}',
    json.dumps({"manifests": [{"mediaType": "x" * 100_000}]}).encode(),
    json.dumps({"manifests": [{"mediaType": MANIFEST_TYPE}]}).encode(),
    *(json.dumps({"manifests": [{"mediaType": MANIFEST_TYPE, "digest": digest}]}).encode() for digest in (
        "", "sha256:", "sha256:../../../../etc/passwd", "sha512:" + "0" * 128, DIGEST.upper(), DIGEST + "\n", DIGEST,
        ["sha256"], {"a": 1}, None, 7)),
    json.dumps({"manifests": [TAGGED, TAGGED]}).encode(),
    b'{"manifests": [{"platform": {"os": NaN, "architecture": -Infinity}}]}',
    b'{"a": "' + b"x" * (5 << 20) + b'"}', b"\xff\xfe{}",
]


@pytest.mark.parametrize("index", INDEXES, ids=range(len(INDEXES)))
def test_a_hostile_index_is_an_invalid_image(tmp_path: Path, index: bytes) -> None:
    (tmp_path / "blobs/sha256").mkdir(parents=True)
    (tmp_path / "index.json").write_bytes(index)
    with oci.Layout(tmp_path) as layout, pytest.raises(ImageInvalid) as refused:
        layout.image()
    assert len(str(refused.value)) < 2000 and str(refused.value).isprintable()


@pytest.mark.parametrize("change", [
    {"layers": []}, {"layers": 1e999}, {"layers": {}}, {"layers": [None]}, {"layers": [{}]}, {"config": None},
    {"config": {"digest": "sha256:x"}}, {"layers": [{"mediaType": "text/plain", "digest": DIGEST}]},
    {"layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": DIGEST}]},
    {"layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": DIGEST}] * 128},
    {"config": {"digest": DIGEST}},
], ids=lambda value: str(value)[:60])
def test_a_hostile_manifest_of_a_container_image_is_an_invalid_image(tmp_path: Path, change: dict[str, Any]) -> None:
    Layers().layer(Archive.with_image()).save(tmp_path).close()
    index = json.loads((tmp_path / "index.json").read_bytes())
    digest = index["manifests"][0]["digest"].removeprefix("sha256:")
    document = json.loads((tmp_path / "blobs/sha256" / digest).read_bytes()) | change
    content = json.dumps(document).encode()
    changed = hashlib.sha256(content).hexdigest()
    (tmp_path / "blobs/sha256" / changed).write_bytes(content)
    index["manifests"][0]["digest"] = f"sha256:{changed}"
    (tmp_path / "index.json").write_text(json.dumps(index))
    with oci.Layout(tmp_path) as layout, pytest.raises(ImageInvalid):
        for layer in layout.image().layers:
            layout.open_layer(layer).close()


@pytest.mark.parametrize("config", [
    {"Env": 1}, {"Env": [1]}, {"Cmd": "x"}, {"Cmd": ["x\0"]}, {"Cmd": ["\ud800"]}, {"Entrypoint": {}},
    {"Cmd": ["x"], "Env": ["A=\ud800"]}, {"Cmd": ["x"], "Env": ["A=\0"]}, {"Cmd": ["x"] * 40_000},
    {"Env": ["PATH=/\0:/a/../../..:/\ud800:/" + "n" * 300 + ":/" + "d/" * 500]},
    {"Env": ["PATH=/../../../../../../../usr/bin"]},
], ids=lambda value: ascii(value)[:40])
def test_a_hostile_configuration_of_a_container_image_is_an_invalid_image(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    (tmp_path / "root").mkdir()
    with Layers(**config).layer(Archive()).save(tmp_path / "layout") as layout, pytest.raises(ImageInvalid):
        oci.manifest_of(layout.image().config, tmp_path / "root")


def test_a_layer_that_changes_after_its_check_is_an_invalid_image(tmp_path: Path) -> None:
    with Layers().layer(Archive.with_image()).save(tmp_path) as layout:
        (layer,) = layout.image().layers
        with layout.open_layer(layer):
            layout.check_unchanged()
            blob = tmp_path / "blobs/sha256" / layer.digest
            before = blob.stat()
            # Times of files may be those of the kernel's last tick.
            while blob.stat().st_ctime_ns == before.st_ctime_ns:
                blob.write_bytes(bytes(before.st_size))
                os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
            with pytest.raises(ImageInvalid, match="changed while it was read"):
                layout.check_unchanged()


def test_a_search_path_does_not_lead_out_of_the_image(tmp_path: Path) -> None:
    (tmp_path / "jupyter-lab").write_text("#!/usr/bin/python3\n")
    (tmp_path / "root").mkdir()
    config = oci.ImageConfig({"PATH": "/..:/a/../.."}, "", "", (), None)
    with pytest.raises(ImageInvalid, match="no jupyter-lab on its PATH"):
        oci.manifest_of(config, tmp_path / "root")


@pytest.mark.parametrize("text", [
    "/" * 100_000, "+/" * 100_000, "/a" * 100_000, "//a//b/c", "a.-" * 100_000, "../../x/y",
])
def test_a_hostile_command_names_no_environment(tmp_path: Path, text: str) -> None:
    (tmp_path / "jupyter-lab").write_text("#!/usr/bin/python3\n")
    (tmp_path / "root").mkdir()
    environment = {f"V{number}": f"/p{number}/.." for number in range(10_000)}
    config = oci.ImageConfig({**environment, "PATH": "/x:" * 10_000}, "", "", (), None)
    began_s = time.monotonic()
    with pytest.raises(ImageInvalid, match="no jupyter-lab on its PATH"):
        oci.manifest_of(config, tmp_path / "root")
    command = tuple(text[start:start + 10_000] for start in range(0, len(text), 10_000))
    with contextlib.suppress(ImageInvalid):  # it is longer than a manifest's may be
        assert oci.manifest_of(config._replace(environment={}, command=command), tmp_path / "root").python is None
    assert time.monotonic() - began_s < 20


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize("name", ["index.json", "blobs/sha256/" + "0" * 64])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, make_socket])
def test_a_document_that_is_no_file_is_an_invalid_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Path], None]
) -> None:
    (tmp_path / "blobs/sha256").mkdir(parents=True)
    if name != "index.json":
        found = {"mediaType": MANIFEST_TYPE, "digest": DIGEST}
        (tmp_path / "index.json").write_text(json.dumps({"manifests": [found]}))
    monkeypatch.chdir(tmp_path)  # the path of a socket has at most 107 bytes
    make(Path(name))
    with oci.Layout(tmp_path) as layout, pytest.raises(ImageInvalid, match="is not a file"):
        layout.image()


@pytest.mark.parametrize("text", [
    b"a = " + b"[" * 30_000, b"a = " + b"9" * 5000, b"a = 1e999", b"user = nan", b"a." * 30_000 + b"b = 1",
    b"[" + b"a." * 20_000 + b"b]", b'"' + b"k" * 60_000 + b'" = 1', b'"\\u001b[2J" = 1', b"\xff", b"\0",
    b"user = 'x'\nuser = 'x'", b"a = 2000-99-99", b"a = " + b"{a=" * 10_000, b"environment = 1e999", b"port = 1e999",
    b"[[user]]", b"a = '''", b'user = "x"\ncommand = [1e999]', b'user = "x"\ncommand = [[]]',
    b'user = "x"\ncommand = ["a\\u0000"]',
], ids=lambda value: ascii(value)[:30])
def test_a_hostile_manifest_is_an_invalid_image(text: bytes) -> None:
    with pytest.raises(ImageInvalid) as refused:
        manifest.parse(text)
    assert len(str(refused.value)) < 1000 and str(refused.value).isprintable()


def test_one_directory_by_many_prefixes_does_not_multiply_files_over_the_limit(tmp_path: Path) -> None:
    (tmp_path / "root/files").mkdir(parents=True)
    (tmp_path / "target").mkdir()
    for number in range(10):
        (tmp_path / f"root/files/{number}").touch()
    with pytest.raises(ImageInvalid, match="more than 25 files"):
        publish(tmp_path / "root", {f"p{number}": "/files" for number in range(3)}, tmp_path / "target", 1 << 20, 25)
    assert sum(path.is_file() for path in (tmp_path / "target").rglob("*")) <= 25


@pytest.mark.parametrize("follow_links", [False, True])
@pytest.mark.parametrize("parts", [
    ("..",), ("d", ".."), ("..", "beside"), ("d", "..", "..", "beside"), (".",), ("",), ("a/b",), ("a\0",),
])
def test_a_tree_refuses_what_is_not_a_name(tmp_path: Path, follow_links: bool, parts: tuple[str, ...]) -> None:
    (tmp_path / "root/d").mkdir(parents=True)
    (tmp_path / "beside").mkdir()
    with Tree(str(tmp_path / "root"), follow_links=follow_links, directory_mode=0o700) as tree:
        for action in (tree.open_file, tree.remove, tree.remove_file, lambda parts: tree.symlink(parts, "x"),
                       lambda parts: tree.create_file(parts, 0o600), lambda parts: tree.hard_link(("n",), parts)):
            with pytest.raises(OSError) as refused:
                action(parts)
            assert isinstance(refused.value, NotInTree) or refused.value.errno == errno.EXDEV
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["beside", "d", "root"]


def swap(home: Path, ended: threading.Event) -> None:
    """Replaces home/way by directories and by links until `ended`, as a process of the slot's user may."""
    targets = ["", "../beside", "", str(home.parent / "beside"), "real", "", "way", "/proc/self/cwd"]
    for number, target in enumerate(itertools.cycle(targets)):
        if ended.is_set():
            return
        spare = home / f"spare{number}"
        if target:
            spare.symlink_to(target)
        else:
            spare.mkdir()
        exchange(spare, home / "way")
        if spare.is_symlink():
            spare.unlink()
        else:
            shutil.rmtree(spare, ignore_errors=True)


def exchange(one: Path, other: Path) -> None:
    """renameat2(2) with RENAME_EXCHANGE: there is no moment in which a name is missing."""
    paths = [os.fsencode(one), os.fsencode(other)]
    assert ctypes.CDLL(None, use_errno=True).renameat2(-100, paths[0], -100, paths[1], 2) == 0, ctypes.get_errno()


def test_no_file_is_written_outside_while_its_directory_is_replaced_by_links(tmp_path: Path) -> None:
    home, beside = tmp_path / "home", tmp_path / "beside"
    for directory in (home, beside, home / "real", home / "way"):
        directory.mkdir()
    (beside / "own").write_text("secret")
    ended = threading.Event()
    thread = threading.Thread(target=swap, args=(home, ended))
    thread.start()
    reasons: set[str] = set()
    try:
        with BeneathWriter(str(home)) as writer:
            actions = [
                lambda: writer.write(("way", "deep", "file"), [b"x"]),
                lambda: writer.link(("way", "link"), "real"),
                lambda: writer.make_directory(("way", "a", "b")),
                lambda: writer.hard_link(("stolen",), ("way", "own")),
            ]
            for action in actions * 2000:
                try:
                    action()
                except Refused as error:
                    reasons.add(str(error).partition(": ")[2])
    finally:
        ended.set()
        thread.join()
    assert "a symbolic link on the way leads out of the home directory" in reasons, "no replacement in time"
    assert [path.name for path in beside.iterdir()] == ["own"]
    assert not (home / "stolen").exists()


def test_a_fetched_image_is_bounded_in_bytes_and_files(tmp_path: Path) -> None:
    (tmp_path / "layout").mkdir()
    for number in range(9):
        (tmp_path / f"layout/{number}").write_bytes(bytes(100))
    fetch._check_size(tmp_path, ImageArchiveLimits(900, 10))
    for limits in (ImageArchiveLimits(899, 10), ImageArchiveLimits(900, 9)):
        with pytest.raises(FetchFailed, match="larger than"):
            fetch._check_size(tmp_path, limits)
