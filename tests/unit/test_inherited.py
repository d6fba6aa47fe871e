# SPDX-License-Identifier: BSD-3-Clause
"""The modules and extensions that a fork would break are found by name."""

import threading

import pytest

from nbagent.zygote.inherited import Inherited, Openers, descriptors


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
