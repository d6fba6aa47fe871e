# SPDX-License-Identifier: BSD-3-Clause
"""The modules and extensions that a fork would break are found by name."""

import threading
import time

import pytest

from nbagent.zygote import inherited
from nbagent.zygote.inherited import IMPORTED, Inherited, Openers, descriptors
from nbagent.zygote.inherited import threads as running


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Leaves out the threads that run before the test, because a worker of pytest-xdist has two."""
    others = running() - 1
    monkeypatch.setattr(inherited, "threads", lambda: running() - others)


def test_a_file_is_attributed_to_the_extension_that_opened_it(tmp_path):
    openers, allowed = Openers(), descriptors()
    with openers.during("the extension lab_x"):
        file = (tmp_path / "common.db").open("w")
    for check in (openers.check_extensions, lambda: openers.check(allowed)):
        with pytest.raises(Inherited) as raised:
            check()
        assert raised.value.extensions == {"lab_x": f"{tmp_path}/common.db is open"}
    file.close()
    openers.check_extensions()
    assert raised.value.extensions == {"lab_x": f"{tmp_path}/common.db is open"}
    assert raised.value.avoidable and raised.value.modules == {}


def test_a_file_of_the_server_cannot_be_avoided(tmp_path):
    openers, allowed = Openers(), descriptors()
    with openers.during("a request or a kernel of the warm-up"):
        file = (tmp_path / "common.db").open("w")
    with file, pytest.raises(Inherited) as raised:
        openers.check(allowed)
    assert not raised.value.avoidable and not raised.value.extensions


def test_threads_are_attributed_to_the_module_that_started_them():
    openers, end = Openers(), threading.Event()
    thread = threading.Thread(target=end.wait)
    with openers.during("the module a.b"):
        thread.start()
    try:
        with pytest.raises(Inherited, match=r"1 threads run besides .*: 1 by the module a\.b") as raised:
            openers.check_threads()
    finally:
        end.set()
        thread.join()
    assert raised.value.modules == {"a.b": "1 threads run"} and raised.value.avoidable


class Manager:
    """An extension manager whose methods open what they are given."""

    def __init__(self):
        self.opened = []

    def add_extension(self, name, path=None, enabled=False):
        self.opened.append(path.open("w") if path else None)

    def load_extension(self, name, path=None):
        self.opened.append(path.open("w") if path else None)


def test_an_extension_that_opens_a_file_at_its_import_is_known_apart(tmp_path):
    openers, manager = Openers(), Manager()
    with openers.of_methods(Manager, add_extension=IMPORTED, load_extension=""):
        manager.add_extension("lab_x", tmp_path / "x.db", enabled=True)
        manager.load_extension("lab_y", tmp_path / "y.db")
    with pytest.raises(Inherited, match=r"x\.db, opened by the extension lab_x, when it is imported") as raised:
        openers.check_extensions()
    for file in manager.opened:
        file.close()
    assert set(raised.value.extensions) == {"lab_x", "lab_y"} and raised.value.imported == ["lab_x"]
    assert raised.value.avoidable


def test_threads_that_end_before_a_fork_are_no_hindrance():
    end, threads, before = threading.Event(), [], running()

    def settle():
        end.set()
        threads[0].join()
        while running() != before:  # the kernel ends a thread a moment after join() has returned
            time.sleep(0.001)

    openers = Openers(settle)
    with openers.during("the module numpy"):
        threads.append(threading.Thread(target=end.wait))
        threads[0].start()
    openers.check_threads()
