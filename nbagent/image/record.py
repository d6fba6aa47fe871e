# SPDX-License-Identifier: BSD-3-Clause
"""The record of an image in the store: image.json, which only the store writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nbagent.core.errors import ImageInvalid
from nbagent.image import manifest as manifests
from nbagent.image.manifest import Manifest

FILE = "image.json"
_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """The content of image.json. The ids 0 to 65535 of the image are `id_base` and up on the host."""

    digest: str
    id_base: int
    manifest: Manifest
    notes: tuple[str, ...] = ()
    public: tuple[str, ...] = ()

    def save(self, tree: Path) -> None:
        """Writes it into the tree. Raises OSError."""
        document = {"format": _FORMAT, "digest": self.digest, "id_base": self.id_base,
                    "manifest": manifests.to_mapping(self.manifest), "notes": self.notes,
                    "public": self.public}
        (tree / FILE).write_text(json.dumps(document, indent=2) + "\n")

    @classmethod
    def load(cls, tree: Path) -> Record:
        """The record of a tree of the store. Raises FileNotFoundError, ImageInvalid."""
        document = _document(tree)
        manifest = document["manifest"]
        if not isinstance(manifest, dict):
            raise ImageInvalid(f"{tree}/{FILE}: manifest is not an object; remove the image and add it again")
        notes, public = document.get("notes"), document.get("public")
        return cls(
            digest=tree.name, id_base=_id_base(document), manifest=manifests.from_mapping(manifest),
            notes=tuple(map(str, notes)) if isinstance(notes, list) else (),
            # Without it, of a version that did not have it, these directories are read-only.
            public=tuple(map(str, public)) if isinstance(public, list) else (),
        )


def id_base_of(tree: Path) -> int:
    """The id base of an image, also of one whose manifest cannot be read. Raises FileNotFoundError, ImageInvalid."""
    return _id_base(_document(tree))


def _document(tree: Path) -> dict[str, object]:
    """The JSON object in image.json. Raises FileNotFoundError, ImageInvalid."""
    try:
        document = json.loads((tree / FILE).read_text())
    except ValueError as error:
        raise ImageInvalid(f"{tree}/{FILE} is damaged; remove the image and add it again: {error}") from None
    if not isinstance(document, dict):
        raise ImageInvalid(f"{tree}/{FILE} is not a JSON object; remove the image and add it again")
    if document.get("format") != _FORMAT or not {"id_base", "manifest"} <= document.keys():
        raise ImageInvalid(f"{tree} was added by another version of nbagent; remove the image and add it again")
    return document


def _id_base(document: dict[str, object]) -> int:
    if isinstance(id_base := document["id_base"], int):
        return id_base
    raise ImageInvalid(f"{FILE}: id_base is {id_base!r}; remove the image and add it again")
