# SPDX-License-Identifier: BSD-3-Clause
"""Import of container images: layers over each other, hostile ones too, and the manifest from the configuration."""

from __future__ import annotations

import gzip
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_image_store import Owners

from archives import MANIFEST, Archive, Layers
from nbagent.core.errors import BadRequest, ConfigError, FetchFailed, ImageInvalid
from nbagent.image import adaptation, fetch, logins, manifest
from nbagent.image.archive import ImageArchiveLimits
from nbagent.image.fetch import DockerArchive, OciDirectory, Registry
from nbagent.image.store import Image, ImageStore

DIRECTORY = {"type": tarfile.DIRTYPE, "mode": 0o755}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    yield ImageStore(tmp_path / "images", chown=Owners())
    assert not list((tmp_path / "images").glob(".staging-*")), "a staging directory was left"


def import_image(store: ImageStore, image: Layers, given: manifest.Manifest | None = None) -> Image:
    layout = store.path.parent / f"layout{len(list(store.path.parent.iterdir()))}"
    image.save(layout).close()
    return store.import_oci(OciDirectory(layout, None), "mine", given)


def refused(store: ImageStore, image: Layers) -> str:
    with pytest.raises(ImageInvalid) as raised:
        import_image(store, image)
    assert store.list() == []
    return str(raised.value)


def over(*layers: Archive) -> Layers:
    """An image with a manifest in its first layer, below these layers."""
    image = Layers().layer(Archive.with_image())
    for layer in layers:
        image.layer(layer)
    return image


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_later_layers_replace_entries_of_earlier_ones(store: ImageStore) -> None:
    lower = Archive().add("a", b"old").add("b", b"kept").add("d", **DIRECTORY).add("d/x", b"1").add("e/y", b"2")
    upper = Archive().add("a", b"new", mode=0o640).add("d", b"a file now").add("e", type=tarfile.DIRTYPE, mode=0o750)
    root = import_image(store, over(lower, upper)).root
    assert [(root / name).read_text() for name in ("a", "b", "d", "e/y")] == ["new", "kept", "a file now", "2"]
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((root / "e").stat().st_mode) == 0o750


def test_layers_are_applied_in_the_order_of_the_image(store: ImageStore) -> None:
    one, other = Archive().add("a", b"1"), Archive().add("a", b"2")
    assert (import_image(store, over(one, other)).root / "a").read_text() == "2"
    assert (import_image(store, over(Archive().add("a", b"2"), Archive().add("a", b"1"))).root / "a").read_text() == "1"


def test_a_whiteout_removes_entries_of_lower_layers_only(store: ImageStore) -> None:
    lower = Archive().add("d/x", b"x").add("d/deep/y", b"y").add("d/z", b"z").add("f", b"f")
    # The new d/x precedes its whiteout, which concerns the lower layers only.
    upper = Archive().add("d/x", b"new").add("d/.wh.x").add("d/.wh.deep").add(".wh.f").add("not/.wh.there")
    root = import_image(store, over(lower, upper)).root
    assert (root / "d/x").read_text() == "new"
    assert {name for name in names(root) if name[0] in "dfn"} == {"d", "d/x", "d/z"}


def test_an_opaque_directory_hides_all_below_and_nothing_beside(store: ImageStore) -> None:
    lower = Archive().add("d/x", b"x").add("d/deep/y", b"y").add("e/z", b"z")
    upper = Archive().add("d/new", b"n").add("d/deep/.wh..wh..opq").add("d/.wh..wh..opq")
    root = import_image(store, over(lower, upper)).root
    assert {name for name in names(root) if name.split("/")[0] in ("d", "e")} == {"d", "d/new", "e", "e/z"}


def test_a_removed_directory_can_be_created_again(store: ImageStore) -> None:
    lower = Archive().add("d", type=tarfile.DIRTYPE, mode=0o700).add("d/x", b"1").add("d/sub/y", b"2")
    root = import_image(store, over(lower, Archive().add(".wh.d"), Archive().add("d/sub/z", b"3"))).root
    assert {name for name in names(root) if name.startswith("d")} == {"d", "d/sub", "d/sub/z"}
    assert stat.S_IMODE((root / "d").stat().st_mode) == 0o755


@pytest.mark.parametrize("name", [".wh.", "d/.wh.", "d/.wh..", "d/.wh...", "d/.wh..wh.plnk", ".wh..wh.x",
                                  ".wh.d/x", "d/.wh.y/x"])
def test_whiteouts_of_invalid_names_are_refused(store: ImageStore, name: str) -> None:
    assert repr(name) in refused(store, over(Archive().add("d/x", b"x"), Archive().add(name)))


@pytest.mark.parametrize("name", ["../.wh.victim", "/.wh.victim", "d/../../.wh.victim"])
def test_a_name_that_leads_out_is_refused_in_any_layer(store: ImageStore, tmp_path: Path, name: str) -> None:
    (tmp_path / "victim").write_text("v")
    refused(store, over(Archive().add("d/x", b"x"), Archive().add(name, b"owned")))
    assert (tmp_path / "victim").read_text() == "v"


@pytest.mark.parametrize("target", ["{outside}", "../../../../../../../..{outside}", "d/../../../..{outside}", "hop"])
@pytest.mark.parametrize("name", ["trap/.wh.victim", "trap/.wh..wh..opq", "trap/victim", "trap/sub/x", "trap/hard"])
def test_a_link_to_the_outside_stays_in_the_image(store: ImageStore, tmp_path: Path, name: str, target: str) -> None:
    """A layer that writes through it writes below the image's root, as after chroot(2)."""
    (tmp_path / "victim").write_text("v")
    trap = Archive().add("d/x", b"x").add("hop", type=tarfile.SYMTYPE, linkname=str(tmp_path))
    trap.add("trap", type=tarfile.SYMTYPE, linkname=target.format(outside=tmp_path))
    hard = {"type": tarfile.LNKTYPE, "linkname": "trap/victim"} if name == "trap/hard" else {}
    if hard:
        assert "does not exist" in refused(store, over(trap, Archive().add(name, **hard)))
    else:
        root = import_image(store, over(trap, Archive().add(name, b"owned"))).root
        inside = root / str(tmp_path).lstrip("/") / name.removeprefix("trap/")
        assert ".wh." in name or inside.read_text() == "owned"
    assert (tmp_path / "victim").read_text() == "v"
    assert {path.name for path in tmp_path.iterdir()} <= {"victim", "images", "layout1"}


