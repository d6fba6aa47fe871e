# SPDX-License-Identifier: BSD-3-Clause
"""The image store, with small archives. Runs with and without root, because `Owners` replaces os.chown."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import lzma
import os
import platform
import shutil
import stat
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import brotli
import pytest

from archives import MANIFEST, Archive, Layers
from nbagent.core.errors import ImageInvalid, ImageNotFound, NbagentError
from nbagent.image import ids, manifest, oci
from nbagent.image.archive import ImageArchiveLimits
from nbagent.image.store import Image, ImageStore


class Owners:
    """Replaces os.chown, which only root may call, and records its arguments."""

    def __init__(self) -> None:
        self.recorded: dict[tuple[str, int], int] = {}

    def __call__(
        self, path: str, uid: int, gid: int, *, dir_fd: int | None = None, follow_symlinks: bool = True
    ) -> None:
        status = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        self.recorded[path, status.st_ino] = uid
        assert not follow_symlinks
        if os.geteuid() == 0:
            os.chown(path, uid, gid, dir_fd=dir_fd, follow_symlinks=follow_symlinks)


@pytest.fixture
def owners() -> Owners:
    return Owners()


@pytest.fixture
def store(tmp_path: Path, owners: Owners) -> Iterator[ImageStore]:
    yield ImageStore(tmp_path / "images", chown=owners)
    assert not list((tmp_path / "images").glob(".staging-*")), "a staging directory was left"


def add(store: ImageStore, archive: Archive, name: str = "minimal") -> Image:
    return store.add(archive.save(store.path.parent / f"{name}.tar"), name)


def refused(store: ImageStore, archive: Archive) -> str:
    with pytest.raises(ImageInvalid) as raised:
        add(store, archive)
    assert store.list() == []
    return str(raised.value)


def test_an_added_image_is_found_by_name(store: ImageStore) -> None:
    image = add(store, Archive.with_image())
    assert store.get("minimal") == image
    assert store.list() == [image]
    assert image.root == store.path / image.digest / "rootfs"
    assert (image.python, image.home, image.user, image.launch) == (
        "/usr/bin/python3",
        "/home/jovyan",
        "jovyan",
        "exec",
    )
    assert dict(image.environment) == {"LANG": "C.UTF-8"}


def test_the_digest_is_the_archives(store: ImageStore, tmp_path: Path) -> None:
    path = Archive.with_image().save(tmp_path / "a.tar")
    expected = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert store.add(path, "minimal").digest == f"sha256-{expected}"


@pytest.mark.parametrize("packer", [gzip.compress, lzma.compress, bytes], ids=["gz", "xz", "tar"])
def test_python_unpacks(store: ImageStore, tmp_path: Path, packer: Any) -> None:
    path = tmp_path / "packed"
    path.write_bytes(packer(Archive.with_image().bytes()))
    assert store.add(path, "minimal").root.is_dir()


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the program zstd is not installed")
def test_zstd_unpacks_and_a_cut_archive_is_refused(store: ImageStore, tmp_path: Path) -> None:
    packed = subprocess.run(
        ["zstd", "-qc"], input=Archive.with_image().bytes(), capture_output=True, check=True
    ).stdout
    (tmp_path / "whole").write_bytes(packed)
    (tmp_path / "cut").write_bytes(packed[: len(packed) // 2])
    assert store.add(tmp_path / "whole", "whole").root.is_dir()
    with pytest.raises(ImageInvalid):
        store.add(tmp_path / "cut", "cut")


ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00"
FOREIGN = "aarch64" if platform.machine() != "aarch64" else "x86_64"
MACHINES = {"x86_64": b"\x3e\x00", "aarch64": b"\xb7\x00"}


def image_for(machine: str, path: str = "usr/bin/python3.13") -> Archive:
    archive = Archive.with_image()
    archive.add(path, ELF + MACHINES[machine] + bytes(44), mode=0o755)
    return archive


def test_an_image_for_another_processor_is_refused(store: ImageStore) -> None:
    archive = image_for(FOREIGN)
    archive.add("usr/bin/python3", type=tarfile.SYMTYPE, linkname="python3.13")
    expected = f"the image is for {FOREIGN}, but this host is {platform.machine()}: /usr/bin/python3 cannot be executed"
    assert refused(store, archive) == expected


def test_an_image_whose_shell_is_for_another_processor_is_refused(store: ImageStore) -> None:
    archive = image_for(FOREIGN, "bin/sh")
    archive.add("usr/bin/python3", b"#!/bin/sh\n", mode=0o755)
    assert refused(store, archive).endswith(": /bin/sh cannot be executed")


def test_an_image_for_this_processor_is_added(store: ImageStore) -> None:
    archive = image_for(platform.machine())
    archive.add("usr/bin/python3", type=tarfile.SYMTYPE, linkname="python3.13")
    archive.add("bin/sh", ELF + MACHINES[FOREIGN] + bytes(44), mode=0o755)
    assert add(store, archive).root.is_dir()


def test_owners_are_shifted(store: ImageStore, owners: Owners) -> None:
    archive = Archive.with_image()
    archive.add("home", type=tarfile.DIRTYPE, mode=0o755)
    archive.add("home/jovyan", type=tarfile.DIRTYPE, uid=1000, gid=1000, mode=0o700)
    archive.add("home/jovyan/link", type=tarfile.SYMTYPE, linkname="/etc/passwd", uid=65535)
    image = add(store, archive)
    shifted = {name: uid - image.id_base for (name, _), uid in owners.recorded.items()}
    assert shifted["link"] == 65535
    assert shifted["main.js"] == 0
    inode = (image.root / "home/jovyan").stat().st_ino
    assert owners.recorded[".", inode] == image.id_base + 1000


def test_directories_above_an_image_can_be_searched_and_not_listed(store: ImageStore) -> None:
    image = add(store, Archive.with_image())
    for directory in (store.path, store.path / "names", image.root.parent):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o711, directory


def test_modes_and_times_are_kept_without_set_id_bits(store: ImageStore) -> None:
    archive = Archive.with_image()
    archive.add("usr/bin/su", b"x", mode=0o6755)
    archive.add("tmp", type=tarfile.DIRTYPE, mode=0o1777)
    archive.add("sealed", type=tarfile.DIRTYPE, mode=0o555)
    archive.add("sealed/file", b"x", mode=0o400)
    root = add(store, archive).root
    assert stat.S_IMODE((root / "usr/bin/su").stat().st_mode) == 0o755
    assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777
    assert stat.S_IMODE((root / "sealed").stat().st_mode) == 0o555
    assert (root / "sealed/file").stat().st_mtime == 1_000_000_000


def test_hard_links_stay_links(store: ImageStore) -> None:
    archive = Archive.with_image()
    archive.add("bin/a", b"x").add("bin/b", type=tarfile.LNKTYPE, linkname="bin/a")
    root = add(store, archive).root
    assert (root / "bin/a").samefile(root / "bin/b")


def test_images_get_ids_of_their_own(store: ImageStore) -> None:
    first = add(store, Archive.with_image(), "first")
    second = add(store, Archive.with_image().add("x"), "second")
    assert abs(first.id_base - second.id_base) >= ids.COUNT
    assert not first.id_base % ids.COUNT
    assert not second.id_base % ids.COUNT


def test_the_same_archive_keeps_its_ids_under_every_name(store: ImageStore) -> None:
    first = add(store, Archive.with_image(), "first")
    add(store, Archive.with_image().add("x"), "other")
    again = add(store, Archive.with_image(), "again")
    assert (again.digest, again.id_base) == (first.digest, first.id_base)


def test_ids_that_the_host_uses_are_skipped(tmp_path: Path) -> None:
    bases = range(0, 5 * ids.COUNT, ids.COUNT)
    taken = [range(5, 6), range(2 * ids.COUNT - 1, 2 * ids.COUNT + 1)]
    assert ids.free_base(bases, {3 * ids.COUNT}, taken) == 4 * ids.COUNT
    with pytest.raises(NbagentError):
        ids.free_base(bases, {3 * ids.COUNT, 4 * ids.COUNT}, taken)
    (tmp_path / "subuid").write_text("root:1879048192:65536\n# a comment\nbroken\n")
    found = list(ids.reserved([tmp_path / "subuid", tmp_path / "not-there"]))
    assert range(1879048192, 1879048192 + 65536) in found
    assert range(1) in found  # root


def retire(store: ImageStore, in_use: set[str] | None = None) -> list[str]:
    retired = store.retire(in_use or set())
    store.sweep()
    return retired


def test_a_tree_is_deleted_when_it_is_neither_used_nor_one_step_back(store: ImageStore) -> None:
    oldest = add(store, Archive.with_image())
    old = add(store, Archive.with_image().add("x"))
    assert retire(store) == []
    new = add(store, Archive.with_image().add("y"))
    assert (store.get("minimal"), store.former("minimal")) == (new, old.digest)
    assert retire(store, {oldest.digest}) == []
    assert oldest.root.is_dir()
    assert retire(store) == [oldest.digest]
    assert not oldest.root.parent.exists()
    assert old.root.is_dir() and new.root.is_dir()


def test_use_goes_back_and_forth(store: ImageStore) -> None:
    old = add(store, Archive.with_image())
    new = add(store, Archive.with_image().add("x"))
    assert store.use("minimal", old.digest[:13]) == old
    assert store.former("minimal") == new.digest
    assert retire(store) == []
    assert store.use("minimal", new.digest.removeprefix("sha256-")) == new
    assert store.use("minimal", new.digest).digest == new.digest
    assert store.former("minimal") == old.digest, "a second use of the same image keeps the previous one"


def test_use_names_an_image_after_another_name(store: ImageStore) -> None:
    tried = add(store, Archive.with_image(), "testing")
    assert store.use("stable", "testing").digest == tried.digest
    store.remove("testing")
    assert retire(store) == []
    assert store.get("stable").root.is_dir()


def test_use_of_an_unknown_or_ambiguous_reference_is_refused_and_changes_nothing(store: ImageStore) -> None:
    image = add(store, Archive.with_image())
    for digest in ("sha256-" + "ab" * 32, "sha256-" + "ac" * 32):
        shutil.copytree(image.root.parent, store.path / digest)
    for reference, message in (("no-such", "no image"), ("a", "no image"), ("abc", "no image"), ("../x", "no image"),
                            ("f" * 64, "no image"), ("", "no image")):
        with pytest.raises(ImageNotFound, match=message):
            store.use("minimal", reference)
    shutil.copytree(image.root.parent, store.path / ("sha256-" + "abab" + "f" * 60))
    with pytest.raises(ImageNotFound, match="more than one image"):
        store.use("minimal", "abab")
    assert store.get("minimal") == image


def test_other_writers_run_while_an_image_is_added_and_do_not_affect_it(
    store: ImageStore, tmp_path: Path
) -> None:
    add(store, Archive.with_image(), "other")
    old = add(store, Archive.with_image().add("x"), "other")

    class Slow:
        """A source whose layout is available after other writers have run."""

        @contextmanager
        def layout(self, staging: Path, id_base: int, limits: ImageArchiveLimits) -> Iterator[oci.Layout]:
            assert store.retire(set()) == []
            store.sweep()
            assert staging.is_dir(), "the staging directory was deleted while in use"
            assert abs(add(store, Archive.with_image().add("y"), "third").id_base - id_base) >= ids.COUNT
            with Layers().layer(Archive.with_image()).save(tmp_path / "layout") as layout:
                yield layout

    image = store.import_oci(Slow(), "slow")
    assert image.root.is_dir()
    assert len({image.id_base for image in store.list()}) == 3
    assert store.get("other") == old


def test_a_removed_name_is_unknown_and_its_tree_is_deleted(store: ImageStore) -> None:
    image = add(store, Archive.with_image())
    store.remove("minimal")
    with pytest.raises(ImageNotFound):
        store.get("minimal")
    with pytest.raises(ImageNotFound):
        store.remove("minimal")
    assert store.list() == []
    assert retire(store) == [image.digest]
    assert sorted(p.name for p in store.path.iterdir()) == [".lock", "former", "names"]


@pytest.mark.parametrize(
    "record",
    ["", "{", "[]", "{}", '{"format": 1}', '{"format": 99}', '{"format": 1, "id_base": "x", "manifest": {}}',
     '{"format": 1, "id_base": 1, "manifest": []}', '{"format": 1, "id_base": 1, "manifest": {"new": 1}}'],
)
def test_an_unreadable_image_does_not_affect_the_others(store: ImageStore, record: str) -> None:
    broken, whole = add(store, Archive.with_image(), "broken"), add(store, Archive.with_image().add("x"), "whole")
    (store.path / broken.digest / "image.json").write_text(record)
    assert [image.name for image in store.list()] == ["whole"]
    with pytest.raises(ImageInvalid):
        store.get("broken")
    assert retire(store) == []
    store.remove("broken")
    assert retire(store) == [broken.digest]
    assert store.get("whole") == whole


def test_an_image_that_the_disk_does_not_return_does_not_affect_the_others(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, whole = add(store, Archive.with_image(), "broken"), add(store, Archive.with_image().add("x"), "whole")
    read = Path.read_text

    def read_text(path: Path, *arguments: Any) -> str:
        if path.parent.name == broken.digest:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path, *arguments)

    monkeypatch.setattr(Path, "read_text", read_text)
    skipped: dict[str, Exception] = {}
    assert store.list(skipped.__setitem__) == [whole]
    assert [(name, getattr(error, "errno", None)) for name, error in skipped.items()] == [("broken", errno.EIO)]


def test_a_tree_is_not_retired_while_another_process_has_the_lock(store: ImageStore) -> None:
    image = add(store, Archive.with_image())
    store.remove("minimal")
    with (store.path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            retire(store)
    assert retire(store) == [image.digest]


def test_an_empty_store_has_no_image(tmp_path: Path) -> None:
    nowhere = ImageStore(tmp_path / "nowhere")
    assert nowhere.list() == []
    with pytest.raises(ImageNotFound):
        nowhere.get("minimal")
    assert not nowhere.path.exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "A", "x" * 64, "a\nb"])
def test_invalid_names_are_refused(store: ImageStore, tmp_path: Path, name: str) -> None:
    path = Archive.with_image().save(tmp_path / "a.tar")
    with pytest.raises(ImageInvalid):
        store.add(path, name)


def test_leftovers_of_a_killed_add_are_removed_by_the_next(store: ImageStore) -> None:
    leftover = store.path / ".staging-dead"
    leftover.mkdir(parents=True)
    (leftover / "rootfs").mkdir()
    add(store, Archive.with_image())
    assert not leftover.exists()


def test_concurrent_adds_get_distinct_ids(store: ImageStore, tmp_path: Path) -> None:
    paths = [Archive.with_image().add(f"file{n % 2}").save(tmp_path / f"{n}.tar") for n in range(6)]
    threads = [threading.Thread(target=store.add, args=(path, f"n{n}")) for n, path in enumerate(paths)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    images = store.list()
    assert len(images) == 6
    assert len({image.digest for image in images}) == len({image.id_base for image in images}) == 2


@pytest.mark.parametrize("name", ["/etc/x", "../x", "usr/../../x", "a/.."])
def test_names_that_lead_out_are_refused(store: ImageStore, name: str) -> None:
    assert repr(name) in refused(store, Archive.with_image().add(name, b"x"))
    assert not (store.path.parent / "x").exists()


@pytest.mark.parametrize("linkname", ["/etc/passwd", "../../../etc/passwd", "not/there", "etc", "link", ""])
def test_hard_links_lead_only_to_files_of_the_archive(store: ImageStore, linkname: str) -> None:
    archive = Archive.with_image().add("link", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    refused(store, archive.add("hard", type=tarfile.LNKTYPE, linkname=linkname))


def test_nothing_is_written_or_linked_through_a_symbolic_link(store: ImageStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("s")

    def trap() -> Archive:
        return Archive.with_image().add("trap", type=tarfile.SYMTYPE, linkname=str(outside))

    assert "trap" in refused(store, trap().add("trap/x", b"x"))
    refused(store, trap().add("trap/dir", type=tarfile.DIRTYPE))
    refused(store, trap().add("trap", type=tarfile.DIRTYPE))
    refused(store, trap().add("trap", b"x"))
    refused(store, trap().add("hard", type=tarfile.LNKTYPE, linkname="trap/secret"))
    assert [p.name for p in outside.iterdir()] == ["secret"]


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"Z"])
def test_special_files_are_refused(store: ImageStore, kind: bytes) -> None:
    archive = Archive.with_image().add("srv/dev/x", type=kind, devmajor=1, devminor=3)
    assert "srv/dev/x" in refused(store, archive)


@pytest.mark.parametrize("fields", [{"uid": 65536}, {"gid": 1 << 31}, {"uid": -1}])
def test_owners_outside_of_the_images_ids_are_refused(store: ImageStore, fields: dict[str, int]) -> None:
    assert "owner" in refused(store, Archive.with_image().add("x", **fields))


def test_an_entry_twice_is_refused(store: ImageStore) -> None:
    assert "twice" in refused(store, Archive.with_image().add("x", b"1").add("x", b"2"))


def test_limits_hold_for_bytes_entries_and_sparse_files(tmp_path: Path, owners: Owners) -> None:
    store = ImageStore(tmp_path / "images", chown=owners, limits=ImageArchiveLimits(unpacked_bytes=1 << 20, entries=20))
    assert "larger" in refused(store, Archive.with_image().add("big", bytes(1 << 20)))
    many = Archive.with_image()
    for number in range(20):
        many.add(f"f{number}")
    assert "entries" in refused(store, many)
    assert "entries" in refused(store, Archive.with_image().add("d/" * 30 + "f"))
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}
    content = b"1\n0\n1\n".ljust(512, b"\0") + b"x"
    assert "larger" in refused(store, Archive.with_image().add("sparse", content, pax_headers=sparse))


def test_a_huge_extended_header_is_refused_before_it_is_read(store: ImageStore) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    path = store.path.parent / "bomb.tar"
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4 << 20))
    with pytest.raises(ImageInvalid, match="extended header"):
        store.add(path, "minimal")


def test_extended_headers_upon_extended_headers_are_refused(store: ImageStore) -> None:
    header = tarfile.TarInfo("x")
    header.type = tarfile.XHDTYPE
    path = store.path.parent / "deep.tar"
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) * 1900 + bytes(1024))
    with pytest.raises(ImageInvalid):
        store.add(path, "minimal")


@pytest.mark.parametrize("content", [b"", b"not a tar", bytes(512), b"\x1f\x8bbroken", b"\xfd7zXZ\0broken"])
def test_a_file_that_is_not_an_archive_is_refused(store: ImageStore, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "junk").write_bytes(content)
    with pytest.raises(ImageInvalid):
        store.add(tmp_path / "junk", "minimal")


@pytest.mark.parametrize("at", [512 * 3, 700_000])
def test_a_damaged_or_cut_archive_is_refused(store: ImageStore, tmp_path: Path, at: int) -> None:
    whole = Archive.with_image().add("big", b"x" * 700_000).add("last", b"y").bytes()
    damaged = bytearray(whole)
    start = damaged.index(b"last\0")
    damaged[start : start + 4] = b"lost"  # without a new checksum
    for number, content in enumerate((bytes(damaged), whole[:at])):
        (tmp_path / f"{number}.tar").write_bytes(content)
        with pytest.raises(ImageInvalid):
            store.add(tmp_path / f"{number}.tar", "minimal")


def test_static_files_are_published_with_a_compressed_twin(store: ImageStore) -> None:
    image = add(store, Archive.with_image())
    main = image.static / "lab/main.js"
    twin = image.static / "lab/main.js.gz"
    smaller = image.static / "lab/main.js.br"
    assert gzip.decompress(twin.read_bytes()) == brotli.decompress(smaller.read_bytes()) == main.read_bytes()
    assert not (image.static / "lab/tiny.js.gz").exists()
    for path in (main, twin, smaller):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert path.stat().st_uid == os.geteuid()
        assert path.stat().st_mtime == 1_000_000_000
    assert stat.S_IMODE((image.static / "lab").stat().st_mode) == 0o755


def test_compressed_files_of_an_image_are_used_unless_they_are_of_a_former_version(store: ImageStore) -> None:
    def files(**times: int) -> Archive:
        archive = Archive.with_image()
        for suffix, time_s in times.items():
            archive.add(f"usr/share/lab/main.js.{suffix}", b"the image's own", mtime=time_s)
        return archive

    lab = add(store, files(br=1_000_000_000, gz=1_000_000_000)).static / "lab"
    assert (lab / "main.js.br").read_bytes() == (lab / "main.js.gz").read_bytes() == b"the image's own"
    lab = add(store, files(br=999_999_999, gz=1_000_000_001)).static / "lab"
    assert brotli.decompress((lab / "main.js.br").read_bytes()) == (lab / "main.js").read_bytes()
    assert gzip.decompress((lab / "main.js.gz").read_bytes()) == (lab / "main.js").read_bytes()


def test_files_beside_which_no_compressed_file_can_be_are_published(store: ImageStore) -> None:
    archive = Archive.with_image()
    archive.add("usr/share/lab/main.js.br/file", b"1")
    archive.add(f"usr/share/lab/{'n' * 252}.js", b"x" * 5000)
    lab = add(store, archive).static / "lab"
    assert {path.name[:10] for path in lab.iterdir()} == {"main.js", "main.js.br", "main.js.gz", "n" * 10, "tiny.js"}


def test_static_files_never_come_from_outside_the_image(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    archive = Archive.with_image()
    archive.add("usr/share/lab/leak.js", type=tarfile.SYMTYPE, linkname=str(tmp_path / "secret"))
    archive.add("usr/share/lab/dir", type=tarfile.SYMTYPE, linkname=str(tmp_path))
    assert sorted(p.name for p in (add(store, archive).static / "lab").iterdir()) == [
        "main.js",
        "main.js.br",
        "main.js.gz",
        "tiny.js",
    ]


def test_a_static_directory_that_is_a_link_is_refused(store: ImageStore) -> None:
    text = MANIFEST.replace("/usr/share/lab", "/out/lab")
    archive = Archive.with_image(text).add("out", type=tarfile.SYMTYPE, linkname="/usr/share")
    assert 'static."lab"' in refused(store, archive)


def test_hard_links_do_not_multiply_static_files_over_the_limit(tmp_path: Path, owners: Owners) -> None:
    store = ImageStore(tmp_path / "images", chown=owners, limits=ImageArchiveLimits(unpacked_bytes=1 << 20))
    archive = Archive.with_image().add("usr/share/lab/0.bin", bytes(200_000))
    for number in range(1, 9):
        archive.add(f"usr/share/lab/{number}.bin", type=tarfile.LNKTYPE, linkname="usr/share/lab/0.bin")
    assert "larger" in refused(store, archive)


def test_a_manifest_that_is_a_link_or_missing_or_huge_is_refused(store: ImageStore) -> None:
    refused(store, Archive().add("etc/passwd"))
    refused(store, Archive().add("etc/nbagent-image.toml", type=tarfile.SYMTYPE, linkname="/etc/passwd"))
    refused(store, Archive().add("etc/nbagent-image.toml", b"#" * (manifest.MAX_BYTES + 1)))
    refused(store, Archive().add("etc/nbagent-image.toml", b"\xff"))


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"pyhton": "x"}, "pyhton", "did you mean python?"),
        ({"python": "bin/python"}, "python", "absolute path"),
        ({"python": "/../python"}, "python", "absolute path"),
        ({"home": None}, "home", "/home/jovyan"),
        ({"user": "a b"}, "user", "jovyan"),
        ({"launch": "magic"}, "launch", '"exec"'),
        ({"environment": ["x"]}, "environment", "table"),
        ({"environment": {"A=B": "x"}}, "environment.A=B", "letters"),
        ({"environment": {"A": 1}}, "environment.A", "text"),
        ({"static": {"../x": "/usr"}}, "static.'../x'", "relative"),
        ({"static": {"lab": "share"}}, "static.'lab'", "absolute"),
    ],
)
def test_an_invalid_manifest_names_the_key_and_the_expected_value(
    change: dict[str, object], key: str, message: str
) -> None:
    good = manifest.to_mapping(manifest.parse(MANIFEST.encode()))
    with pytest.raises(ImageInvalid) as raised:
        manifest.from_mapping(good | change)
    assert key in str(raised.value)
    assert message in str(raised.value)


def test_the_record_of_an_image_is_json(store: ImageStore) -> None:
    image = add(store, Archive.with_image())
    record = json.loads((image.root.parent / "image.json").read_text())
    assert record["digest"] == image.digest
    assert record["id_base"] == image.id_base
    assert manifest.from_mapping(record["manifest"]) == manifest.parse(MANIFEST.encode())


OTHER = manifest.parse(MANIFEST.replace('"/home/jovyan"', '"/home/other"').encode())


def test_an_archive_is_added_with_a_manifest_of_its_own(store: ImageStore, tmp_path: Path) -> None:
    """As `docker export` writes it, without a manifest."""
    archive = Archive().add("usr/share/lab/main.js", b"1").save(tmp_path / "bare.tar")
    with pytest.raises(ImageInvalid, match="--manifest"):
        store.add(archive, "mine")
    image = store.add(archive, "mine", OTHER)
    assert (image.home, (image.root / "usr/share/lab/main.js").read_bytes()) == ("/home/other", b"1")
    assert store.add(archive, "again", OTHER).digest == image.digest


def test_an_image_gets_another_file_without_a_copy_of_the_others(store: ImageStore, tmp_path: Path) -> None:
    lower = Archive.with_image().add("home/jovyan", type=tarfile.DIRTYPE, mode=0o750, uid=1000, gid=100)
    lower.add("home/jovyan/one.ipynb", b"one", uid=1000, gid=100).add("home/jovyan/old.ipynb", b"old")
    first = store.add(lower.save(tmp_path / "x.tar"), "mine")
    layer = Archive().add("home/jovyan/one.ipynb", b"new", mode=0o640, uid=1000, gid=100)
    layer.add("home/jovyan/.wh.old.ipynb").add("srv/data/added", b"added")
    second = store.use("mine", "mine", layer=layer.save(tmp_path / "layer.tar"))
    home = second.root / "home/jovyan"
    assert [path.name for path in home.iterdir()] == ["one.ipynb"] and (home / "one.ipynb").read_text() == "new"
    assert (second.root / "srv/data/added").read_text() == "added"
    assert (second.root / "usr/share/lab/main.js").samefile(first.root / "usr/share/lab/main.js")
    # Directories keep their modes, and get them where they are new.
    modes = {name: stat.S_IMODE((second.root / name).stat().st_mode) for name in ("home/jovyan", "srv/data")}
    assert modes == {"home/jovyan": 0o750, "srv/data": 0o755}
    assert sorted(path.name for path in (first.root / "home/jovyan").iterdir()) == ["old.ipynb", "one.ipynb"]
    assert (first.root / "home/jovyan/one.ipynb").read_text() == "one"
    assert (second.home, second.digest != first.digest, store.former("mine")) == (first.home, True, first.digest)
    again = store.use("mine", first.digest.removeprefix("sha256-"), layer=tmp_path / "layer.tar")
    assert again.digest == second.digest
    with_manifest = store.use("mine", "mine", OTHER, tmp_path / "layer.tar")
    assert with_manifest.home == "/home/other"


@pytest.mark.parametrize("layer", [
    Archive().add("../x", b""), Archive().add("dev/x", type=tarfile.CHRTYPE).add("x", type=tarfile.CHRTYPE),
    Archive().add("x", b"", uid=70000),
])
def test_a_hostile_layer_is_refused_and_leaves_the_image(store: ImageStore, tmp_path: Path, layer: Archive) -> None:
    first = store.add(Archive.with_image().save(tmp_path / "x.tar"), "mine")
    with pytest.raises(ImageInvalid):
        store.use("mine", "mine", layer=layer.save(tmp_path / "layer.tar"))
    assert store.get("mine").digest == first.digest and store.digests() == [first.digest]


def test_an_image_gets_another_manifest_without_a_copy_of_its_files(store: ImageStore, tmp_path: Path) -> None:
    first = store.add(Archive.with_image().save(tmp_path / "x.tar"), "mine")
    second = store.use("mine", "mine", OTHER)
    assert (second.home, second.digest == first.digest, second.id_base) == ("/home/other", False, first.id_base)
    file = "usr/share/lab/main.js"
    assert (second.root / file).samefile(first.root / file)
    assert (second.static / "lab/main.js").exists()
    assert store.former("mine") == first.digest
    digits = first.digest.removeprefix("sha256-")[:20]
    assert store.use("mine", digits, OTHER).digest == second.digest
    # Neither depends on the other.
    store.use("other", digits)
    store.remove("mine")
    assert second.digest in store.retire(set())
    store.sweep()
    assert (store.get("other").root / file).exists()


def with_path(path: str) -> str:
    return MANIFEST.replace("[environment]", f'[environment]\nPATH = "{path}"')


def test_login_shells_have_the_path_of_the_manifest(store: ImageStore, owners: Owners, tmp_path: Path) -> None:
    archive = Archive.with_image(with_path("/opt/x/bin:/a b"))
    archive.add("etc/profile", b'if [ 1 ]; then\n  PATH="/usr/bin"\nfi\n')
    archive.add("etc/profile.d", type=tarfile.DIRTYPE, mode=0o755)
    first = add(store, archive)
    second = store.use("other", "minimal", manifest.parse(with_path("/opt/y/bin").encode()))
    for root, path in ((first.root, "/opt/x/bin:/a b"), (second.root, "/opt/y/bin")):
        script = root / "etc/profile.d/00-nbagent-path.sh"
        command = ["sh", "-c", '. "$1"; echo "$PATH"', "sh", script]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == path + "\n"
        assert owners.recorded[script.name, script.stat().st_ino] == first.id_base
        assert stat.S_IMODE(script.stat().st_mode) == 0o644


def test_no_script_for_login_shells_is_written_without_need_or_through_a_link(store: ImageStore) -> None:
    mine = with_path("/opt/x/bin")
    archives = {
        "without": Archive.with_image(mine).add("etc/profile", b"umask 0\n").add("etc/profile.d", type=tarfile.DIRTYPE),
        "flat": Archive.with_image(mine).add("etc/profile", b"PATH=/usr/bin\n"),
        "linked": Archive.with_image(mine).add("etc/profile", b"PATH=/usr/bin\n").add("srv", type=tarfile.DIRTYPE)
        .add("etc/profile.d", type=tarfile.SYMTYPE, linkname="../srv"),
        "plain": Archive.with_image().add("etc/profile", b"PATH=/x\n").add("etc/profile.d", type=tarfile.DIRTYPE),
    }
    for name, archive in archives.items():
        assert not list(add(store, archive, name).root.rglob("*nbagent-path*")), name
