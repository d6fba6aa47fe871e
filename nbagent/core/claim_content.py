# SPDX-License-Identifier: BSD-3-Clause
"""The content of a claim: small files in the claim itself, and the URL of an archive.

    {"files": {"analysis/hello.ipynb": "text", "data.bin": {"base64": "AAEC"}}, "archive": "https://…"}

All limits of a claim's content are here. Pure: untrusted JSON becomes values that may be written below a slot's home
directory, or an InvalidField that names the file. The API decodes the files once; from there on their bytes are in a
memfd, and a FileBundle describes them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from nbagent.core import urls
from nbagent.core.errors import BadRequest, InvalidField

FILES_MAX = 100
# Of all files together, decoded. More belongs into an image or an archive.
FILES_MAX_BYTES = 1 << 20
# Of a claim's whole body, because most clients escape a letter of two bytes as six.
BODY_MAX_BYTES = 3 * FILES_MAX_BYTES + (256 << 10)
PATH_MAX_BYTES = 1000
NAME_MAX_BYTES = 255

FILES_EXPECTED = (
    f"an object of at most {FILES_MAX} files and {FILES_MAX_BYTES} bytes: relative paths, each with its text or"
    ' {"base64": "…"}'
)
FILE_PATH_EXPECTED = (
    'a path of a file relative to the home directory, such as "analysis/hello.ipynb", without "..", "." or empty'
    f" parts, at most {PATH_MAX_BYTES} bytes"
)
FILE_DATA_EXPECTED = 'the text of the file, or {"base64": "…"}'
NONE_ALLOWED = "no archive, because claims.archives in this host's configuration is empty"


@dataclass(frozen=True)
class File:
    """One file: its path relative to the home directory, and its bytes."""

    path: str
    data: bytes


@dataclass(frozen=True)
class FileBundle:
    """Files on their way to a slot: their paths and sizes, and a memfd with their bytes, one file after the other.

    `digest` is of all of it, so that `str`, which a claim's fingerprint is made of, differs when a byte differs. The
    descriptor is borrowed from the request that brought it.
    """

    entries: tuple[tuple[str, int], ...]
    digest: str
    fd: int

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        return f"sha256:{self.digest}"


@dataclass(frozen=True)
class Content:
    """Content that a slot's home directory gets before the slot is handed out."""

    files: FileBundle | tuple[File, ...] = ()
    archive: str | None = None

    def __bool__(self) -> bool:
        return bool(self.files) or self.archive is not None


def parse_files(value: object) -> FileBundle | tuple[File, ...]:
    """The files of a claim. Raises InvalidField, or ValueError where no single file is wrong.

    A FileBundle and a tuple of File are returned as they are, because the API has checked them already.
    """
    if isinstance(value, (FileBundle, tuple)):
        return value
    if not isinstance(value, Mapping) or len(value) > FILES_MAX:
        raise ValueError(FILES_EXPECTED)
    files = tuple(File(_path(path), _data(path, data)) for path, data in value.items())
    if sum(len(file.data) for file in files) > FILES_MAX_BYTES:
        raise ValueError(FILES_EXPECTED)
    directories = {path for file in files for path in _parents(file.path)}
    for file in files:
        if file.path in directories:
            _refuse(file.path, "a file or a directory of this path, not both")
    return files


def checked_entries(value: object, size_bytes: int) -> tuple[tuple[str, int], ...]:
    """The entries of a bundle of `size_bytes`, from the API. Raises BadRequest."""
    if not isinstance(value, list) or len(value) > FILES_MAX:
        raise BadRequest(f"expected a list of at most {FILES_MAX} files")
    entries = tuple(_entry(item) for item in value)
    if sum(size for _, size in entries) != size_bytes:
        raise BadRequest(f"the sizes of the files do not add up to {size_bytes} bytes")
    return entries


def _entry(item: object) -> tuple[str, int]:
    match item:
        case [str(path), int(size)] if size >= 0 and not isinstance(size, bool):
            return _path(path), size
    raise BadRequest("expected a list of [path, size in bytes]")


def parse_archive(value: object, allowed: tuple[str, ...]) -> str:
    """The URL of an archive that is below one of those `allowed`. Raises ValueError."""
    if not allowed:
        raise ValueError(NONE_ALLOWED)
    if not isinstance(value, str):
        raise ValueError(urls.URL_EXPECTED)
    url = urls.parse(value)
    if not any(url.is_below(urls.parse(prefix)) for prefix in allowed):
        raise ValueError(f"a URL below {' or '.join(allowed)}")
    return value


def _path(path: str) -> str:
    """`path`, checked. Raises InvalidField."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        _refuse(path, "a path in UTF-8")
    parts = encoded.split(b"/")
    if any(part in (b"", b".", b"..") or len(part) > NAME_MAX_BYTES for part in parts):
        _refuse(path, FILE_PATH_EXPECTED)
    if len(encoded) > PATH_MAX_BYTES or b"\0" in encoded:
        _refuse(path, FILE_PATH_EXPECTED)
    return path


def _data(path: str, data: object) -> bytes:
    try:
        if isinstance(data, str):
            return data.encode()
        if not isinstance(data, Mapping) or list(data) != ["base64"] or not isinstance(data["base64"], str):
            _refuse(path, FILE_DATA_EXPECTED)
        return base64.b64decode(data["base64"], validate=True)
    except UnicodeEncodeError:
        _refuse(path, "text in UTF-8")
    except ValueError:
        _refuse(path, "base64 as in RFC 4648, without line breaks")


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _refuse(path: str, expected: str) -> NoReturn:
    shown = repr(path) if len(path) <= 80 else repr(path[:80])[:-1] + "…'"
    raise InvalidField(f"files, {shown}: expected {expected}", field="files", value=shown, expected=expected)
