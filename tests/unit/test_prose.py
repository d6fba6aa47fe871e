# SPDX-License-Identifier: BSD-3-Clause
"""The prose of the project: no word of the short list below in comments, docstrings, messages and documents.

The list holds words that hide the subject or the cause of a sentence (packaging/docs/contributing.md has the rule).
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PERSONS = "nobody|somebody|anybody|everybody|whoever|whomever|whom"
SPEECH = "says|said|tells|told|hears|heard|asks"
METAPHORS = "keeper|understudy|rehearsal|rehearsed|nursery|bereft|floors|half made|in vain|without a trace|passed over"
WORDS = re.compile(rf"\b(?:{PERSONS}|{SPEECH}|{METAPHORS})\b", re.IGNORECASE)
# A sentence that opens with a relative pronoun names no subject; a question may.
OPENER = re.compile(r"(?:^|[.!:;]\s+)(?:What|Who|Whose|Which)\b(?![^.]*\?)")
DOCUMENTS = {".md", ".html", ".catalog", ".service", ".socket", ".slice", ".1", ".5", ".8", ".conf", ".toml"}
# A word that is right where it stands: the file, and a part of the sentence.
ALLOWED: tuple[tuple[str, str], ...] = (
    ("tests/unit/test_prose.py", ""),
    ("packaging/docs/contributing.md", ""),  # has the examples of what not to write
)


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def is_python(path: Path) -> bool:
    return path.suffix == ".py" or (path.suffix == "" and path.read_bytes().startswith(b"#!/usr/bin/python3"))


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments as (line, text); lines of one block are joined, so that an opener is one of a sentence."""
    block: list[str] = []
    first = last = column = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.string.startswith(("#!", "# noqa", "# type:", "# fmt:")):
            continue
        line, at = token.start
        if block and (line, at) != (last + 1, column):
            yield first, " ".join(block)
            block = []
        first, last, column = (first if block else line), line, at
        block.append(token.string.lstrip("# "))
    if block:
        yield first, " ".join(block)


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings, and other strings of several words: messages, tables of messages, help texts."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count(" ") >= 2:
            yield node.lineno, " ".join(node.value.split())


def prose(path: Path) -> Iterator[tuple[int, str]]:
    if is_python(path):
        source = path.read_text()
        yield from comments(source)
        yield from texts(source)
    elif path.suffix in DOCUMENTS:
        yield from enumerate(path.read_text().splitlines(), 1)


def findings(path: Path) -> list[str]:
    name = str(path.relative_to(ROOT))
    found = []
    for line, text in prose(path):
        for match in (*WORDS.finditer(text), *OPENER.finditer(text)):
            around = text[max(0, match.start() - 40):match.end() + 40]
            if not any(name == file and part in around for file, part in ALLOWED):
                found.append(f"{name}:{line}: {match[0].strip()!r} in {around!r}")
    return found


def test_the_checker_finds_words_and_openers(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text('"""What is read."""\n# a process that nobody\n# reaps\nTEXT = "the slot said no"\nname = "said"\n')
    assert [match[0] for _, text in prose(file) for match in WORDS.finditer(text)] == ["nobody", "said"]
    assert [text for _, text in prose(file) if OPENER.search(text)] == ["What is read."]
    assert not OPENER.search("Which Python is this?")


@pytest.mark.parametrize("folder", ["nbagent", "tests", "packaging", "images", "units", ""])
def test_prose_names_subjects_and_causes(folder: str) -> None:
    paths = [path for path in tracked() if path.relative_to(ROOT).parts[0] == folder or (
        not folder and path.parent == ROOT)]
    assert paths
    found = [finding for path in paths for finding in findings(path)]
    assert not found, "\n".join(found)
