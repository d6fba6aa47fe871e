# SPDX-License-Identifier: BSD-3-Clause
"""Finds the Python interpreter of an image's JupyterLab, from the jupyter-lab on the image's PATH.

If the PATH has none, the image's own command may name an environment that its entry point activates: `places` has the
directories in which to look.

The command is a script in one of these forms, possibly behind symbolic links, which are resolved within the image:

    #!/opt/conda/bin/python3.12 -I         pip and conda
    #!/usr/bin/env -S python3 -I           env(1), which searches the PATH
    #!/bin/sh                              a shell's script that is Python too, for a path that is longer than the
    '''exec' "/long/python" "$0" "$@"      kernel's limit or contains a space
    #!/bin/sh                              a wrapper of another jupyter-lab or of `python -m jupyterlab`
    exec /opt/venv/bin/jupyter-lab "$@"

For any other form, such as the program that pixi writes, it is the interpreter in the directory of the script. Only the
form of the files is read; no program of the image is run.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import shlex
from collections.abc import Mapping, Sequence

from nbagent.image import manifest as manifests
from nbagent.untrusted.refusal import Refused
from nbagent.untrusted.tar import Parts, name_parts
from nbagent.untrusted.tree import Tree

_COMMAND = "jupyter-lab"
_PYTHON = re.compile(r"(?:python|pypy)[0-9.]*")
_SHELLS = ("sh", "bash", "dash", "ash")
_BESIDE = ("python3", "python")
# The first word after exec, quoted or not. 'exec' is quoted in a script that is Python too.
_EXEC = re.compile(r"""^\s*(?:'''exec'|exec)\s+(?:"([^"$`\n]+)"|'([^'\n]+)'|([^\s"'$`]+))""", re.MULTILINE)
_WRAPPERS_MAX = 5
# A directory, and a name of an environment, in a command or in a script of a shell that is a part of it.
_DIRECTORY = re.compile(r"(?<![\w.$}~/-])(/[^\s\"'`$;&|<>()=:]*)/[^/\s\"'`$;&|<>()=:]*")
_NAME = re.compile(r"(?<![\w./-])[A-Za-z0-9][\w.-]{0,63}(?![\w./-])")
# Of uv and poetry, of Python's tutorial, and of pixi.
_OF_PROJECTS = (".venv", "venv", ".pixi/envs/default")
_COMMAND_MAX_CHARACTERS, _NAMED_MAX = 4096, 30
_ACTIVATE = "etc/conda/activate.d"
# https://docs.conda.io/projects/conda/en/latest/dev-guide/deep-dives/activation.html
_VARIABLES_OF_PACKAGES, _STATE, _UNSET = "etc/conda/env_vars.d", "conda-meta/state", "***unset***"


def interpreter(tree: Tree, path: str) -> str | None:
    """The interpreter of the first jupyter-lab in the directories of `path`, as an absolute path of the image."""
    for directory in path.split(":"):
        if directory.startswith("/"):
            found = _of_script(tree, posixpath.join(directory, _COMMAND), path, _WRAPPERS_MAX)
            if found is not None and _is_plain(found):
                return found
    return None


def places(command: Sequence[str], environment: Mapping[str, str], working: str = "") -> str:
    """The directories of programs of the environments that an image's command or its variables name, as a PATH; and of
    those of a project in the directory `working`.

        CMD ["/opt/venv/bin/jupyter", "lab"], CMD . /opt/venv/bin/activate && jupyter lab
        ENV VIRTUAL_ENV=/opt/venv, ENV MAMBA_ROOT_PREFIX=/opt/conda
        ENTRYPOINT ["conda", "run", "-n", "course", "jupyter", "lab"], CMD conda activate course && jupyter lab
        CMD ["uv", "run", "jupyter", "lab"], CMD ["pixi", "run", "jupyter", "lab"]
    """
    text = " ".join(command)[:_COMMAND_MAX_CHARACTERS]
    named = [directory for directory in _DIRECTORY.findall(text) if _is_plain(directory)][:_NAMED_MAX]
    values = [value.rstrip("/") for value in environment.values() if value.startswith("/") and ":" not in value]
    prefixes = [posixpath.dirname(directory) for directory in environment.get("PATH", "").split(":")]
    for directory in named:
        parts = directory.split("/")
        prefixes += ["/".join(parts[:depth]) for depth in range(len(parts) - 1, 1, -1)]
    prefixes = list(dict.fromkeys([*values, *prefixes]))[:_NAMED_MAX]
    # conda has its environments below its own directory.
    names = list(dict.fromkeys(_NAME.findall(text)))[:_NAMED_MAX]
    environments = [f"{working}/{name}" for name in _OF_PROJECTS if working]
    environments += [f"{prefix}/envs/{name}" for name in names for prefix in prefixes]
    return ":".join(dict.fromkeys([*named, *(f"{prefix}/bin" for prefix in (*environments, *prefixes))]))


def activation(tree: Tree, python: str) -> str | None:
    """The directory of conda's scripts that a shell runs when it activates the interpreter's environment."""
    directory = posixpath.join(_prefix(python), _ACTIVATE)
    return directory if _names(tree, directory, ".sh") else None


def variables(tree: Tree, python: str) -> dict[str, str]:
    """The variables that conda sets when it activates the interpreter's environment: those of the packages, by name of
    their files, and then those of `conda env config vars set` and of `variables` in an environment.yml.
    """
    prefix = _prefix(python)
    found: dict[str, object] = {}
    for name in _names(tree, posixpath.join(prefix, _VARIABLES_OF_PACKAGES), ".json")[:_NAMED_MAX]:
        found.update(_json(tree, posixpath.join(prefix, _VARIABLES_OF_PACKAGES, name)))
    if isinstance(own := _json(tree, posixpath.join(prefix, _STATE)).get("env_vars"), dict):
        found.update(own)
    return {
        name: value for name, value in found.items()
        if isinstance(value, str) and value != _UNSET and manifests.VARIABLE.fullmatch(name) and value.isprintable()
    }


def activate_script(python: str) -> str:
    """A script that runs those scripts as `conda activate` does, without conda, which takes a second."""
    prefix = shlex.quote(_prefix(python))
    return f'export CONDA_PREFIX={prefix}\nfor script in {prefix}/{_ACTIVATE}/*.sh; do . "$script"; done'


def _names(tree: Tree, directory: str, end: str) -> list[str]:
    """The names in a directory that end so; none if it does not exist."""
    try:
        with os.scandir(tree.directory_fd(tree.resolve(name_parts(directory)))) as found:
            return sorted(entry.name for entry in found if entry.name.endswith(end))
    except (OSError, Refused):
        return []


def _json(tree: Tree, path: str) -> dict[str, object]:
    """A JSON object of the image; empty if there is none."""
    parts = resolved(tree, path)
    try:
        document = json.loads(_beginning(tree, parts)) if parts else None
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _prefix(python: str) -> str:
    return posixpath.dirname(posixpath.dirname(python))


def resolved(tree: Tree, path: str) -> Parts | None:
    """The file that an absolute path of the image leads to, or None if it does not exist or is no file."""
    try:
        parts = tree.resolve(name_parts(path))
        file = tree.open_regular(parts) if parts else None
    # Refused: a name with NUL or more than the kernel's limits.
    except (OSError, Refused):
        return None
    if file is None:
        return None
    file.close()
    return parts


def _of_script(tree: Tree, script: str, path: str, wrappers_left: int) -> str | None:
    if (parts := resolved(tree, script)) is None:
        return None
    content = _beginning(tree, parts)
    first, _, rest = content.partition("\n")
    words = first[2:].split() if first.startswith("#!") else []
    if words and posixpath.basename(words[0]) == "env":
        # Options, such as -S, and variables precede the program.
        name = next((word for word in words[1:] if not word.startswith("-") and "=" not in word), "")
        words = [name if "/" in name else _searched(tree, name, path)]
    program = words[0] if words else ""
    if program.startswith("/") and _PYTHON.fullmatch(posixpath.basename(program)):
        return program
    if posixpath.basename(program) in _SHELLS:
        for match in _EXEC.finditer(rest):
            target = next(filter(None, match.groups()))
            name = posixpath.basename(target)
            target = target if target.startswith("/") else _searched(tree, target, path)
            if _PYTHON.fullmatch(name) and target:
                return target
            if name in (_COMMAND, "jupyter") and target and wrappers_left and target != script:
                return _of_script(tree, target, path, wrappers_left - 1)
    return _beside(tree, script, parts)


def _beside(tree: Tree, script: str, parts: Parts) -> str | None:
    """The interpreter in the directory of the script, or in that of the link that leads to it."""
    for directory in ("/" + "/".join(parts[:-1]), posixpath.dirname(script)):
        for name in _BESIDE:
            if resolved(tree, posixpath.join(directory, name)) is not None:
                return posixpath.join(directory, name)
    return None


def _searched(tree: Tree, name: str, path: str) -> str:
    """The program of this name in the first directory of `path` that has it, or ""."""
    for directory in path.split(":"):
        candidate = posixpath.join(directory, name)
        if name and "/" not in name and directory.startswith("/") and resolved(tree, candidate) is not None:
            return candidate
    return ""


def _beginning(tree: Tree, parts: Parts) -> str:
    file = tree.open_regular(parts)
    if file is None:
        return ""
    with file:
        return file.read(manifests.MAX_BYTES).decode(errors="replace")


def _is_plain(path: str) -> bool:
    """Whether a manifest may have this path."""
    return posixpath.normpath(path) == path and path.isprintable() and not path.startswith("//")