def test_a_layer_writes_through_the_links_of_lower_layers(store: ImageStore) -> None:
    """As containerd does: /bin, /lib and /var/run are links in Debian's images."""
    lower = Archive().add("usr/bin/sh", b"sh").add("usr/bin/old", b"old").add("run/lock", **DIRECTORY)
    lower.add("bin", type=tarfile.SYMTYPE, linkname="usr/bin").add("var/run", type=tarfile.SYMTYPE, linkname="/run")
    lower.add("far", type=tarfile.SYMTYPE, linkname="var/run/../../bin")
    upper = Archive().add("bin/tool", b"tool", mode=0o755).add("var/run/x/y", b"y").add("far/.wh.old")
    upper.add("bin/again", type=tarfile.LNKTYPE, linkname="far/sh").add("new/.wh.gone").add("var/run/lock", **DIRECTORY)
    root = import_image(store, over(lower, upper)).root
    assert (root / "bin").is_symlink() and (root / "var/run").is_symlink()
    assert {path.name for path in (root / "usr/bin").iterdir()} == {"sh", "tool", "again"}
    assert (root / "usr/bin/again").samefile(root / "usr/bin/sh")
    assert (root / "run/x/y").read_text() == "y"


@pytest.mark.parametrize("before", ["link", "file"])
def test_a_directory_that_replaces_a_link_hides_nothing_elsewhere(store: ImageStore, before: str) -> None:
    """Docker writes an opaque directory for each directory that replaces another kind of entry."""
    lower = Archive().add("d/kept", b"k")
    fields = {"type": tarfile.SYMTYPE, "linkname": "d"} if before == "link" else {}
    lower.add("x", **fields)
    upper = Archive().add("x", **DIRECTORY).add("x/.wh..wh..opq").add("x/.wh.kept").add("x/new", b"n")
    root = import_image(store, over(lower, upper)).root
    assert ((root / "d/kept").read_text(), (root / "x/new").read_text()) == ("k", "n")
    assert {path.name for path in (root / "x").iterdir()} == {"new"}


@pytest.mark.parametrize("links", [
    {"a": "b", "b": "a"}, {"a": "a/a/a"}, {f"a{n or ''}": f"a{n + 1}" for n in range(50)}, {"a": "d/" * 150},
    {"a": "x"},
])
def test_links_without_end_and_those_to_files_are_refused(store: ImageStore, links: dict[str, str]) -> None:
    lower = Archive().add("x", b"file")
    for name, target in links.items():
        lower.add(name, type=tarfile.SYMTYPE, linkname=target)
    refused(store, over(lower, Archive().add("a/y", b"y")))


