# SPDX-License-Identifier: BSD-3-Clause
"""The uploads of an image's web assets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbagent.core.errors import ImageInvalid, PublishFailed
from nbagent.image import publishing

FILES = ("lab/main.1.js", "lab/main.1.js.gz", "lab/main.1.js.br", "lab/2.3.js", "lab/2.3.js.gz", "lab/x.woff",
         "data.csv.gz", "lab/index.html")


@pytest.fixture
def static(tmp_path: Path) -> Path:
    for name in FILES:
        path = tmp_path / "static" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "static/ahead.json").write_text(json.dumps(["lab/main.1.js?v=1", "lab/2.3.js?v=3"]))
    return tmp_path / "static"


def test_files_are_uploaded_in_the_smaller_form_and_the_first_script_last(static: Path) -> None:
    uploads = [(upload.encoding, {name: str(path.relative_to(static)) for name, path in upload.files.items()})
               for upload in publishing.plan(static)]
    same = ("ahead.json", "data.csv.gz", "lab/index.html", "lab/x.woff")
    assert uploads == [
        ("gzip", {"lab/2.3.js": "lab/2.3.js.gz"}),
        (None, dict(zip(same, same, strict=True))),
        ("gzip", {"lab/main.1.js": "lab/main.1.js.gz"}),
    ]


def test_an_image_without_assets_cannot_be_published(tmp_path: Path) -> None:
    with pytest.raises(ImageInvalid, match="no web assets"):
        publishing.publish(tmp_path / "static", "sha256-0", "storage:bucket")


def test_the_error_without_rclone_names_the_remedy(static: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(static))
    with pytest.raises(PublishFailed, match="apt install rclone"):
        publishing.publish(static, "sha256-0", "storage:bucket")


@pytest.mark.parametrize("target", ["storage:bucket", "storage:bucket/", "storage:"])
def test_assets_are_below_the_target(target: str) -> None:
    expected = "storage:assets/sha256-0" if target == "storage:" else "storage:bucket/assets/sha256-0"
    assert publishing._below(target, "sha256-0") == expected
