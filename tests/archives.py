# SPDX-License-Identifier: BSD-3-Clause
"""Image archives and container images, made for tests: valid ones, and malicious or malformed ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbagent.image import oci

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
MANIFEST = """
python = "/usr/bin/python3"
home = "/home/jovyan"
user = "jovyan"
launch = "exec"
[environment]
LANG = "C.UTF-8"
[static]
"lab" = "/usr/share/lab"
"""


class Archive:
    """A builder of tar archives; `with_image` starts one with a valid image."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    @classmethod
    def with_image(cls, text: str = MANIFEST) -> Archive:
        archive = cls()
        archive.add("etc/nbagent-image.toml", text.encode())
        archive.add("usr/share/lab/main.js", b"let x = 1;\n" * 500)
        archive.add("usr/share/lab/tiny.js", b"1")
        return archive

    def add(self, name: str, content: bytes = b"", **fields: Any) -> Archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        info.mtime = 1_000_000_000
        for field, value in fields.items():
            setattr(info, field, value)
        self._tar.addfile(info, io.BytesIO(content))
        return self

    def bytes(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()

    def save(self, path: Path) -> Path:
        path.write_bytes(self.bytes())
        return path


class Layers:
    """A builder of container images, saved as an OCI layout."""

    def __init__(self, **config: Any) -> None:
        self.config = config
        self.architecture = ARCHITECTURE
        self.layers: list[bytes] = []
        self.plain: list[bytes] = []

    def layer(self, archive: Archive | bytes, pack: Callable[[bytes], bytes] = gzip.compress) -> Layers:
        self.plain.append(archive if isinstance(archive, bytes) else archive.bytes())
        self.layers.append(pack(self.plain[-1]))
        return self

    def save(self, path: Path, tag: str = "latest") -> oci.Layout:
        """Writes the layout; an image with another tag may be in it already."""
        blobs = path / "blobs/sha256"
        blobs.mkdir(parents=True, exist_ok=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        config = {"os": "linux", "architecture": self.architecture, "config": self.config,
                  "rootfs": {"type": "layers", "diff_ids": [
                      f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in self.plain]}}
        document = {
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _blob(blobs, json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
            "layers": [_blob(blobs, layer, "application/vnd.oci.image.layer.v1.tar+gzip") for layer in self.layers],
        }
        found = _blob(blobs, json.dumps(document).encode(), document["mediaType"])
        index = path / "index.json"
        known = json.loads(index.read_text())["manifests"] if index.exists() else []
        named = {**found, "annotations": {"org.opencontainers.image.ref.name": tag}}
        index.write_text(json.dumps({"schemaVersion": 2, "manifests": [*known, named]}))
        return oci.Layout(path, tag)


def _blob(blobs: Path, content: bytes, media_type: str) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    (blobs / digest).write_bytes(content)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}
