# SPDX-License-Identifier: BSD-3-Clause
"""Reads container images from an OCI image layout, as untrusted data.

    DIR/index.json              the images of the layout, by tag and platform
    DIR/blobs/sha256/DIGEST     their manifests, configurations and layers

Each blob is checked against the digest in its name before it is used. Layers are unpacked by `archive`, with the same
checks as for an archive. For an image without /etc/nbagent-image.toml, `manifest_of` derives a manifest from its
configuration (https://github.com/opencontainers/image-spec/blob/main/config.md).

`fetch` copies images of other formats into such a layout.
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
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

from nbagent.core.errors import ImageInvalid
from nbagent.image import jupyter
from nbagent.image import manifest as manifests
from nbagent.image.archive import ImageArchiveLimits
from nbagent.image.manifest import Manifest
from nbagent.image.passwd import account
from nbagent.image.tree import open_tree
from nbagent.untrusted.refusal import plain, shown
from nbagent.untrusted.tree import NotInTree, Tree

_DOCUMENT_MAX_BYTES = 4 << 20
# Docker's limit, because overlayfs mounts no more layers there.
_LAYERS_MAX = 127
_INDEX_DEPTH_MAX = 3
_TAGS_MAX_CHARACTERS = 300
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
# The user for an image whose user is root or has no name, because no process of a slot is root.
_USER, _HOME = "jovyan", "/home/jovyan"
# A slot has file systems of its own there, in which a directory of the image does not exist.
_OF_SLOTS = ("/dev/", "/proc/", "/sys/", "/tmp/", "/var/tmp/")  # noqa: S108  paths of the image
# A JSON object from the image.
_Object = Mapping[str, object]


class ImageConfig(NamedTuple):
    """The part of an image's configuration that describes its process."""

    environment: Mapping[str, str]
    user: str
    directory: str
    command: tuple[str, ...]
    port: int | None


class Layer(NamedTuple):
    """One layer: the name of its blob."""

    digest: str


class OciImage(NamedTuple):
    """One image of a layout: the digest of its manifest, its configuration, and its layers, the lowest first."""

    digest: str
    config: ImageConfig
    layers: tuple[Layer, ...]


class Source(Protocol):
    """A place from which an image is imported."""

    def layout(self, staging: Path, id_base: int, limits: ImageArchiveLimits) -> AbstractContextManager[Layout]:
        """A layout that contains the image.

        An image that must be fetched is fetched into `staging`, by a process with an id of the image's own range,
        which begins at `id_base`. Raises ImageInvalid, FetchFailed.
        """


