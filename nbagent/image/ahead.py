# SPDX-License-Identifier: BSD-3-Clause
"""The files that JupyterLab's page loads first, which the landing page has the browser load while a person reads it.

The list follows from the published files of the image. JupyterLab's program and its extensions are bundles of webpack
or Rspack: index.html names the first script, whose text has the chunks that it loads before the page appears, and for
each chunk the shared modules, with their chunks, that must be there before. Chunks that code requests later, such as
the modes of the editor or MathJax, are not in the list, because a page needs few of them.

The files come from an image, and so from a stranger: only names are read from them, and each name is that of a
published file. The list has no entries, or fewer, where the text is not as expected; the page then loads the files
itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from nbagent.wire.assets import EXTENSIONS, PROGRAM

# Below /assets/DIGEST/: a JSON array of paths with their query.
NAME = "ahead.json"
# The page of JupyterLab 4.6 loads 1.3 MB.
_MAX_BYTES = 8 << 20
_MAX_SOURCE_BYTES = 4 << 20
_MAX_ENTRY_BYTES = 256 << 10
_MAX_EXTENSIONS = 100

_MAIN = re.compile(r"[/}](main\.[0-9a-f]+\.js)\?v=[0-9a-f]+")
# Minified code writes 5000 as 5e3.
_ID = r"\d{1,9}(?:e\d)?"
_CALL = re.compile(rf"\.e\(({_ID})\)")
_FIRST = re.compile(rf"Promise\.all\(\[((?:\w+\.e\({_ID}\),?)+)\]\)\.then\([^;]{{1,80}}?\)\)\.main\b")
_EXPOSED = re.compile(r'"\./(?:extension|mimeExtension|style)":\(\)=>(.{1,2000}?)\.then\(', re.DOTALL)
# {1:[2,3],4:[5]}: the shared modules of chunks.
_MODULES = re.compile(rf'\{{(?:{_ID}:\["?\d[^\]{{}}]{{0,4000}}\],?)+\}}')
_MODULES_OF = re.compile(rf"({_ID}):\[([^\]]*)\]")
# How each shared module is loaded.
_SHARED = re.compile(rf"\b({_ID}):(?:\(\)=>|\{{shareScope:)")
_SHARED_END = re.compile(r"\.then\(\(*\(\)=>\(*\(\)=>")
_CHUNK = re.compile(r"(\d+|[a-z]\w*)\.([0-9a-f]+)\.js")


def write(static: Path) -> None:
    """Writes the list of a published tree. It replaces a file of the image of the same name."""
    files, size = [], 0
    for path in dict.fromkeys((*_program(static), *_extensions(static))):
        size += _size(static / path.partition("?")[0])
        if size > _MAX_BYTES:
            break
        files.append(path)
    target = static / NAME
    target.unlink(missing_ok=True)
    target.write_text(json.dumps(files) + "\n")
    target.chmod(0o644)
    # Equal on every host of a fleet, as the times of the other files.
    time_ns = (static / PROGRAM).stat().st_mtime_ns
    with contextlib.suppress(FileNotFoundError):
        time_ns = (static / PROGRAM / "index.html").stat().st_mtime_ns
    os.utime(target, ns=(time_ns, time_ns))


def eager_chunks(script: str, first: Iterable[str]) -> set[str]:
    """The chunks `first` and those that the shared modules of these need, from the text of a bundle's first script."""
    modules: dict[str, list[str]] = {}
    for table in _MODULES.finditer(script):
        for chunk, names in _MODULES_OF.findall(table[0]):
            modules.setdefault(_plain(chunk), []).extend(_plain(name.strip('"')) for name in names.split(","))
    needed = dict(_shared(script))
    found: set[str] = set()
    waiting = list(first)
    while waiting:
        if (chunk := waiting.pop()) not in found:
            found.add(chunk)
            waiting += [other for module in modules.get(chunk, ()) for other in needed.get(module, ())]
    return found


def first_chunks(script: str) -> list[str]:
    """The chunks that the first script of JupyterLab loads before it starts the application."""
    match = _FIRST.search(script)
    return _calls(match[1]) if match else []


def _shared(script: str) -> Iterator[tuple[str, list[str]]]:
    starts = list(_SHARED.finditer(script))
    limits = [*(start.start() for start in starts[1:]), len(script)]
    for start, limit in zip(starts, limits, strict=False):
        if end := _SHARED_END.search(script, start.end(), limit):
            yield _plain(start[1]), _calls(script[start.end() : end.start()])


def _calls(text: str) -> list[str]:
    return [_plain(chunk) for chunk in _CALL.findall(text)]


def _plain(number: str) -> str:
    return str(int(float(number))) if "e" in number else number


def _program(static: Path) -> Iterator[str]:
    directory = static / PROGRAM
    main = _MAIN.search(_text(directory / "index.html"))
    if main is None or not (script := _text(directory / main[1])):
        return
    yield _address(PROGRAM, main[1])
    chunks = _chunks(directory)
    wanted = eager_chunks(script, first_chunks(script))
    # Chunks of the application have a number, except its core, which every page needs.
    for name in sorted(chunks, key=lambda name: (name.isdigit(), name)):
        if name in wanted or name.endswith("_core"):
            yield _address(PROGRAM, chunks[name])


def _extensions(static: Path) -> Iterator[str]:
    root = static / EXTENSIONS
    packages = sorted([*root.glob("*/package.json"), *root.glob("@*/*/package.json")])
    for package in packages[:_MAX_EXTENSIONS]:
        try:
            entry = str(json.loads(_text(package, _MAX_ENTRY_BYTES))["jupyterlab"]["_build"]["load"])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        script = package.parent / entry
        if not re.fullmatch(r"static/[\w.-]+\.js", entry) or not (text := _text(script, _MAX_ENTRY_BYTES)):
            continue
        below = str(script.parent.relative_to(static))
        yield f"{below}/{script.name}"
        chunks = _chunks(script.parent)
        for exposed in _EXPOSED.finditer(text):
            yield from (_address(below, chunks[name]) for name in _calls(exposed[1]) if name in chunks)


def _chunks(directory: Path) -> Mapping[str, str]:
    """The names of the files of chunks, by chunk."""
    return {match[1]: path.name for path in directory.glob("*.js") if (match := _CHUNK.fullmatch(path.name))}


def _address(directory: str, name: str) -> str:
    """A script's path, with the query by which webpack's runtime requests it."""
    return f"{directory}/{name}?v={name.split('.')[1]}"


def _text(path: Path, limit_bytes: int = _MAX_SOURCE_BYTES) -> str:
    try:
        if _size(path) <= limit_bytes:
            return path.read_text(errors="replace")
    except OSError:
        pass
    return ""


def _size(path: Path) -> int:
    return path.stat().st_size
