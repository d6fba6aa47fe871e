# SPDX-License-Identifier: BSD-3-Clause
"""jupyter_server's own API tests pass in a slot, by fork and by exec: some here, all by `make conformance`."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "conformance"))

import suite
from execd import execd_image
from waits import check_waits

ALL = "NBAGENT_CONFORMANCE" in os.environ
# Some of each kind, in a few seconds.
SOME = ("test_create_untitled or test_mkdir or test_upload_b64 or test_copy_put_400 or test_copy_dir_400 or test_rename"
        " or test_delete or test_checkpoints or test_default_kernels or test_modify_kernel or test_terminal_create"
        " or test_download or test_kernel_handler or test_main_kernel_handler or test_connection")


ACTIVATE = """
sed -i '1i activate = "export ACTIVATED=$(id -u); unset LANG; exec 5<&-"' etc/nbagent-image.toml
"""


@pytest.fixture
def execd(agent):
    """The name of an image whose slots start by exec, after a script."""
    with execd_image(agent, ACTIVATE) as name:
        yield name


def of_slot(agent, select, **options):
    """The results in a slot with enough memory for the suite's own files."""
    server = suite.slot(agent.open(memory="1G", **options))
    return server.run(select=select)


def passed(results):
    return sum(outcome == "passed" for outcome, _ in results.values())


@pytest.mark.skipif(ALL, reason="the other test has all")
def test_a_part_of_the_suite_of_jupyter_server_passes(agent, execd):
    for options in ({}, {"image": execd}):
        results = of_slot(agent, f"({SOME}) and {suite.WITHOUT}", **options)
        failed = {name: text for name, (outcome, text) in results.items() if outcome not in ("passed", "skipped")}
        assert not failed and passed(results) >= 40, (options, passed(results), failed)
    # test_culling.py has this by fork. It is here because adding an image takes longer than the check.
    notebook = agent.open(image=execd)
    check_waits(agent, notebook)
    found = notebook.run("import os; print(os.environ['ACTIVATED'] == str(os.getuid()), 'LANG' in os.environ)").stream
    assert found.split() == ["True", "False"]


@pytest.mark.skipif(not ALL, reason="by make conformance")
def test_the_suite_of_jupyter_server_passes_as_with_a_plain_server(agent, execd):
    with suite.plain(agent.host) as plain:
        results = {"plain": plain.run()}
    results["fork"] = of_slot(agent, suite.WITHOUT)
    results["exec"] = of_slot(agent, suite.WITHOUT, image=execd)
    print(suite.table(results))
    assert passed(results["plain"]) >= 190
    for kind in ("fork", "exec"):
        assert not suite.differences(results["plain"], results[kind]), kind