class Layout:
    """A layout, open for reading.

    `tag` selects one of its images; None requires that there is only one. `inbox` is a temporary directory that
    `discard` deletes.
    """

    def __init__(self, path: Path, tag: str | None = None, inbox: Path | None = None) -> None:
        self.path, self.tag, self.inbox = path, tag, inbox
        self._tree = open_tree(path)
        self._opened: list[tuple[io.BufferedReader, os.stat_result]] = []

    def __enter__(self) -> Layout:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the directories that `image` and `open_layer` read from."""
        self._tree.close()

    def discard(self) -> None:
        """Deletes the temporary directory. Open layers can still be read."""
        if self.inbox is not None:
            shutil.rmtree(self.inbox)

    def image(self) -> OciImage:
        """The selected image. Raises ImageInvalid."""
        digest = self._manifest_digest()
        document = self._document(digest)
        layers = tuple(_layer(item) for item in _list(document, "layers"))
        if not 0 < len(layers) <= _LAYERS_MAX:
            raise ImageInvalid(f"the image has {len(layers)} layers; expected 1 to {_LAYERS_MAX}")
        config = self._document(_digest_of(_table(document, "config")))
        image_platform = (config.get("os"), config.get("architecture"))
        if image_platform != _host_platform():
            made_for, host = ("/".join(map(str, names)) for names in (image_platform, _host_platform()))
            raise ImageInvalid(f"the image is for {plain(made_for)}, but this host is {host}")
        return OciImage(digest, _config(_table(config, "config") if config.get("config") else {}), layers)

    def open_layer(self, layer: Layer) -> io.BufferedReader:
        """A layer's blob, checked against its name. Raises ImageInvalid."""
        file = self._open(("blobs", "sha256", layer.digest))
        self._opened.append((file, os.fstat(file.fileno())))
        if hashlib.file_digest(file, "sha256").hexdigest() != layer.digest:
            file.close()
            raise ImageInvalid(f"blob {layer.digest} of the image does not match its digest")
        return file

    def check_unchanged(self) -> None:
        """Raises ImageInvalid when a layer was written to since it was checked, because its content may be another."""
        for file, before in self._opened:
            if not is_unchanged(before, os.fstat(file.fileno())):
                raise ImageInvalid(f"{self.path} changed while it was read; import it again")

    def _manifest_digest(self) -> str:
        with self._open(("index.json",)) as file:
            items = _list(_parse(file.read(_DOCUMENT_MAX_BYTES + 1), "index.json"), "manifests")
        tags = ", ".join(sorted({tag for item in items if (tag := _tag_of(item))})) or "none"
        tags = plain(tags, _TAGS_MAX_CHARACTERS)
        if self.tag is not None:
            items = [item for item in items if _tag_of(item) == self.tag]
        for _ in range(_INDEX_DEPTH_MAX):
            chosen = _for_this_host(items)
            if chosen is None:
                selected = f"with the tag {self.tag}" if self.tag else "that is the only one; give a tag"
                raise ImageInvalid(f"the layout has no image for this host {selected}; tags here: {tags}")
            if _MANIFEST.fullmatch(str(chosen.get("mediaType"))):
                return _digest_of(chosen)
            if not _INDEX.fullmatch(str(chosen.get("mediaType"))):
                kind = shown(str(chosen.get("mediaType")))
                raise ImageInvalid(f"the layout has a {kind} where an image was expected")
            items = _list(self._document(_digest_of(chosen)), "manifests")
        raise ImageInvalid(f"the layout has indexes that are nested more than {_INDEX_DEPTH_MAX} deep")

    def _document(self, digest: str) -> _Object:
        with self._open(("blobs", "sha256", digest)) as file:
            content = file.read(_DOCUMENT_MAX_BYTES + 1)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ImageInvalid(f"blob {digest} of the image does not match its digest, or is too large for a manifest")
        return _parse(content, f"blob {digest}")

    def _open(self, parts: tuple[str, ...]) -> io.BufferedReader:
        try:
            file = self._tree.open_regular(parts)
        except (FileNotFoundError, NotInTree):
            raise ImageInvalid(f"{self.path} is not a complete OCI layout: {'/'.join(parts)} is missing") from None
        if file is None:
            raise ImageInvalid(f"{'/'.join(parts)} of the layout is not a file")
        return file


def is_unchanged(before: os.stat_result, after: os.stat_result) -> bool:
    """Whether a file has the same content: a write changes its ctime, which its owner cannot set."""
    return (before.st_size, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_size, after.st_mtime_ns, after.st_ctime_ns
    )


def manifest_of(config: ImageConfig, rootfs: Path) -> Manifest:
    """A manifest for an image that has none, from its configuration and its files.

    An image with JupyterLab on its PATH, or in an environment that its command names, becomes one of notebook servers,
    whatever its entry point is. Otherwise its entry point and command become the command. Raises ImageInvalid.
    """
    with open_tree(rootfs) as tree:
        user, home = _user(tree, config)
        path = config.environment.get("PATH", _PATH)
        python = jupyter.interpreter(tree, path)
        if python is None and not _has_base_path(config.command, config.environment):
            places = jupyter.places(config.command, config.environment, _normal(config.directory, ""))
            python = jupyter.interpreter(tree, f"{places}:{path}")
            if python:
                # As the activation of the environment does.
                path = f"{posixpath.dirname(python)}:{path}"
        scripts = jupyter.activation(tree, python) if python else None
        variables = jupyter.variables(tree, python) if python else {}
    mapping: dict[str, object] = {
        "user": user,
        "home": home,
        "directory": home if _is_of_slots(config.directory) else _normal(config.directory, home),
        "environment": {**config.environment, **variables, "PATH": path, "HOME": home},
    }
    if python:
        mapping |= {"python": python} | ({"activate": jupyter.activate_script(python)} if scripts else {})
    elif config.command:
        mapping |= {"command": list(config.command)} | ({"port": config.port} if config.port else {})
    else:
        raise ImageInvalid(
            f"the image has no /{manifests.PATH}, no jupyter-lab on its PATH and no command;"
            " give it a manifest (--manifest)"
        )
    return manifests.from_mapping(mapping)


