"""Container images as the Open Container Initiative lays them out in a directory, read as hostile data.

    DIR/index.json              which images are in it, by tag and platform
    DIR/blobs/sha256/DIGEST     their manifests, configurations and layers

What a blob is named by is checked before it is used, so a layout may lie about nothing. Layers are unpacked by
`archive`, whose promises hold for them too; what runs an image that does not say it itself (`manifest_of`)
is taken from its configuration (https://github.com/opencontainers/image-spec/blob/main/config.md).

Not for fetching: `fetch` brings an image into such a layout, whatever it was before.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import posixpath
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from nbagent.core.errors import ImageInvalid
from nbagent.image import manifest as manifests
from nbagent.image.archive import ImageArchiveLimits
from nbagent.image.manifest import Manifest
from nbagent.image.tree import open_tree
from nbagent.untrusted.tree import NotInTree, Tree

_DOCUMENT_MAX_BYTES = 4 << 20
# Docker's own bound; an overlay of more does not mount there.
_LAYERS_MAX = 127
_INDEX_DEPTH_MAX = 3
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_TAG = "org.opencontainers.image.ref.name"
_INDEX = re.compile(r"application/vnd\.(oci\.image\.index\.v1|docker\.distribution\.manifest\.list\.v2)\+json")
_MANIFEST = re.compile(r"application/vnd\.(oci\.image\.manifest\.v1|docker\.distribution\.manifest\.v2)\+json")
_LAYER = re.compile(
    r"application/vnd\.(oci\.image\.layer\.v1\.tar(\+gzip|\+zstd)?|docker\.image\.rootfs\.diff\.tar(\.gzip|\.zstd)?)"
)
_PORT = re.compile(r"([0-9]{1,5})(?:/tcp)?")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SHEBANG = re.compile(rb"#! ?(/[\x21-\x7e]*/python[0-9.]*)\n")
# Whom an image runs as that says nothing, or root: nobody is root in a slot.
_USER, _HOME = "jovyan", "/home/jovyan"


class ImageConfig(NamedTuple):
    """What an image says of the process it is for."""

    environment: Mapping[str, str]
    user: str
    directory: str
    command: tuple[str, ...]
    port: int | None


class Layer(NamedTuple):
    """One layer: the name of its blob."""

    digest: str


class OciImage(NamedTuple):
    """One image of a layout: the digest of its manifest, its configuration, its layers from the lowest."""

    digest: str
    config: ImageConfig
    layers: tuple[Layer, ...]


class Source(Protocol):
    """Where an image comes from."""

    def layout(self, staging: Path, id_base: int, limits: ImageArchiveLimits) -> AbstractContextManager[Layout]:
        """A layout that has the image.

        What must be fetched is fetched into `staging`, which is the image's own as the range of ids from
        `id_base` is. Raises ImageInvalid, FetchFailed.
        """


class Layout:
    """A layout, open for reading.

    `tag` is which of its images is meant; None: the only one. `inbox` is what was made for this one reading.
    """

    def __init__(self, path: Path, tag: str | None = None, inbox: Path | None = None) -> None:
        self.path, self.tag, self.inbox = path, tag, inbox
        self._tree = open_tree(path)

    def __enter__(self) -> Layout:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes what `image` and `open_layer` read from."""
        self._tree.close()

    def discard(self) -> None:
        """Deletes what was made for this reading. Open layers can still be read."""
        if self.inbox is not None:
            shutil.rmtree(self.inbox)

    def image(self) -> OciImage:
        """The image that is meant. Raises ImageInvalid."""
        digest = self._manifest_digest()
        document = self._document(digest)
        layers = tuple(_layer(item) for item in _list(document, "layers"))
        if not 0 < len(layers) <= _LAYERS_MAX:
            raise ImageInvalid(f"the image has {len(layers)} layers; expected 1 to {_LAYERS_MAX}")
        config = self._document(_digest_of(_table(document, "config")))
        here = _ARCHITECTURES.get(platform.machine(), platform.machine())
        if (made_for := (config.get("os"), config.get("architecture"))) != ("linux", here):
            raise ImageInvalid(f"the image is for {'/'.join(map(str, made_for))}, and this host is linux/{here}")
        return OciImage(digest, _config(_table(config, "config") if config.get("config") else {}), layers)

    def open_layer(self, layer: Layer) -> io.BufferedReader:
        """A layer's blob, checked against its name. Raises ImageInvalid."""
        file = self._open(("blobs", "sha256", layer.digest))
        if hashlib.file_digest(file, "sha256").hexdigest() != layer.digest:
            file.close()
            raise ImageInvalid(f"blob {layer.digest} of the image is damaged")
        return file

    def _manifest_digest(self) -> str:
        with self._open(("index.json",)) as file:
            items = _list(_parse(file.read(_DOCUMENT_MAX_BYTES + 1), "index.json"), "manifests")
        tags = ", ".join(sorted({tag for item in items if (tag := _tag_of(item))})) or "none"
        if self.tag is not None:
            items = [item for item in items if _tag_of(item) == self.tag]
        for _ in range(_INDEX_DEPTH_MAX):
            chosen = _for_this_host(items)
            if chosen is None:
                what = f"tagged {self.tag}" if self.tag else "that is the only one"
                raise ImageInvalid(f"no image for this host {what}; tags here: {tags}")
            if _MANIFEST.fullmatch(str(chosen.get("mediaType"))):
                return _digest_of(chosen)
            if not _INDEX.fullmatch(str(chosen.get("mediaType"))):
                raise ImageInvalid(f"the layout has no image, but {chosen.get('mediaType')!r}")
            items = _list(self._document(_digest_of(chosen)), "manifests")
        raise ImageInvalid(f"the layout has an index of an index, more than {_INDEX_DEPTH_MAX} deep")

    def _document(self, digest: str) -> Mapping[str, Any]:
        with self._open(("blobs", "sha256", digest)) as file:
            content = file.read(_DOCUMENT_MAX_BYTES + 1)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ImageInvalid(f"blob {digest} of the image is damaged, or no manifest")
        return _parse(content, f"blob {digest}")

    def _open(self, parts: tuple[str, ...]) -> io.BufferedReader:
        try:
            file = open(self._tree.open_file(parts), "rb")  # noqa: SIM115  the caller's
        except (FileNotFoundError, NotInTree, IsADirectoryError):
            raise ImageInvalid(f"{self.path} is no whole OCI layout: {'/'.join(parts)} is missing") from None
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise ImageInvalid(f"{'/'.join(parts)} of the layout is not a file")
        return file


