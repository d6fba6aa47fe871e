# SPDX-License-Identifier: BSD-3-Clause
"""Packages that a user installs over loaded ones, so that the next kernel has to be started by exec."""

import importlib
import shutil
import sys
import time

import pytest

from nbagent.zygote import installed

LOADED = "loaded_one", "loaded_package"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The image's directory of packages, of which `loaded_one` and `loaded_package` are imported."""
    place = tmp_path / "lib/python3/site-packages"
    (place / "loaded_package").mkdir(parents=True)
    for name in ("loaded_one.py", "other_one.py", "loaded_package/__init__.py"):
        (place / name).touch()
    monkeypatch.setattr(sys, "path", [str(place)])
    monkeypatch.setattr(installed.site, "getusersitepackages", lambda: str(tmp_path / "user/site-packages"))
    for name in LOADED:
        importlib.import_module(name)
    monkeypatch.setattr(installed, "_noted_ns", installed._noted_ns)
    time.sleep(0.02)  # more than a tick of the clock
    yield place
    for name in LOADED:
        del sys.modules[name]


def replace(place, name):
    """As pip does it: another directory in the place of the former."""
    (place / name).rename(place / f"~{name}")
    (place / name).mkdir()
    shutil.rmtree(place / f"~{name}")


@pytest.mark.parametrize(("install", "expected"), [
    (lambda place: None, False),
    (lambda place: (place / "new.py").touch(), False),
    (lambda place: (place / "other_one.py").unlink(), False),
    (lambda place: (place / "new-1.0.dist-info").mkdir(), False),
    (lambda place: replace(place, "loaded_package"), True),
    (lambda place: (place / "loaded_one.py").unlink(), True),
    (lambda place: shutil.rmtree(place / "loaded_package"), True),
    (lambda place: (place / "__editable__.new.pth").touch(), True),
    (lambda place: (place / "sitecustomize.py").touch(), True),
])
def test_packages_of_the_image_that_are_replaced(packages, install, expected):
    installed.note()
    install(packages)
    assert installed.over_loaded() is expected


def test_what_was_there_before_the_user_is_not_regarded_as_replaced(packages):
    (packages / "early.pth").touch()
    replace(packages, "loaded_package")
    assert not installed.over_loaded()
    time.sleep(0.02)
    installed.note()
    assert not installed.over_loaded()


@pytest.mark.parametrize(("name", "expected"), [
    ("loaded_one.py", True), ("new.py", False), ("new.pth", True), ("usercustomize.py", True),
])
def test_packages_of_the_users_own_site(packages, tmp_path, name, expected):
    """At any time, because they come before the image's."""
    (tmp_path / "user/site-packages").mkdir(parents=True)
    (tmp_path / "user/site-packages" / name).touch()
    installed.note()
    assert installed.over_loaded() is expected