def notes_of(config: ImageConfig, manifest: Manifest) -> tuple[str, ...]:
    """Sentences about the parts of a configuration that its `manifest` does not use, or that a slot does not serve."""
    command, notes = plain(" ".join(config.command)), []
    if _is_of_slots(config.directory):
        where = plain(config.directory)
        notes.append(f"slots begin in {manifest.directory}, because they have files of their own at {where}")
    if manifest.python is None and not _has_base_path(manifest.command, manifest.environment):
        notes.append(
            f"slots run the image's command ({command}), because no jupyter-lab was found; it has no {{base_path}},"
            " below which it has to serve: write it into the command or a variable, or name the Python that has"
            " JupyterLab in a manifest (python)"
        )
    if manifest.python is not None and config.command and posixpath.basename(config.command[0]) != "jupyter-lab":
        notes.append(
            f"slots start JupyterLab by {manifest.python} and not by the image's entry point ({command}); a manifest"
            " can set its variables (environment) or run its scripts (activate)"
        )
    return tuple(notes)


def _is_of_slots(directory: str) -> bool:
    return _normal(directory, "").startswith(_OF_SLOTS)


def _has_base_path(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether a command is made for slots: it gets the path below which it serves."""
    return any("{base_path}" in text for text in (*command, *environment.values()))


def _config(document: _Object) -> ImageConfig:
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


def _user(tree: Tree, config: ImageConfig) -> tuple[str, str]:
    """Name and home of the image's user. A user of a number only, or whose name no manifest may have, is `_USER`."""
    found = account(tree, config.user)
    if found.uid == 0:
        return _USER, _HOME
    name = found.name if manifests.USER.fullmatch(found.name) else _USER
    return name, _normal(config.environment.get("HOME", ""), _normal(found.home, _HOME))


def _normal(path: str, otherwise: str) -> str:
    path = posixpath.normpath(path) if path else ""
    return path if path.startswith("/") and path.strip("/") and path.isprintable() else otherwise


def _host_platform() -> tuple[str, str]:
    return "linux", _ARCHITECTURES.get(platform.machine(), platform.machine())


def _for_this_host(items: list[_Object]) -> _Object | None:
    """The one descriptor whose platform is that of this host or not given."""
    found = []
    for item in items:
        wanted = item.get("platform")
        if not isinstance(wanted, Mapping) or (wanted.get("os"), wanted.get("architecture")) == _host_platform():
            found.append(item)
    return found[0] if len(found) == 1 else None


def _layer(descriptor: _Object) -> Layer:
    if not _LAYER.fullmatch(str(descriptor.get("mediaType"))):
        kind = shown(str(descriptor.get("mediaType")))
        raise ImageInvalid(f"a layer of the image has the type {kind}; expected a tar archive")
    return Layer(_digest_of(descriptor))


def _digest_of(descriptor: _Object) -> str:
    if match := _DIGEST.fullmatch(str(descriptor.get("digest"))):
        return match[1]
    digest = shown(str(descriptor.get("digest")))
    raise ImageInvalid(f"the image names a blob {digest}; expected sha256: and 64 digits")


def _tag_of(descriptor: _Object) -> str | None:
    annotations = descriptor.get("annotations")
    tag = annotations.get(_TAG) if isinstance(annotations, Mapping) else None
    return tag if isinstance(tag, str) else None


def _parse(content: bytes, what: str) -> _Object:
    try:
        document = json.loads(content) if len(content) <= _DOCUMENT_MAX_BYTES else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, Mapping):
        raise ImageInvalid(f"{what} is not a JSON object of at most {_DOCUMENT_MAX_BYTES} bytes")
    return document


def _table(document: _Object, key: str) -> _Object:
    if isinstance(value := document.get(key), Mapping):
        return value
    raise ImageInvalid(f"the image's {key} is not an object")


def _list(document: _Object, key: str) -> list[_Object]:
    if isinstance(value := document.get(key), list) and all(isinstance(item, Mapping) for item in value):
        return value
    raise ImageInvalid(f"the image's {key} are not a list of objects")


def _texts(document: _Object, key: str) -> list[str]:
    value = document.get(key) or []
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ImageInvalid(f"the image's {key} is not a list of texts")