def manifest_of(config: ImageConfig, rootfs: Path) -> Manifest:
    """The manifest of an image that has none, by its configuration and by what is in it.

    An image with JupyterLab on its PATH is a notebook server's, whatever it runs elsewhere; else its
    entry point is the command. Raises ImageInvalid.
    """
    with open_tree(rootfs) as tree:
        user, home = _user(tree, config.user)
        python = _jupyter(tree, config.environment.get("PATH", _PATH))
    home = _normal(config.environment.get("HOME", ""), home) if user != _USER else home
    mapping: dict[str, Any] = {
        "user": user,
        "home": home,
        "directory": _normal(config.directory, home),
        "environment": {"PATH": _PATH, **config.environment, "HOME": home},
    }
    if python:
        mapping |= {"python": python}
    elif config.command:
        mapping |= {"command": list(config.command)} | ({"port": config.port} if config.port else {})
    else:
        raise ImageInvalid(
            f"the image has no /{manifests.PATH}, no jupyter-lab on its PATH and no command;"
            " give it a manifest (--manifest)"
        )
    return manifests.from_mapping(mapping)


def _config(document: Mapping[str, Any]) -> ImageConfig:
    variables = [item.partition("=") for item in _texts(document, "Env")]
    exposed = document.get("ExposedPorts")
    names = exposed if isinstance(exposed, Mapping) else ()
    ports = [int(match[1]) for name in names if (match := _PORT.fullmatch(str(name)))]
    return ImageConfig(
        environment={name: value for name, _, value in variables if manifests.VARIABLE.fullmatch(name)},
        user=str(document.get("User") or ""),
        directory=str(document.get("WorkingDir") or ""),
        command=(*_texts(document, "Entrypoint"), *_texts(document, "Cmd")),
        port=ports[0] if len(ports) == 1 and 1024 <= ports[0] <= 65535 else None,
    )


