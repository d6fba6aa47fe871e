# SPDX-License-Identifier: BSD-3-Clause
"""The examples of README.md and the pages: commands of nbagent exist with their options, and settings are accepted."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from nbagent.cli.commands import nbagent
from nbagent.config import host_config
from nbagent.core.errors import ConfigError
from nbagent.gateway import settings as gateway

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "images/README.md", *sorted((ROOT / "packaging/docs").glob("*.md"))]
# In a block, in the text, or after another command of the same line; up to a pipe or a comment.
COMMAND = re.compile(r"(?:^    (?:\$ )?|`|&& |`sudo )nbagent ([a-z][^`\n#;|&]*)", re.MULTILINE)
BLOCK = re.compile(r"(?:^    .*\n|^\n(?=    ))+", re.MULTILINE)
SETTING = re.compile(r"\[[\w.]+\]|[\w.]+ *=|\s|#")


def commands(text: str) -> list[list[str]]:
    return [words.split() for words in COMMAND.findall(text)]


def faults(words: list[str]) -> Iterator[str]:
    """The words that are no command, subcommand or option."""
    command: click.Command = nbagent
    for word in words:
        if isinstance(command, click.Group):
            if word not in command.commands:
                yield f"{word} in {words}"
                return
            command = command.commands[word]
        elif word.startswith("--"):
            options = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
            if word.partition("=")[0].rstrip(".,)") not in options:
                yield f"{word} in {words}"


def settings(text: str) -> Iterator[str]:
    """The parts of blocks that are settings: from a line with a table to the first that can be none."""
    for block in BLOCK.findall(text):
        lines = [line[4:] for line in block.splitlines()]
        while lines and not re.match(r"\[[\w.]+\]$", lines[0]):
            lines.pop(0)
        count = next((number for number, line in enumerate(lines) if line and not SETTING.match(line)), len(lines))
        if count:
            yield "\n".join(lines[:count])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_of_a_page_exist(page: Path) -> None:
    assert not [fault for words in commands(page.read_text()) for fault in faults(words)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_of_a_page_are_accepted(page: Path) -> None:
    for text in settings(page.read_text()):
        tables = tomllib.loads(text)
        with contextlib.suppress(ConfigError):
            host_config.parse(tables)
            continue
        gateway.parse(tables)


def test_the_examples_are_found_and_wrong_ones_are_seen() -> None:
    readme = PAGES[0].read_text()
    assert len(commands(readme)) > 10 and len(list(settings(readme))) > 3
    assert list(faults(["gateway", "add-hosts"])) and list(faults(["drain", "--of"]))
    assert not list(faults(["gateway", "add-host", "c07", "10.1.0.7"]))
