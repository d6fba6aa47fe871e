# SPDX-License-Identifier: BSD-3-Clause
"""The Python of a virtual environment reads its user's packages after the step UserPackages."""

import json
import subprocess
import sys

import pytest

from nbagent.sandbox.steps import UserPackages

FOUND = """
import json, site, sys
try:
    import mine
    found = mine.__file__
except ImportError:
    found = None
print(json.dumps([found, site.ENABLE_USER_SITE, sys.path]))
"""


@pytest.fixture
def environment(tmp_path):
    """A function that makes a virtual environment with options; its Python."""
    def made(*options):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", *options, tmp_path / "venv"], check=True)
        return str(tmp_path / "venv/bin/python3")

    return made


@pytest.fixture
def own(tmp_path):
    """The directory of the user's packages, with the module `mine`."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    directory = tmp_path / "home/.local/lib" / version / "site-packages"
    directory.mkdir(parents=True)
    (directory / "mine.py").touch()
    return directory


def run(python, tmp_path, *options):
    """What FOUND prints: the path of `mine`, ENABLE_USER_SITE, sys.path."""
    done = subprocess.run([python, *options, "-c", FOUND], env={"HOME": str(tmp_path / "home")}, check=True,
                          capture_output=True, text=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_packages_of_the_user_are_found_after_those_of_the_environment(environment, own, tmp_path):
    python = environment()
    assert run(python, tmp_path)[:2] == [None, False]
    UserPackages(python).do()
    found, enabled, path = run(python, tmp_path)
    assert (found, enabled) == (f"{own}/mine.py", True)
    (packages,) = (tmp_path / "venv/lib").glob("*/site-packages")
    assert path.index(str(packages)) < path.index(str(own)) and path.count(str(own)) == 1
    (packages / "mine.py").touch()
    assert run(python, tmp_path)[0] == f"{packages}/mine.py"


@pytest.mark.parametrize("option", ["-s", "-I"])
def test_options_of_python_that_leave_them_out_still_do(environment, own, tmp_path, option):
    python = environment()
    UserPackages(python).do()
    assert run(python, tmp_path, option)[:2] == [None, False]


def test_an_environment_with_the_systems_packages_is_not_changed(environment, own, tmp_path):
    python = environment("--system-site-packages")
    before = sorted(map(str, (tmp_path / "venv").rglob("*")))
    UserPackages(python).do()
    assert sorted(map(str, (tmp_path / "venv").rglob("*"))) == before
    assert run(python, tmp_path)[0] == f"{own}/mine.py"


@pytest.mark.parametrize("program", ["/usr/bin/python3", "{}/none/bin/python3", "sh", "/sh", ""])
def test_a_program_outside_of_an_environment_changes_nothing(tmp_path, program):
    UserPackages(program.format(tmp_path)).do()
    assert list(tmp_path.iterdir()) == []
