"""What a claim brings with it: small files in the claim itself, and the URL of an archive.

    {"files": {"analysis/hello.ipynb": "text", "data.bin": {"base64": "AAEC"}}, "archive": "https://…"}

All bounds of what travels inside a claim are here. Pure: what comes in is untrusted JSON, what goes out
are values that may be written below a slot's home directory, or an InvalidField that names the file.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from nbagent.core import urls
from nbagent.core.errors import InvalidField

FILES_MAX = 100
# Together, decoded. More belongs into an image or an archive.
FILES_MAX_BYTES = 1 << 20
# Of a claim's whole body: escaped as most clients do it, a letter of two bytes is six.
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
NONE_ALLOWED = "no archive, as this host allows none; claims.archives in its configuration says which it does"


@dataclass(frozen=True)
class File:
    """One file: its path relative to the home directory, and all that is in it."""

    path: str
    data: bytes


@dataclass(frozen=True)
class Content:
    """What is to be in a slot's home directory before anybody gets the slot."""

    files: tuple[File, ...] = ()
    archive: str | None = None

    def __bool__(self) -> bool:
        return bool(self.files) or self.archive is not None


def parse_files(value: object) -> tuple[File, ...]:
    """The files of a claim. Raises InvalidField, or ValueError where no single file is wrong."""
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


def _data(path: str, data: Any) -> bytes:
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
