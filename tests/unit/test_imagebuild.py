# SPDX-License-Identifier: BSD-3-Clause
"""The image builder without a build: recipes, cache keys, the copied files, the sources, and the archive's bytes."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import brotli
import pytest

from archives import MANIFEST
from nbagent.imagebuild import build, pack, rootfs
from nbagent.imagebuild.recipe import Recipe, read_recipe

TOP = Path(__file__).resolve().parents[2]
TEXT = """
suite = "trixie"
source_date_epoch = 1000000000
packages = ["python3"]
[user]
name = "jovyan"
id = 1000
home = "/home/jovyan"
"""


def recipe_in(path: Path, text: str = TEXT) -> Path:
    path.mkdir(exist_ok=True)
    (path / "recipe.toml").write_text(text)
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return read_recipe(recipe_in(tmp_path / "course"))


@pytest.mark.parametrize("name", ["minimal", "marimo"])
def test_recipes_of_this_repository_are_read(name: str) -> None:
    found = read_recipe(TOP / "images" / name)
    assert (found.name, found.suite, found.user_id) == (name, "trixie", 1000)
    assert "python3" in found.packages and found.requirements.exists()


def test_optional_keys_have_defaults(recipe: Recipe) -> None:
    assert (recipe.remove, recipe.check, recipe.home_directories) == ((), "true", ())


@pytest.mark.parametrize(("text", "message"), [
    ("", "key user is missing"),
    (TEXT.replace("suite", "#"), "key suite is missing"),
    (TEXT.replace("id = 1000", ""), "key user.id is missing"),
    (TEXT.replace("id = 1000", 'id = "x"'), "user.id: expected a whole number"),
    (TEXT.replace('["python3"]', '"python3"'), "packages: expected a list of texts"),
    ("color = 1" + TEXT, "unknown key color"),
    (TEXT + "shell = 1", "unknown key user.shell"),
    ("= 1", "is not TOML"),
])
def test_an_invalid_recipe_fails_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message) as raised:
        read_recipe(recipe_in(tmp_path, text))
    assert str(tmp_path / "recipe.toml") in str(raised.value)


def test_a_directory_without_recipe_fails(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is not a recipe"):
        read_recipe(tmp_path)


def test_the_cache_key_depends_on_every_file_of_the_recipe_and_not_on_its_place(recipe: Recipe, tmp_path: Path) -> None:
    first = recipe.key()
    shutil.copytree(recipe.path, tmp_path / "elsewhere/course")
    assert read_recipe(tmp_path / "elsewhere/course").key() == first
    (recipe.path / "files").mkdir()
    (recipe.path / "files/a").write_text("x")
    second = recipe.key()
    (recipe.path / "files/a").chmod(0o755)
    third = recipe.key()
    (recipe.path / "files/b").symlink_to("a")
    assert len({first, second, third, recipe.key()}) == 4


def test_the_key_of_the_installed_builder_is_that_of_a_checkout(recipe: Recipe, tmp_path: Path) -> None:
    shutil.copytree(TOP / "nbagent", tmp_path / "nbagent", ignore=shutil.ignore_patterns("__pycache__"))
    code = ("import sys, pathlib; from nbagent.imagebuild.recipe import read_recipe\n"
            "print(read_recipe(pathlib.Path(sys.argv[1])).key())")
    argv = [sys.executable, "-Bc", code, recipe.path]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == recipe.key()


def test_the_command_imports_the_package_from_its_own_checkout(tmp_path: Path) -> None:
    done = subprocess.run([TOP / "images/build", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage: images/build" in done.stdout


def test_debian_sources_are_those_of_debian_itself_for_the_images_suite() -> None:
    listed = "\n".join([
        "Debian|bookworm|main|http://a/debian", "Debian|bookworm-updates|main|http://a/debian",
        "Debian|bookworm-security|main|http://a/security", "Debian|bookworm|contrib|http://a/debian",
        "Debian|bookworm-backports|main|http://a/debian", "Other|bookworm|main|http://b/", "Debian|sid|main|http://a/debian",
    ])
    assert rootfs._main_sources(listed, "bookworm", "trixie") == [
        "deb http://a/debian trixie main", "deb http://a/debian trixie-updates main",
        "deb http://a/security trixie-security main",
    ]


def test_copied_files_have_the_modes_of_git(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "chown", lambda *_, **__: None)
    files = recipe.path / "files"
    (files / "home/jovyan").mkdir(parents=True)
    for name, mode in (("program", 0o700), ("data", 0o600)):
        (files / name).write_text(name)
        (files / name).chmod(mode)
    (files / "link").symlink_to("/etc/shadow")
    root = tmp_path / "root"
    root.mkdir()
    rootfs._copy_files(recipe, root)
    assert stat.S_IMODE((root / "program").stat().st_mode) == 0o755
    assert stat.S_IMODE((root / "data").stat().st_mode) == 0o644
    assert (root / "link").readlink() == Path("/etc/shadow")


def test_patterns_remove_links_and_not_their_targets(tmp_path: Path) -> None:
    (tmp_path / "a/tests/deep").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "kept")
    rootfs._remove_matching(tmp_path, ["**/tests", "b", "missing"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "kept"]
    assert not (tmp_path / "a/tests").exists()


@pytest.mark.parametrize("name", ["etc/resolv.conf", "home/jovyan/.netrc", "etc/note"])
def test_an_image_with_configuration_of_the_building_machine_fails(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("see http://mirror.example/debian")
    with pytest.raises(SystemExit, match=f"/{name}"):
        rootfs._check_private_data(tmp_path, {b"mirror.example"})


def test_an_empty_image_has_no_configuration_of_the_building_machine(tmp_path: Path) -> None:
    rootfs._check_private_data(tmp_path, {b"mirror.example"})


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the program zstd is not installed")
def test_equal_trees_have_equal_archives(tmp_path: Path) -> None:
    for number, order in enumerate((("b", "a"), ("a", "b"))):
        root = tmp_path / f"root{number}"
        (root / "d").mkdir(parents=True)
        for name in order:
            (root / f"d/{name}").write_text(name)
            (root / f"d/{name}").chmod(0o4755)
        (root / "d/hard").hardlink_to(root / "d/a")
        (root / "link").symlink_to("d/a")
        pack.pack(root, tmp_path / f"{number}.tar.zst", 1_000_000_000)
    first, second = ((tmp_path / f"{number}.tar.zst").read_bytes() for number in range(2))
    assert first == second
    plain = subprocess.run(["zstd", "-dc", tmp_path / "0.tar.zst"], capture_output=True, check=True).stdout
    (tmp_path / "plain.tar").write_bytes(plain)
    with tarfile.open(tmp_path / "plain.tar") as tar:
        found = {info.name: info for info in tar}
    assert list(found) == [".", "d", "d/a", "d/b", "d/hard", "link"]
    assert {info.mtime for info in found.values()} == {1_000_000_000}
    assert found["d/a"].mode == 0o755 and found["d/hard"].linkname == "d/a"


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the program zstd is not installed")
def test_a_fifo_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    os.mkfifo(tmp_path / "root/pipe")
    with pytest.raises(SystemExit, match="/pipe is neither"):
        pack.pack(tmp_path / "root", tmp_path / "x.tar.zst", 0)


def test_web_files_of_the_manifest_get_compressed_copies_with_their_times(tmp_path: Path) -> None:
    lab = tmp_path / "usr/share/jupyter/lab/static"
    other = tmp_path / "usr/share/other.js"
    lab.mkdir(parents=True)
    for path in (lab / "main.js", other):
        path.write_text("let x = 1;\n" * 500)
        os.utime(path, (1_000_000_000, 1_000_000_000))
    build._compress_web_files(tmp_path)  # an image without a manifest
    assert not (lab / "main.js.br").exists()
    manifest = tmp_path / "etc/nbagent-image.toml"
    manifest.parent.mkdir()
    manifest.write_text(MANIFEST.replace("/usr/share/lab", "/usr/share/jupyter/lab/static"))
    build._compress_web_files(tmp_path)
    assert brotli.decompress((lab / "main.js.br").read_bytes()) == other.read_bytes()
    assert {path.stat().st_mtime for path in lab.iterdir()} == {1_000_000_000} and len(list(lab.iterdir())) == 3
    assert not other.with_name("other.js.br").exists()
    manifest.write_text("user = 3\n")
    with pytest.raises(SystemExit, match=r"nbagent-image\.toml: user"):
        build._compress_web_files(tmp_path)
