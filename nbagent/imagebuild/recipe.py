# SPDX-License-Identifier: BSD-3-Clause
"""A recipe directory: recipe.toml, requirements.txt, and files/ that are copied over the root."""

from __future__ import annotations

import hashlib
import os
import platform
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from nbagent.image import compression
from nbagent.imagebuild.commands import fail

_BUILDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """The keys of recipe.toml, which images/README.md describes."""

    path: Path
    suite: str
    source_date_epoch: int
    packages: tuple[str, ...]
    remove: tuple[str, ...]
    check: str
    user: str
    user_id: int
    home: str
    home_directories: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def requirements(self) -> Path:
        return self.path / "requirements.txt"

    def key(self) -> str:
        """Hash of everything that the archive depends on, except the packages that Debian serves at the time."""
        state = hashlib.sha256(platform.machine().encode())
        builder = (*_BUILDER.glob("*.py"), Path(compression.__file__))
        for top, files in ((_BUILDER.parent, builder), (self.path.parent, self.path.rglob("*"))):
            for file in sorted(path for path in files if path.is_file() or path.is_symlink()):
                content = str(file.readlink()).encode() if file.is_symlink() else file.read_bytes()
                # The installed modules have other modes than those of a checkout.
                executable = top == self.path.parent and bool(file.lstat().st_mode & 0o100)
                relative = os.path.relpath(file, top)
                state.update(f"\0{relative}\0{executable}\0{len(content)}\0".encode() + content)
        return state.hexdigest()[:16]


def read_recipe(path: Path) -> Recipe:
    path = path.resolve()
    file = path / "recipe.toml"
    try:
        data = tomllib.loads(file.read_text())
    except FileNotFoundError:
        fail(f"{path} is not a recipe: it has no recipe.toml")
    except tomllib.TOMLDecodeError as error:
        fail(f"{file} is not TOML: {error}")
    keys = _Keys(file, "", data)
    user = keys.table("user")
    recipe = Recipe(
        path=path,
        suite=keys.text("suite"),
        source_date_epoch=keys.number("source_date_epoch"),
        packages=keys.texts("packages"),
        remove=keys.texts("remove", ()),
        check=keys.text("check", "true"),
        user=user.text("name"),
        user_id=user.number("id"),
        home=user.text("home"),
        home_directories=user.texts("directories", ()),
    )
    user.check_unknown()
    keys.check_unknown()
    return recipe


class _Keys:
    """A table of recipe.toml, whose keys are taken out one by one."""

    def __init__(self, file: Path, prefix: str, data: dict[str, object]) -> None:
        self._file, self._prefix, self._data = file, prefix, data

    def text(self, key: str, default: str | None = None) -> str:
        value = self._take(key, default)
        return value if isinstance(value, str) else self._wrong(key, "a text")

    def number(self, key: str) -> int:
        value = self._take(key, None)
        return value if isinstance(value, int) else self._wrong(key, "a whole number")

    def texts(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        value = self._take(key, default)
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        return self._wrong(key, "a list of texts")

    def table(self, key: str) -> _Keys:
        value = self._take(key, None)
        return _Keys(self._file, f"{key}.", value) if isinstance(value, dict) else self._wrong(key, "a table")

    def check_unknown(self) -> None:
        if self._data:
            fail(f"{self._file}: unknown key {', '.join(self._prefix + key for key in self._data)}")

    def _take(self, key: str, default: object) -> object:
        value = self._data.pop(key, default)
        if value is None:
            fail(f"{self._file}: key {self._prefix}{key} is missing")
        return value

    def _wrong(self, key: str, expected: str) -> NoReturn:
        fail(f"{self._file}: {self._prefix}{key}: expected {expected}")
