# SPDX-License-Identifier: BSD-3-Clause
"""The completions of nbagent for shells: in a bash that completes, and the answers that zsh and fish get."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = ROOT / "packaging/completions"
RULES = (ROOT / "packaging/debian/rules").read_text()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment in which `nbagent` is the command of this checkout."""
    command = tmp_path / "nbagent"
    command.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                       "from nbagent.cli import main\nmain()\n")
    command.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def generated(shell: str) -> str:
    return subprocess.run([GENERATOR, shell], check=True, capture_output=True, text=True).stdout


def completed(environment: dict[str, str], *words: str) -> list[str]:
    """The words that bash offers for the last one of `words`."""
    script = f"""{generated('bash')}
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_nbagent_completion "$1" 2>&1
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script, "bash", *words], env=environment, capture_output=True, text=True,
                          check=True)
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize("words, expected", [
    (["nbagent", "rel"], ["release"]),
    (["nbagent", "gateway", "drain"], ["drain-host"]),
    (["nbagent", "claim", "--mem"], ["--memory"]),
    (["nbagent", "claim", "--network", "i"], ["internet"]),
    (["nbagent", "top", "--sort", ""], ["cpu", "memory", "idle", "age"]),
    (["nbagent", "nothing-begins-so"], [""]),
], ids=" ".join)
def test_bash_completes_commands_options_and_values(
    environment: dict[str, str], words: list[str], expected: list[str]
) -> None:
    # compopt is an error outside a completion that readline has called, and only files need it.
    assert completed(environment, *words) == expected


@pytest.mark.parametrize("shell, expected", [
    ("zsh", "plain\nrelease\n"),
    ("fish", "plain,release\t"),
])
def test_zsh_and_fish_get_the_commands_with_their_help(
    environment: dict[str, str], shell: str, expected: str
) -> None:
    asked = {"_NBAGENT_COMPLETE": f"{shell}_complete", "COMP_CWORD": "rel" if shell == "fish" else "1"}
    done = subprocess.run(["nbagent"], env=environment | asked | {"COMP_WORDS": "nbagent rel"}, capture_output=True,
                          text=True, check=True)
    assert done.stdout.startswith(expected) and "End slots." in done.stdout
    assert f"_NBAGENT_COMPLETE={shell}_complete" in generated(shell)


def test_the_package_has_each_completion_where_its_shell_looks() -> None:
    # The first line by which zsh finds it, and the last, because zsh executes the file at each completion.
    assert generated("zsh").startswith("#compdef nbagent\n") and generated("zsh").endswith('_completion "$@"\n')
    for file in ("bash-completion/completions/nbagent", "zsh/vendor-completions/_nbagent",
                 "fish/vendor_completions.d/nbagent.fish"):
        assert file in RULES


def test_an_unknown_shell_is_an_error() -> None:
    done = subprocess.run([GENERATOR, "csh"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "bash|zsh|fish" in done.stderr
