# SPDX-License-Identifier: BSD-3-Clause
"""jupyter_server's own API tests pass in a slot, by fork and by exec: some here, all by `make conformance`.

`make test-ui` has JupyterLab's own tests of its user interface.
"""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "conformance"))

import kernels
import reports
import suite
import ui
from execd import execd_image
from waits import check_waits

# "all", "ui", or "" for the part that is in make test.
WANTED = os.environ.get("NBAGENT_CONFORMANCE", "")
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


def opened(agent, kind, image):
    """The notebook of a slot that was started by fork or by exec: exec is also for claims until a zygote is ready."""
    def claimed():
        notebook = agent.open(image=image, memory="2G")
        if agent.api.get(f"/slots/{notebook.slot}").json()["launch"] == kind:
            return notebook
        agent.release(notebook.slot)
        return None

    return agent.wait(claimed, f"a slot of {image} by {kind}")


def root_of(agent, name):
    return next(image["root"] for image in json.loads(agent.run("nbagent", "image", "list", "--json"))
                if image["name"] == name)


def passed(results):
    return sum(outcome == "passed" for outcome, _ in results.values())


@pytest.mark.skipif(WANTED != "", reason="the other tests have all")
def test_a_part_of_the_suite_of_jupyter_server_passes_and_some_reports_are_not_true(agent, execd):
    for options in ({}, {"image": execd}):
        server = suite.slot(agent.open(memory="1G", **options))
        results = server.run(select=f"({SOME}) and {suite.WITHOUT}")
        failed = {name: text for name, (outcome, text) in results.items() if outcome not in ("passed", "skipped")}
        assert not failed and passed(results) >= 40, (options, passed(results), failed)
        tried = reports.run(server, reports.SOME)
        assert not any(outcome.error for outcome in tried.values()), (options, tried)
    # test_culling.py has this by fork. It is here because adding an image takes longer than the check.
    notebook = agent.open(image=execd)
    check_waits(agent, notebook)
    found = notebook.run("import os; print(os.environ['ACTIVATED'] == str(os.getuid()), 'LANG' in os.environ)").stream
    assert found.split() == ["True", "False"]


@pytest.mark.skipif(WANTED != "all", reason="by make conformance")
def test_the_suite_of_jupyter_server_passes_as_with_a_plain_server(agent, execd):
    with suite.plain(agent.host, root_of(agent, "minimal")) as plain:
        results = {"plain": plain.run()}
    results["fork"] = of_slot(agent, suite.WITHOUT)
    results["exec"] = of_slot(agent, suite.WITHOUT, image=execd)
    print(suite.table(results))
    assert passed(results["plain"]) >= 190
    for kind in ("fork", "exec"):
        assert not suite.differences(results["plain"], results[kind]), kind


@pytest.mark.skipif(WANTED != "all", reason="by make conformance")
def test_the_suite_of_ipykernel_passes_as_with_kernels_of_a_plain_server(agent, execd):
    with suite.plain(agent.host, root_of(agent, "minimal")) as plain:
        results = {"plain": kernels.run(plain)}
    for kind, options in (("fork", {}), ("exec", {"image": execd})):
        results[kind] = kernels.run(suite.slot(agent.open(memory="1G", **options)))
    print(kernels.table(results))
    assert passed(results["plain"]) >= 80
    for kind in ("fork", "exec"):
        assert not suite.differences(results["plain"], results[kind], kernels.DIFFERENCES), kind


@pytest.mark.skipif(WANTED != "all", reason="by make conformance")
def test_no_public_report_is_true_of_a_slot(agent):
    with suite.plain(agent.host, root_of(agent, "minimal")) as plain:
        results = {"plain": reports.run(plain)}
    results["fork"] = reports.run(suite.slot(agent.open(memory="1G")))
    with execd_image(agent) as execd:
        results["exec"] = reports.run(suite.slot(agent.open(memory="1G", image=execd)))
    print(reports.table(results))
    for kind in ("fork", "exec"):
        assert not reports.faults(results["plain"], results[kind]), kind


@pytest.mark.skipif(WANTED != "ui", reason="by make test-ui")
def test_the_tests_of_jupyterlabs_user_interface_pass_as_with_a_plain_server(agent, tmp_path):
    wanted = os.environ.get("UI", "").split() or ui.FILES
    places = () if wanted == ["all"] else wanted
    with ui.images(agent) as roots, suite.plain(agent.host, roots["galata"]) as plain:
        results = {"plain": ui.run(plain, places)}
        results["plain"] |= ui.again(plain, [one.place for one in results["plain"].values() if not one.passed])
        for kind, image in (("fork", "galata"), ("exec", "galata-exec")):
            agent.wait(lambda: image in {one["name"] for one in agent.api.get("/images").json()}, "the image")  # noqa: B023
            slot = suite.slot(opened(agent, kind, image))
            found = results[kind] = ui.run(slot, places, tmp_path / kind)
            different = ui.differences(results["plain"], found)
            found |= ui.again(slot, [results["plain"][name].place for name in different], tmp_path / kind)
    print(ui.table(results))
    assert all(outcome.passed for name, outcome in results["plain"].items() if name.startswith(ui.STEPS))
    for kind in ("fork", "exec"):
        assert not ui.differences(results["plain"], results[kind]), (kind, tmp_path)
