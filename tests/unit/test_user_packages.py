# SPDX-License-Identifier: BSD-3-Clause
"""The Python of a virtual environment reads its user's packages by the file that an image gets (adaptation.py)."""

import json
import subprocess
import sys

import pytest

from nbagent.image.adaptation import USER_PACKAGES

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
def python(tmp_path):
    """The Python of a virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    return str(tmp_path / "venv/bin/python3")


@pytest.fixture
def packages(python, tmp_path):
    """The directory of the environment's packages."""
    (directory,) = (tmp_path / "venv/lib").glob("*/site-packages")
    return directory


@pytest.fixture
def own(tmp_path):
    """The directory of the user's packages, with the module `mine`."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    directory = tmp_path / "home/.local/lib" / version / "site-packages"
    directory.mkdir(parents=True)
    (directory / "mine.py").touch()
    return directory


def run(python, tmp_path, *options):
    """The output of FOUND: the path of `mine`, ENABLE_USER_SITE, sys.path."""
    done = subprocess.run([python, *options, "-c", FOUND], env={"HOME": str(tmp_path / "home")}, check=True,
                          capture_output=True, text=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_packages_of_the_user_are_found_after_those_of_the_environment(python, packages, own, tmp_path):
    assert run(python, tmp_path)[:2] == [None, False]
    (packages / "user.pth").write_text(USER_PACKAGES)
    found, enabled, path = run(python, tmp_path)
    assert (found, enabled) == (f"{own}/mine.py", True)
    assert path.index(str(packages)) < path.index(str(own)) and path.count(str(own)) == 1
    (packages / "mine.py").touch()
    assert run(python, tmp_path)[0] == f"{packages}/mine.py"


@pytest.mark.parametrize("option", ["-s", "-I"])
def test_options_of_python_that_leave_them_out_still_do(python, packages, own, tmp_path, option):
    (packages / "user.pth").write_text(USER_PACKAGES)
    assert run(python, tmp_path, option)[:2] == [None, False]
