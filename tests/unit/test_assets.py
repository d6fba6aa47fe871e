# SPDX-License-Identifier: BSD-3-Clause
"""The address of an image's unchanging files: the published tree, and the addresses in a slot's page."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from archives import MANIFEST, Archive
from nbagent.image.store import Image, ImageStore
from nbagent.zygote.assets import Assets, shared_origin, with_entries

LAB = MANIFEST.replace("/usr/share/lab", "/usr/share/jupyter/lab/static")
EXTENSIONS = "usr/share/jupyter/labextensions"
BASE = "/user/a-1/"
URL = "/assets/sha256-0"


def added(tmp_path: Path, archive: Archive) -> Image:
    store = ImageStore(tmp_path / "images", chown=lambda *_, **__: None)
    return store.add(archive.save(tmp_path / "image.tar"), "minimal")


def image_with(files: dict[str, bytes]) -> Archive:
    archive = Archive.with_image(LAB).add("usr/share/jupyter/lab/static/main.js", b"1")
    for name, content in files.items():
        archive.add(f"{EXTENSIONS}/{name}", content)
    return archive


def test_extensions_beside_jupyterlabs_program_are_published(tmp_path: Path) -> None:
    image = added(tmp_path, image_with({"@x/y/static/remoteEntry.1.js": b"1", "@x/y/package.json": b"{}"}))
    assert image.assets == ("lab", "lab-extensions")
    assert (image.static / "lab-extensions/@x/y/static/remoteEntry.1.js").read_bytes() == b"1"


def test_extensions_with_a_page_of_their_own_are_left_to_the_slot(tmp_path: Path) -> None:
    image = added(tmp_path, image_with({"x/package.json": b"{}", "y/static/Frame.HTML": b"<p>"}))
    assert image.assets == ("lab",)


def test_an_image_without_jupyterlab_has_no_assets(tmp_path: Path) -> None:
    archive = Archive.with_image(LAB.replace('"lab"', '"other"')).add("usr/share/jupyter/lab/static/main.js", b"1")
    image = added(tmp_path, archive.add(f"{EXTENSIONS}/x/package.json", b"{}"))
    assert image.assets == () and (image.static / "other/main.js").exists()


def test_a_link_in_the_place_of_the_extensions_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("s")
    archive = image_with({}).add(EXTENSIONS, type=tarfile.SYMTYPE, linkname=str(tmp_path / "outside"))
    assert added(tmp_path, archive).assets == ("lab",)


# --- the addresses in a page ---


@pytest.fixture
def program(tmp_path: Path) -> Path:
    directory = tmp_path / "lab/static"
    directory.mkdir(parents=True)
    (directory / "index.html").write_text("main.1.js")
    return directory


KNOWN = with_entries([{"name": "x", "jupyterlab": {"_build": {"load": "static/remoteEntry.1.js"}}}, {"name": "plain"}])


def page(*extensions: tuple[str, str], **more: str) -> dict[str, object]:
    """A page configuration of jupyterlab_server."""
    federated = [{"name": name, "load": load} for name, load in extensions]
    return {"fullStaticUrl": f"{BASE}static/lab", "fullLabextensionsUrl": f"{BASE}lab/extensions",
            "federated_extensions": federated, **more}


def addresses(assets: Assets, config: dict[str, object], origin: str = "",
              variable: str = f"{URL} lab lab-extensions") -> dict[str, Any]:
    found = assets.addresses(config, BASE, origin, variable)
    json.dumps(found)
    return found


BOTH = {"fullStaticUrl": f"{URL}/lab", "fullLabextensionsUrl": f"{URL}/lab-extensions"}
X = ("x", "static/remoteEntry.1.js")


def test_a_page_refers_to_the_images_address(program: Path) -> None:
    assets = Assets(str(program), KNOWN)
    assert addresses(assets, page(X)) == BOTH
    assert addresses(assets, page()) == BOTH
    assert addresses(assets, page(X), variable=f"{URL} lab") == {"fullStaticUrl": BOTH["fullStaticUrl"]}
    assert addresses(assets, page(X), variable="") == {}


def test_another_origin_precedes_a_path_and_not_the_address_of_a_cdn(program: Path) -> None:
    assets = Assets(str(program), KNOWN)
    other = "https://assets.nb.test"
    assert addresses(assets, page(), other, f"{URL} lab") == {"fullStaticUrl": f"{other}{URL}/lab"}
    assert addresses(assets, page(), other, f"https://cdn.test/n{URL} lab") == {
        "fullStaticUrl": f"https://cdn.test/n{URL}/lab",
        "nbagentFallback": {"fullStaticUrl": f"{other}{URL}/lab"}}


@pytest.mark.parametrize("installed", [("y", "static/remoteEntry.2.js"), ("x", "static/remoteEntry.2.js")])
def test_an_installed_or_replaced_extension_is_requested_from_the_slot(
    program: Path, installed: tuple[str, str]
) -> None:
    found = addresses(Assets(str(program), KNOWN), page(X, installed))
    assert found == {"fullStaticUrl": BOTH["fullStaticUrl"]}


def test_a_rebuilt_or_removed_program_is_requested_from_the_slot(program: Path) -> None:
    assets = Assets(str(program), KNOWN)
    (program / "index.html").write_text("main.rebuilt.js")
    assert "fullStaticUrl" not in addresses(assets, page())
    (program / "index.html").unlink()
    assert "fullStaticUrl" not in addresses(assets, page())


def test_an_address_that_the_user_has_set_stays(program: Path) -> None:
    found = addresses(Assets(str(program), KNOWN), page(fullStaticUrl="https://mine.test/lab"))
    assert found == {"fullLabextensionsUrl": BOTH["fullLabextensionsUrl"]}


@pytest.mark.parametrize(("host", "expected"), [
    ("a-1.nb.test", "https://assets.nb.test"),
    ("a-1.nb.test:8443", "https://assets.nb.test:8443"),
    ("a-1.localhost:8000", "https://assets.localhost:8000"),
    ("nb.test", ""), ("127.0.0.1:8000", ""), ("", ""), ("a-1", ""), ("a-1.", ""), ("b-1.nb.test", ""),
    ('a-1."><script>', ""), ("a-1.nb.test/x", ""), ("a-1.nb.test:port", ""), ("a-1.nb.test\n", ""),
])
def test_the_origin_of_the_assets(host: str, expected: str) -> None:
    assert shared_origin("https", host, BASE) == expected