def test_a_link_is_replaced_and_never_followed(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("s")
    outside = str(tmp_path / "outside")
    lower = Archive()
    for name in ("file", "directory", "gone"):
        lower.add(name, type=tarfile.SYMTYPE, linkname=outside + ("/secret" if name == "file" else ""))
    upper = Archive().add("file", b"mine").add("directory", **DIRECTORY).add("directory/x", b"x").add(".wh.gone")
    root = import_image(store, over(lower, upper)).root
    assert (root / "file").read_text() == "mine"
    assert (root / "directory/x").read_text() == "x"
    assert not (root / "gone").is_symlink()
    assert [(path.name, path.read_text()) for path in (tmp_path / "outside").iterdir()] == [("secret", "s")]


def test_hard_links_reach_into_lower_layers_and_never_write_through(store: ImageStore) -> None:
    lower = Archive().add("a", b"one").add("b", type=tarfile.LNKTYPE, linkname="a")
    upper = Archive().add("c", type=tarfile.LNKTYPE, linkname="a").add("b", b"two").add("d/e", b"x")
    root = import_image(store, over(lower, upper)).root
    assert (root / "a").samefile(root / "c")
    assert ((root / "a").read_text(), (root / "b").read_text()) == ("one", "two")


@pytest.mark.parametrize("linkname", ["gone", "../victim", "/etc/passwd", "d", "c", "link"])
def test_hard_links_to_anything_but_a_file_of_the_image_are_refused(store: ImageStore, linkname: str) -> None:
    lower = Archive().add("gone", b"x").add("d/x").add("link", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    upper = Archive().add(".wh.gone").add("c", type=tarfile.LNKTYPE, linkname=linkname)
    refused(store, over(lower, upper))


def test_a_device_in_a_layer_is_refused_and_set_id_bits_are_dropped(store: ImageStore) -> None:
    for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        assert "device" in refused(store, over(Archive().add("srv/sda", type=kind, devmajor=8)))
    root = import_image(store, over(Archive().add("su", b"x", mode=0o6755))).root
    assert stat.S_IMODE((root / "su").stat().st_mode) == 0o755


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("name", ["dev/console", "dev/pts/ptmx", "run/initctl"])
def test_a_device_of_a_running_system_is_left_out(store: ImageStore, name: str, kind: bytes) -> None:
    """`docker export`, buildah and kaniko pack /dev/console; a slot has its own /dev and /run."""
    layer = Archive().add("dev", **DIRECTORY).add(name, type=kind, devmajor=5, devminor=1).add("dev/shm", **DIRECTORY)
    image = import_image(store, over(layer))
    assert not (image.root / name).exists()
    assert (image.root / "dev/shm").is_dir()


def test_the_limits_are_for_all_layers_together(tmp_path: Path) -> None:
    limits = ImageArchiveLimits(unpacked_bytes=1 << 20, entries=200)
    store = ImageStore(tmp_path / "images", chown=Owners(), limits=limits)
    half = bytes(600_000)
    assert "larger" in refused(store, over(Archive().add("a", half), Archive().add("a", half)))
    assert "larger" in refused(store, over().layer(bytes(2 << 20)))
    crowd = [Archive() for _ in range(3)]
    for number in range(80):
        for layer in crowd:
            layer.add(f"{number}")
    assert "entries" in refused(store, over(*crowd))
    whiteouts = Archive()
    for number in range(201):
        whiteouts.add(f".wh.{number}")
    assert "entries" in refused(store, over(whiteouts))
    assert "deep" in refused(store, over(Archive().add("d/" * 2000 + "f")))


def test_a_large_file_is_unpacked_and_an_excessive_size_in_a_header_is_refused(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", chown=Owners(), limits=ImageArchiveLimits(unpacked_bytes=8 << 20))
    assert (import_image(store, over(Archive().add("big", bytes(3 << 20)))).root / "big").stat().st_size == 3 << 20
    for kind in (tarfile.REGTYPE, tarfile.CONTTYPE, b"Z"):
        header = tarfile.TarInfo(".wh.x")
        header.type, header.size = kind, 1 << 60
        if store.list():
            store.remove("mine")
        refused(store, over().layer(header.tobuf(tarfile.GNU_FORMAT) + bytes(2048)))


def test_layers_of_every_packing_and_empty_ones(store: ImageStore) -> None:
    image = over().layer(Archive().add("plain", b"x").bytes(), bytes).layer(bytes(1024)).layer(bytes(1024), bytes)
    assert (import_image(store, image).root / "plain").read_text() == "x"


@pytest.mark.parametrize("content", [
    b"", b"no tar", gzip.compress(b"no tar"), gzip.compress(bytes(4096))[:20],
], ids=["empty", "no tar", "no tar in gzip", "a part of gzip"])
def test_a_blob_that_is_not_a_tar_archive_is_refused(store: ImageStore, content: bytes) -> None:
    refused(store, over().layer(content, bytes))


def test_the_digest_covers_a_given_manifest(store: ImageStore, tmp_path: Path) -> None:
    image = import_image(store, over())
    layout = next(path for path in tmp_path.iterdir() if path.name.startswith("layout"))
    (named,) = json.loads((layout / "index.json").read_text())["manifests"]
    assert image.digest == named["digest"].replace(":", "-")
    other = manifest.parse(MANIFEST.replace('"jovyan"', '"maria"').encode())
    given = store.import_oci(OciDirectory(layout, None), "given", other)
    assert (given.user, given.root == image.root) == ("maria", False)
    assert store.import_oci(OciDirectory(layout, "latest"), "again").root == image.root


def test_a_tag_selects_one_of_several_images(store: ImageStore, tmp_path: Path) -> None:
    for tag in ("one", "two"):
        over(Archive().add("which", tag.encode())).save(tmp_path / "layout", tag).close()
    assert (store.import_oci(OciDirectory(tmp_path / "layout", "two"), "x").root / "which").read_text() == "two"
    for tag in (None, "three"):
        with pytest.raises(ImageInvalid, match="no image"):
            store.import_oci(OciDirectory(tmp_path / "layout", tag), "x")


def test_an_image_for_another_architecture_is_refused(store: ImageStore) -> None:
    image = over()
    image.architecture = "s390x"
    assert "linux/s390x" in refused(store, image)


def damaged(layout: Path, how: str) -> None:
    index = json.loads((layout / "index.json").read_text())
    (named,) = index["manifests"]
    blobs = layout / "blobs/sha256"
    document = json.loads((blobs / named["digest"][7:]).read_text())
    layer = blobs / document["layers"][0]["digest"][7:]
    if how == "a blob that is a link":
        layer.rename(layout / "elsewhere")
        layer.symlink_to(layout / "elsewhere")
    elif how == "a blob that is a pipe":
        layer.unlink()
        os.mkfifo(layer)
    elif how == "another content":
        layer.write_bytes(layer.read_bytes() + b"x")
    elif how == "a blob that is not there":
        layer.unlink()
    elif how == "another manifest":
        (blobs / named["digest"][7:]).write_text(json.dumps(document | {"layers": []}))
    elif how == "a digest that leads out":
        (layout / "index.json").write_text(json.dumps({"manifests": [named | {"digest": "sha256:../../../x"}]}))
    elif how == "no JSON":
        (layout / "index.json").write_text("[" * 100_000)
    elif how == "no objects":
        (layout / "index.json").write_text('{"manifests": ["x"]}')
    elif how == "another kind":
        (layout / "index.json").write_text(json.dumps({"manifests": [named | {"mediaType": "text/plain"}]}))


@pytest.mark.parametrize("how", [
    "a blob that is a link", "a blob that is a pipe", "another content", "a blob that is not there",
    "another manifest", "a digest that leads out", "no JSON", "no objects", "another kind",
])
def test_an_inconsistent_layout_is_refused(store: ImageStore, tmp_path: Path, how: str) -> None:
    over().save(tmp_path / "layout").close()
    damaged(tmp_path / "layout", how)
    with pytest.raises(ImageInvalid):
        store.import_oci(OciDirectory(tmp_path / "layout", None), "x")
    assert store.list() == []


def bare(*extra: tuple[str, bytes], **config: Any) -> Layers:
    """An image without a manifest for nbagent."""
    archive = Archive().add("etc/passwd", b"root:x:0:0::/root:/bin/sh\nnb:x:1000:100::/home/nb:/bin/bash\nbroken\n")
    for name, content in extra:
        archive.add(name, content)
    return Layers(**config).layer(archive)


def test_an_image_with_jupyterlab_is_a_notebook_server(store: ImageStore) -> None:
    image = import_image(store, bare(
        ("opt/conda/bin/jupyter-lab", b"#!/opt/conda/bin/python3.12\nimport sys\n"),
        Env=["PATH=/opt/conda/bin:/bin", "LANG=C.UTF-8", "BAD.NAME=x", "HOME=/home/nb"],
        User="1000", WorkingDir="/srv/work/", Entrypoint=["tini", "--"], Cmd=["start-notebook.sh"],
    ))
    assert (image.python, image.command, image.port) == ("/opt/conda/bin/python3.12", (), None)
    assert (image.user, image.home, image.directory) == ("nb", "/home/nb", "/srv/work")
    assert dict(image.environment) == {"PATH": "/opt/conda/bin:/bin", "LANG": "C.UTF-8", "HOME": "/home/nb"}
    assert (image.ready, image.url) == ("api", "lab?token={token}")


LINK, PYTHON = {"type": tarfile.SYMTYPE}, ("opt/venv/bin/python", b"ELF")
POLYGLOT = b"#!/bin/sh\n'''exec' %b \"$0\" \"$@\"\n' '''\n# -*- coding: utf-8 -*-\nimport sys\n"


@pytest.mark.parametrize(("script", "python"), [
    (b"#!/opt/venv/bin/python3 -I\nimport sys\n", "/opt/venv/bin/python3"),
    (b"#! /opt/venv/bin/python\nimport sys\n", "/opt/venv/bin/python"),
    (b"#!/usr/bin/env python3\nimport sys\n", "/usr/bin/python3"),
    (b"#!/usr/bin/env -S X=1 python -I -s\nimport sys\n", "/opt/venv/bin/python"),
    (POLYGLOT % b"/a/very/long/prefix/bin/python3.11", "/a/very/long/prefix/bin/python3.11"),
    (POLYGLOT % b'"/a path/bin/python"', "/a path/bin/python"),
    # uv's form for an environment that can be moved.
    (POLYGLOT % b"\"$(dirname -- \"$(realpath -- \"$0\")\")\"/'python'", "/opt/venv/bin/python"),
    (b"#!/bin/bash -e\nexport A=1\n  exec /opt/other/bin/python -m jupyterlab \"$@\"\n", "/opt/other/bin/python"),
    (b'#!/bin/sh\nexec "/opt/conda/bin/jupyter-lab" "$@"\n', "/opt/conda/bin/python3.12"),
    (b"#!/bin/sh\nexec /opt/venv/bin/jupyter-lab\n", "/opt/venv/bin/python"),  # itself
    (b"\x7fELF of pixi", "/opt/venv/bin/python"),
])
def test_the_interpreter_of_jupyterlab_is_found_in_every_form(store: ImageStore, script: bytes, python: str) -> None:
    image = import_image(store, bare(
        ("opt/venv/bin/jupyter-lab", script), PYTHON, ("usr/bin/python3", b"ELF"),
        ("opt/conda/bin/jupyter-lab", b"#!/opt/conda/bin/python3.12\n"),
        Env=["PATH=/opt/venv/bin:/usr/bin"], Entrypoint=["tini"],
    ))
    assert image.python == python
    assert [note for note in image.notes if "entry point (tini)" in note]


@pytest.mark.parametrize("target", [
    "/opt/venv/bin/jupyter-lab", "../../../opt/venv/bin/jupyter-lab", "../hop/jupyter-lab",
])
@pytest.mark.parametrize("script", [b"#!/opt/venv/bin/python\n", b"\x7fELF"])
def test_the_jupyter_command_may_be_a_link(store: ImageStore, target: str, script: bytes) -> None:
    layer = Archive().add("usr/local/bin/jupyter-lab", **LINK, linkname=target).add(*PYTHON)
    layer.add("opt/venv/bin/jupyter-lab", script).add("usr/local/hop", **LINK, linkname="/opt/venv/bin")
    assert import_image(store, Layers(Cmd=["x"]).layer(layer)).python == "/opt/venv/bin/python"


@pytest.mark.parametrize("target", ["/etc/passwd", "jupyter-lab", "/no/such", "../../../../../../{outside}"])
def test_a_jupyter_command_that_leads_nowhere_is_none(store: ImageStore, tmp_path: Path, target: str) -> None:
    (tmp_path / "script").write_text("#!/outside/python\n")
    layer = Archive().add("usr/bin/jupyter-lab", **LINK, linkname=target.format(outside=tmp_path / "script"))
    assert import_image(store, Layers(Cmd=["x"]).layer(layer)).command == ("x",)


@pytest.mark.parametrize(("prefix", "config"), [
    ("/opt/venv", {"Cmd": ["/opt/venv/bin/jupyter", "lab", "--ip=0.0.0.0"]}),
    ("/opt/venv", {"Entrypoint": ["/usr/bin/tini", "--"], "Cmd": ["/opt/venv/bin/python3", "-m", "jupyterlab"]}),
    ("/opt/venv", {"Cmd": ["/bin/sh", "-c", ". /opt/venv/bin/activate && jupyter lab --allow-root"]}),
    ("/opt/venv", {"Cmd": ["jupyter", "lab"], "Env": ["VIRTUAL_ENV=/opt/venv/", "PATH=/usr/bin:"]}),
    ("/app/.venv", {"Cmd": ["/bin/uv", "run", "jupyter", "lab", "--ip=0.0.0.0"], "WorkingDir": "/app/"}),
    ("/app/.pixi/envs/default", {"Entrypoint": ["pixi", "run"], "Cmd": ["lab"], "WorkingDir": "/app"}),
    # micromamba's image: its entry point activates the environment, and PATH is Debian's.
    ("/opt/conda", {"Entrypoint": ["/usr/local/bin/_entrypoint.sh"], "Cmd": ["jupyter", "lab"],
                    "Env": ["MAMBA_ROOT_PREFIX=/opt/conda", "ENV_NAME=base"]}),
    ("/opt/conda/envs/course", {"Entrypoint": ["conda", "run", "--no-capture-output", "-n", "course"],
                                "Cmd": ["jupyter", "lab"], "Env": ["PATH=/opt/conda/bin:/usr/bin"]}),
    ("/opt/conda/envs/course", {"Cmd": ["bash", "-c", "source activate course; jupyter lab"],
                                "Env": ["PATH=/opt/conda/bin:/usr/bin"]}),
    ("/opt/conda/envs/course", {"Cmd": [
        "/bin/bash", "-c", "source /opt/conda/etc/profile.d/conda.sh && conda activate course && exec jupyter lab"]}),
])
def test_jupyterlab_is_found_in_an_environment_that_the_images_command_names(
    store: ImageStore, prefix: str, config: dict[str, Any]
) -> None:
    image = import_image(store, bare(
        (f"{prefix[1:]}/bin/jupyter-lab", b"#!%b/bin/python3\n" % prefix.encode()), (f"{prefix[1:]}/bin/python3", b""),
        ("usr/bin/python3", b""), ("opt/conda/bin/python3", b""), **config,
    ))
    assert (image.python, image.command) == (f"{prefix}/bin/python3", ())
    assert image.environment["PATH"].startswith(f"{prefix}/bin:") and "/usr/bin" in image.environment["PATH"]


def test_a_command_for_slots_is_kept_and_one_that_has_no_base_path_is_named(store: ImageStore) -> None:
    files = ("opt/venv/bin/jupyter-lab", b"#!/opt/venv/bin/python\n"), PYTHON
    command = ["/opt/venv/bin/serve", "--base", "{base_path}"]
    image = import_image(store, bare(*files, Cmd=command))
    assert (image.command, image.notes) == (tuple(command), ())
    image = import_image(store, bare(Cmd=["jupyter", "notebook"]))
    assert image.command == ("jupyter", "notebook")
    (note,) = image.notes
    assert "jupyter notebook" in note and "{base_path}" in note


def modes(root: Path, *paths: str) -> list[str]:
    return [f"{stat.S_IMODE((root / path).stat().st_mode):o}" for path in paths]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to other owners")
def test_files_of_the_images_user_are_readable_in_slots_and_those_of_others_are_not(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images")
    layer = Archive().add("etc/passwd", b"nb:x:1000:100::/home/nb:/bin/bash\n").add("etc/shadow", b"", mode=0o600)
    layer.add("opt/app", type=tarfile.DIRTYPE, mode=0o700, uid=1000).add("opt/app/run", b"", mode=0o711, uid=1000)
    layer.add("opt/data", b"", mode=0o640, gid=100).add("opt/other", b"", mode=0o600, uid=1001)
    layer.add("opt/mine", b"", mode=0o206, uid=1000).add("opt/link", **LINK, linkname="/etc/shadow", uid=1000)
    image = import_image(store, Layers(Cmd=["x"], User="1000").layer(layer))
    assert modes(image.root, "opt/app", "opt/app/run", "opt/data", "opt/other", "opt/mine", "etc/shadow") == [
        "705", "715", "644", "600", "206", "600"]
    assert any("3 files and directories" in note for note in image.notes)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to other owners")
def test_an_interpreter_below_root_can_be_reached_in_slots(tmp_path: Path) -> None:
    """uv installs interpreters into /root/.local when an image is built as root."""
    store = ImageStore(tmp_path / "images")
    private, uv = {"type": tarfile.DIRTYPE, "mode": 0o700}, "root/.local/share/uv/python/cpython-3.13"
    layer = Archive().add("root", **private).add("root/.ssh", **private).add("root/.ssh/id", b"key", mode=0o600)
    layer.add("root/.local", **private).add(f"{uv}/bin/python3.13", b"ELF", mode=0o700)
    layer.add(f"{uv}/lib/os.py", b"", mode=0o600).add("srv/app/.venv/bin/python", **LINK, linkname="python3")
    layer.add("srv/app/.venv/bin/python3", **LINK, linkname="/root/uv/bin/python3.13")
    layer.add("root/uv", **LINK, linkname=f"/{uv}").add("etc/shadow", b"", mode=0o600)
    layer.add("srv/app/.venv/bin/jupyter-lab", b"#!/srv/app/.venv/bin/python\n", mode=0o755)
    image = import_image(store, Layers(Cmd=["x"], Env=["PATH=/srv/app/.venv/bin"]).layer(layer))
    assert image.python == "/srv/app/.venv/bin/python"
    assert modes(image.root, "root", "root/.local", f"{uv}/bin/python3.13", f"{uv}/lib/os.py") == [
        "701", "701", "705", "604"]
    assert modes(image.root, "root/.ssh", "root/.ssh/id", "etc/shadow") == ["700", "600", "600"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to other owners")
@pytest.mark.parametrize(("directory", "expected"), [
    ("/root/course", ["701", "705", "604", "705", "604", "700"]),
    ("/work", ["701", "705", "604", "705", "604", "700"]),  # a link to it
    ("/root", ["705", "705", "604", "705", "604", "705"]),
    ("/root/no/such", ["701", "700", "600", "700", "600", "700"]),
    ("/etc", ["700", "700", "600", "700", "600", "700"]),
])
def test_the_working_directory_of_roots_image_can_be_read_in_slots(
    tmp_path: Path, directory: str, expected: list[str]
) -> None:
    store = ImageStore(tmp_path / "images")
    private = {"type": tarfile.DIRTYPE, "mode": 0o700}
    layer = Archive().add("root", **private).add("root/other", **private).add("root/course", **private)
    layer.add("root/course/a.ipynb", b"", mode=0o600).add("root/course/data", **private)
    layer.add("root/course/data/x.csv", b"", mode=0o600).add("work", **LINK, linkname="/root/course")
    layer.add("etc/shadow", b"", mode=0o600)
    image = import_image(store, Layers(Cmd=["x"], WorkingDir=directory).layer(layer))
    paths = ("root", "root/course", "root/course/a.ipynb", "root/course/data", "root/course/data/x.csv", "root/other")
    assert modes(image.root, *paths, "etc/shadow") == [*expected, "600"]
    assert image.directory == directory


def test_a_working_directory_that_the_image_does_not_have_is_made(store: ImageStore) -> None:
    layer = Archive().add("etc/passwd", b"nb:x:1000:100::/home/nb:/bin/bash\n").add("data", **LINK, linkname="/srv")
    image = import_image(store, Layers(Cmd=["x"], User="nb", WorkingDir="/data/deep/er").layer(layer))
    assert modes(image.root, "srv", "srv/deep", "srv/deep/er") == ["755"] * 3
    layer = Archive().add("file", b"x")
    assert import_image(store, Layers(Cmd=["x"], WorkingDir="/file/x").layer(layer)).directory == "/file/x"


@pytest.mark.parametrize(("directory", "found"), [
    ("/tmp/build", "/home/jovyan"), ("/var/tmp//x/", "/home/jovyan"), ("/dev/shm/x", "/home/jovyan"),
    ("/tmp", "/tmp"), ("/tmpx/y", "/tmpx/y"),
])
def test_a_working_directory_in_a_file_system_of_slots_is_the_home(
    store: ImageStore, directory: str, found: str
) -> None:
    layer = Archive().add("tmp/build", **DIRECTORY)
    image = import_image(store, Layers(Cmd=["x", "{base_path}"], WorkingDir=directory).layer(layer))
    assert image.directory == found
    assert [note for note in image.notes if "slots begin in /home/jovyan" in note] == list(
        image.notes if found == "/home/jovyan" else ())


def test_an_import_tells_what_is_different_from_a_container(store: ImageStore) -> None:
    layer = Archive().add("etc/passwd", b"nb:x:1000:100::/home/nb:/bin/bash\n")
    layer.add("opt/conda/bin/jupyter-lab", b"#!/opt/conda/bin/python\n").add("opt/conda/etc/conda/activate.d/gdal.sh")
    layer.add("dev/console", type=tarfile.CHRTYPE, devmajor=5, devminor=1)
    for number in range(2001):
        layer.add(f"home/nb/{number}", b"x" * 1000)
    config = {"User": "nb", "Env": ["PATH=/opt/conda/bin"], "Entrypoint": ["tini", "start.sh"]}
    image = import_image(store, Layers(**config).layer(layer))
    text = "\n".join(image.notes)
    for part in ("dev/console", "tini start.sh", "/home/nb has 2,001 files of 2 MB", "/opt/conda/etc/conda/activate.d"):
        assert part in text
    assert store.get("mine").notes == image.notes
    assert image.activate == (
        'export CONDA_PREFIX=/opt/conda\nfor script in /opt/conda/etc/conda/activate.d/*.sh; do . "$script"; done'
    )


def test_directories_that_everyone_may_write_to_are_copied_by_slots_unless_they_are_large(store: ImageStore) -> None:
    """Each is outside of the home and of the directories that a slot has itself, and within no other one."""
    public = {"type": tarfile.DIRTYPE, "mode": 0o1777}
    layer = Archive().add("etc/passwd", b"nb:x:1000:100::/home/nb:/bin/bash\n")
    for path in ("tmp", "var/tmp", "dev/shm", "home/nb/open", "run/lock", "srv/open", "srv/open/within", "data"):
        layer.add(path, **public)
    layer.add("srv/link", **LINK, linkname="/srv/open").add("srv/group", type=tarfile.DIRTYPE, mode=0o2775)
    for number in range(2001):
        layer.add(f"data/{number}", b"x" * 1000)
    image = import_image(store, Layers(Cmd=["x"], User="nb").layer(layer))
    assert image.public == store.get("mine").public == ("/run/lock", "/srv/open")
    (note,) = (note for note in image.notes if "read-only in slots" in note)
    assert note.startswith("/data, to which everyone may write,") and "2,001 files of 2 MB" in note


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to other owners")
@pytest.mark.parametrize(("user", "directory", "copied"), [
    ("", "/app", "/app"), ("", "/link", "/app"), ("root", "/new/one", "/new/one"), ("", "/app/deep", "/app/deep"),
    ("nb", "/of-nb", "/of-nb"), ("nb", "/of-group", "/of-group"), ("1000", "/of-nb", "/of-nb"),
    # A container's user may not write to it, or it is a part of the home, of the system, or of a slot.
    ("nb", "/app", ""), ("nb", "/of-nb-read-only", ""), ("nb", "/home/nb/work", ""), ("", "/etc", ""), ("", "/tmp", ""),
    ("", "/home", ""), ("", "/run", ""),
])
def test_slots_get_copies_of_a_working_directory_to_which_a_container_may_write(
    tmp_path: Path, user: str, directory: str, copied: str
) -> None:
    """python:3.x with `WORKDIR /app` and `COPY . .`, whose notebooks could not be saved otherwise."""
    store = ImageStore(tmp_path / "images")
    layer = Archive().add("etc/passwd", b"nb:x:1000:100::/home/nb:/bin/bash\n").add("home/nb/work", **DIRECTORY)
    layer.add("app/deep", **DIRECTORY).add("app/a.ipynb", b"{}", mode=0o600).add("link", **LINK, linkname="/app")
    layer.add("of-nb", **DIRECTORY, uid=1000).add("of-nb-read-only", type=tarfile.DIRTYPE, mode=0o555, uid=1000)
    layer.add("of-group", type=tarfile.DIRTYPE, mode=0o775, gid=100).add("tmp", **DIRECTORY).add("run", **DIRECTORY)
    image = import_image(store, Layers(Cmd=["x"], User=user, WorkingDir=directory).layer(layer))
    assert image.public == ((copied,) if copied else ())
    # A name of the same files has the same copies, and one with another working directory has not.
    text = f'command = ["x"]\nuser = "nb"\nhome = "/home/nb"\ndirectory = "{directory}"\n'
    assert store.use("again", "mine", manifest.parse(text.encode())).public == image.public
    text = text.replace(f'directory = "{directory}"', 'directory = "/srv"')
    assert store.use("other", "mine", manifest.parse(text.encode())).public == ()


def test_a_large_working_directory_and_that_of_a_given_manifest_are_not_copied(store: ImageStore) -> None:
    layer = Archive().add("app", **DIRECTORY)
    for number in range(2001):
        layer.add(f"app/{number}", b"x" * 1000)
    image = import_image(store, Layers(Cmd=["x"], WorkingDir="/app").layer(layer))
    assert image.public == ()
    assert [note for note in image.notes if note.startswith("/app, to which the image's user may write, is read-only")]
    text = b'command = ["x"]\nuser = "nb"\nhome = "/home/nb"\ndirectory = "/app"\n'
    layer = Archive().add("app", **DIRECTORY)
    assert import_image(store, Layers(WorkingDir="/app").layer(layer), manifest.parse(text)).public == ()


def environment(settings: bytes) -> Archive:
    layer = Archive().add("srv/env", **LINK, linkname="/opt/env").add("opt/env/bin/python", b"", mode=0o755)
    layer.add("opt/env/lib/python3.13/site-packages/numpy.py", b"").add("opt/env/lib64", **LINK, linkname="lib")
    return layer.add("opt/env/pyvenv.cfg", settings).add("usr/bin/python3", b"", mode=0o755)


def test_a_virtual_environment_has_the_users_packages_too(store: ImageStore) -> None:
    text = 'python = "/srv/env/bin/python"\nuser = "nb"\nhome = "/home/nb"\n'
    layer = environment(b"home = /usr/bin\ninclude-system-site-packages = false\n")
    image = import_image(store, Layers().layer(layer), manifest.parse(text.encode()))
    path = "opt/env/lib/python3.13/site-packages/nbagent-user-packages.pth"
    assert (image.root / path).read_text() == adaptation.USER_PACKAGES
    assert modes(image.root, path) == ["644"]
    assert image.notes == (
        "/srv/env: its Python also has the packages of the user, below ~/.local, where pip installs in slots",)


@pytest.mark.parametrize(("python", "settings"), [
    ("/srv/env/bin/python", b"Include-System-Site-Packages=True\n"), ("/usr/bin/python3", b"home = /usr/bin\n"),
], ids=["already", "not in use"])
def test_other_environments_are_not_changed(store: ImageStore, python: str, settings: bytes) -> None:
    text = f'python = "{python}"\nuser = "nb"\nhome = "/home/nb"\n'
    image = import_image(store, Layers().layer(environment(settings)), manifest.parse(text.encode()))
    assert not list(image.root.rglob("*.pth")) and not image.notes


def test_the_variables_of_a_conda_environment_are_those_of_its_kernels(store: ImageStore) -> None:
    """As conda sets them: those of an environment.yml after those of packages, and in the place of the image's."""
    state = {"env_vars": {"COURSE": "own", "GONE": "***unset***", "A.B": "x", "N": 1, "ZERO": "\0", "LONE": "\ud800",
                          "HOME": "/root"}}
    packages = {"COURSE": "package", "PROJ_DATA": "/opt/conda/share/proj", "GONE": "x"}
    config = {"Env": ["PATH=/opt/conda/bin", "COURSE=image", "LANG=C.UTF-8"]}
    image = import_image(store, bare(
        ("opt/conda/bin/jupyter-lab", b"#!/opt/conda/bin/python\n"), ("opt/conda/bin/python", b""),
        ("opt/conda/conda-meta/state", json.dumps(state).encode()), ("opt/conda/etc/conda/env_vars.d/b.json", b"[]"),
        ("opt/conda/etc/conda/env_vars.d/a.json", json.dumps(packages).encode()), **config,
    ))
    assert dict(image.environment) == {
        "COURSE": "own", "PROJ_DATA": "/opt/conda/share/proj", "LANG": "C.UTF-8", "PATH": "/opt/conda/bin",
        "HOME": "/home/jovyan",
    }


def test_condas_scripts_that_a_given_manifest_does_not_run_are_named(store: ImageStore) -> None:
    layer = Archive().add("opt/conda/bin/python", b"").add("opt/conda/etc/conda/activate.d/gdal.sh")
    text = 'python = "/opt/conda/bin/python"\nuser = "nb"\nhome = "/home/nb"\n'
    image = import_image(store, Layers().layer(layer), manifest.parse(text.encode()))
    (note,) = image.notes
    assert note == "/opt/conda/etc/conda/activate.d is not run, because the manifest has no script activate"


def test_another_images_entry_point_is_its_command(store: ImageStore) -> None:
    image = import_image(store, bare(
        Entrypoint=["serve"], Cmd=["--base", "{base_path}", "--port", "{port}"], ExposedPorts={"3000/tcp": {}},
        Env=["SECRET={token}"],
    ))
    assert image.python is None
    assert image.command == ("serve", "--base", "{base_path}", "--port", "{port}")
    assert (image.port, image.ready, image.url) == (3000, "", "")
    # The user root of an image is replaced by jovyan.
    assert (image.user, image.home, image.directory) == ("jovyan", "/home/jovyan", "/home/jovyan")
    assert image.environment["SECRET"] == "{token}"


@pytest.mark.parametrize(("config", "user", "home"), [
    ({}, "jovyan", "/home/jovyan"), ({"User": "0:0", "Env": ["HOME=/root"]}, "jovyan", "/home/jovyan"),
    ({"User": "nb"}, "nb", "/home/nb"), ({"User": "1000", "Env": ["HOME=/home/nb/work"]}, "nb", "/home/nb/work"),
    # As in images for OpenShift.
    ({"User": "1001", "Env": ["HOME=/opt/app"], "WorkingDir": "/opt/app"}, "jovyan", "/opt/app"),
    ({"User": "1001"}, "jovyan", "/home/jovyan"), ({"User": "Maria.M"}, "jovyan", "/home/Maria.M"),
])
def test_the_home_is_that_of_the_containers_user(
    store: ImageStore, config: dict[str, Any], user: str, home: str
) -> None:
    layer = Archive().add("etc/passwd", b"nb:x:1000:100::/home/nb:/bin/sh\nMaria.M:x:1002:100::/home/Maria.M:/bin/sh\n")
    image = import_image(store, Layers(Cmd=["x"], **config).layer(layer))
    assert (image.user, image.home, image.directory) == (user, home, home)
    assert image.environment["HOME"] == home


def test_an_image_without_manifest_jupyterlab_and_command_is_refused(store: ImageStore) -> None:
    assert "--manifest" in refused(store, bare())


def test_sources_are_parsed(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert fetch.source(f"oci:{tmp_path}") == OciDirectory(tmp_path, None)
    assert fetch.source(f"oci:{tmp_path}:v1") == OciDirectory(tmp_path, "v1")
    assert fetch.source(f"oci:{tmp_path}/a:b") == OciDirectory(tmp_path / "a:b", None)
    assert fetch.source("docker-archive:x.tar") == DockerArchive(Path("x.tar"))
    assert fetch.source("docker://host:5000/a/b:c", insecure=True) == Registry("host:5000/a/b:c", True)


@pytest.mark.parametrize("text", ["", "oci:", "docker-archive:", "x.tar", "docker:x", "docker://", "docker://$HOME",
                                  "docker://-x", "docker://a b", "containers-storage:x", "dir:/etc"])
def test_an_invalid_source_is_refused_with_the_valid_ones(text: str) -> None:
    with pytest.raises(BadRequest, match="docker-archive:FILE"):
        fetch.source(text)


def test_a_missing_source_is_named(store: ImageStore, tmp_path: Path) -> None:
    for source in (OciDirectory(tmp_path / "no", None), DockerArchive(tmp_path / "no.tar")):
        if isinstance(source, DockerArchive) and os.geteuid() != 0:
            continue
        with pytest.raises(FetchFailed, match="No such file"):
            store.import_oci(source, "x")


@pytest.mark.parametrize(("change", "key"), [
    ({"command": ["x"]}, "python"),
    ({"port": 8888}, "port"),
    ({"python": None, "command": "x"}, "command"),
    ({"python": None, "command": []}, "command"),
    ({"python": None, "command": ["x\0"]}, "command"),
    ({"python": None, "command": ["x"], "port": 80}, "port"),
    ({"python": None, "command": ["x"], "port": True}, "port"),
    ({"python": None, "command": ["x" * 40_000]}, "environment"),
    ({"ready": "/x"}, "ready"),
    ({"ready": "a/../../x"}, "ready"),
    ({"ready": "x?y"}, "ready"),
    ({"url": "//evil.example/"}, "url"),
    ({"url": "x#y"}, "url"),
    ({"url": "{token}"}, "url"),
    ({"url": "?t={secret}"}, "url"),
    ({"directory": "work"}, "directory"),
])
def test_a_wrong_command_or_address_is_refused(change: dict[str, object], key: str) -> None:
    good = manifest.to_mapping(manifest.parse(MANIFEST.encode()))
    wanted = {name: value for name, value in (good | change).items() if value is not None}
    for default in ("ready", "url") if "python" not in wanted else ():
        wanted.pop(default)
    with pytest.raises(ImageInvalid, match=f": {key}: "):
        manifest.from_mapping(wanted)


def test_a_login_belongs_to_the_registry_of_the_image() -> None:
    for reference, registry in (
        ("registry.example/team/x:1", "registry.example"), ("host:5000/x", "host:5000"), ("localhost/x", "localhost"),
        ("team/x", "docker.io"), ("x:1", "docker.io"),
    ):
        assert json.loads(logins.of_password(reference, "maria", "pass:word")) == {
            "auths": {registry: {"auth": "bWFyaWE6cGFzczp3b3Jk"}}}


@pytest.mark.parametrize("content", [
    b"", b"[]", b"[" * 100_000, b'{"auths": []}', b'{"auths": {"x": {}}, "credsStore": "y"}',
    b'{"auths": {"x": {"username": "maria"}}}', b'{"auths": {"x": {"username": 1, "password": 2}}}',
])
def test_a_file_without_a_login_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "auth.json").write_bytes(content)
    with pytest.raises(ConfigError, match="has no login"):
        logins.found(tmp_path / "auth.json")


def test_a_name_and_a_password_in_a_file_are_a_login(tmp_path: Path) -> None:
    """As in secrets of Kubernetes that were written by hand."""
    text = {"auths": {"r.example": {"username": "maria", "password": "pass:word", "email": "x"}}}
    (tmp_path / "auth.json").write_text(json.dumps(text))
    found = logins.found(tmp_path / "auth.json")
    assert json.loads(found or "") == {"auths": {"r.example": {"auth": "bWFyaWE6cGFzczp3b3Jk"}}}


def test_a_credential_precedes_the_hosts_file_and_helpers_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbagent.core.paths.REGISTRY_AUTH", tmp_path / "host.json")
    assert logins.found(None, {}) is None
    for name, secret in (("host.json", "aG9zdDp4"), ("registry-auth", "Y3JlZDp4")):
        helpers = {"credsStore": "program", "credHelpers": {"r": "program"}}
        text = {"auths": {"r": {"auth": secret}, "helped": {}}, **helpers}
        (tmp_path / name).write_text(json.dumps(text))
    assert json.loads(logins.found(None, {}) or "") == {"auths": {"r": {"auth": "aG9zdDp4"}}}
    found = logins.found(None, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert json.loads(found or "") == {"auths": {"r": {"auth": "Y3JlZDp4"}}}


def test_proxies_are_quoted_for_systemd() -> None:
    given = {"HTTPS_PROXY": 'http://u:a"b\\c@p:1', "no_proxy": "localhost,.example", "PATH": "/bin"}
    assert fetch._proxies(given) == 'HTTPS_PROXY="http://u:a\\"b\\\\c@p:1"\nno_proxy="localhost,.example"\n'
    with pytest.raises(BadRequest, match="https_proxy"):
        fetch._proxies({"https_proxy": "x\nLD_PRELOAD=y"})


def test_the_hosts_proxy_is_used_unless_the_environment_has_one() -> None:
    configured = {"https_proxy": "http://10.1.0.8:3128", "no_proxy": "localhost"}
    assert fetch._proxies({}, configured) == 'https_proxy="http://10.1.0.8:3128"\nno_proxy="localhost"\n'
    assert fetch._proxies({"no_proxy": "a"}, configured) == 'https_proxy="http://10.1.0.8:3128"\nno_proxy="a"\n'
    assert fetch._proxies({"http_proxy": "http://own:1"}, configured) == 'http_proxy="http://own:1"\n'
    found = fetch.source("docker://r.example/a:1", proxy=configured)
    assert isinstance(found, fetch.Registry) and found.proxy == configured