def _user(tree: Tree, wanted: str) -> tuple[str, str]:
    """Name and home of the user an image runs as, by its own passwd."""
    wanted = wanted.partition(":")[0]
    for fields in _passwd(tree):
        if wanted in (fields[0], fields[2]) and fields[2] != "0" and manifests.USER.fullmatch(fields[0]):
            return fields[0], _normal(fields[5], _HOME)
    return _USER, _HOME


def _passwd(tree: Tree) -> Iterator[list[str]]:
    content = _content(tree, "/etc/passwd")
    for line in content.decode(errors="replace").splitlines():
        if len(fields := line.split(":")) == 7:
            yield fields


def _jupyter(tree: Tree, path: str) -> str | None:
    """The interpreter of the image's JupyterLab."""
    for directory in path.split(":"):
        if directory.startswith("/") and (match := _SHEBANG.match(_content(tree, f"{directory}/jupyter-lab"))):
            return match[1].decode()
    return None


def _content(tree: Tree, path: str) -> bytes:
    """The beginning of a file of the image, b"" where there is none without a link on the way."""
    parts = tuple(part for part in path.split("/") if part not in ("", "."))
    try:
        with open(tree.open_file(parts), "rb") as file:
            return file.read(manifests.MAX_BYTES) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    except OSError:
        return b""


def _normal(path: str, otherwise: str) -> str:
    path = posixpath.normpath(path) if path else ""
    return path if path.startswith("/") and path.strip("/") and path.isprintable() else otherwise


def _for_this_host(items: list[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The one descriptor that is for this host, or does not say for which."""
    here = ("linux", _ARCHITECTURES.get(platform.machine(), platform.machine()))
    found = []
    for item in items:
        wanted = item.get("platform")
        if not isinstance(wanted, Mapping) or (wanted.get("os"), wanted.get("architecture")) == here:
            found.append(item)
    return found[0] if len(found) == 1 else None


def _layer(descriptor: Mapping[str, Any]) -> Layer:
    if not _LAYER.fullmatch(str(descriptor.get("mediaType"))):
        raise ImageInvalid(f"a layer of the image is {descriptor.get('mediaType')!r}; expected a tar archive")
    return Layer(_digest_of(descriptor))


def _digest_of(descriptor: Mapping[str, Any]) -> str:
    if match := _DIGEST.fullmatch(str(descriptor.get("digest"))):
        return match[1]
    raise ImageInvalid(f"the image names a blob {descriptor.get('digest')!r}; expected sha256: and 64 digits")


def _tag_of(descriptor: Mapping[str, Any]) -> str | None:
    annotations = descriptor.get("annotations")
    tag = annotations.get(_TAG) if isinstance(annotations, Mapping) else None
    return tag if isinstance(tag, str) else None


def _parse(content: bytes, what: str) -> Mapping[str, Any]:
    try:
        document = json.loads(content) if len(content) <= _DOCUMENT_MAX_BYTES else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, Mapping):
        raise ImageInvalid(f"{what} is not a JSON object of at most {_DOCUMENT_MAX_BYTES} bytes")
    return document


def _table(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if isinstance(value := document.get(key), Mapping):
        return value
    raise ImageInvalid(f"the image's {key} is not an object")


def _list(document: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    if isinstance(value := document.get(key), list) and all(isinstance(item, Mapping) for item in value):
        return value
    raise ImageInvalid(f"the image's {key} are not a list of objects")


def _texts(document: Mapping[str, Any], key: str) -> list[str]:
    value = document.get(key) or []
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ImageInvalid(f"the image's {key} is not a list of texts")
