# SPDX-License-Identifier: BSD-3-Clause
"""Libraries see a slot's limits by environment variables, as the supervisor has written them last."""

import os

import pytest

from nbagent.wire import activity, limits_page
from nbagent.wire.limits_page import THREADS, LimitVariables, SlotLimits


@pytest.fixture
def page():
    fd = activity.create()
    yield fd
    os.close(fd)


@pytest.mark.parametrize(("quota", "present", "number"), [
    (0.03, 16, 1), (1.0, 16, 1), (1.01, 16, 2), (2.5, 16, 3), (16.0, 16, 16), (4.0, 2, 2),
])
def test_a_quota_is_rounded_up_to_processors(quota, present, number):
    found = limits_page.variables(SlotLimits(1 << 30, quota), present)
    assert {found[name] for name in THREADS} == {str(number)}
    assert found["MEM_LIMIT"] == str(1 << 30) and float(found["CPU_LIMIT"]) == quota


def test_without_a_quota_the_libraries_choose_the_number_of_threads():
    found = limits_page.variables(SlotLimits(1 << 30, None), 16)
    assert found == {"OMP_WAIT_POLICY": "PASSIVE", "MEM_LIMIT": str(1 << 30)}


@pytest.mark.parametrize(("quota", "tasks", "present", "number"), [
    (None, 256, 64, 16), (None, 1024, 64, None), (None, 256, 16, None), (None, 0, 64, None), (None, 16, 64, 1),
    (32.0, 256, 64, 16), (8.0, 256, 64, 8),
])
def test_libraries_start_no_more_threads_than_the_tasks_suffice_for(quota, tasks, present, number):
    """64 processors and 256 tasks: three kernels with four pools of 16 threads each, and the server."""
    found = limits_page.variables(SlotLimits(1 << 30, quota, tasks), present)
    assert [found.get(name) for name in THREADS] == [str(number) if number else None] * len(THREADS)
    assert ("CPU_LIMIT" in found) == (quota is not None)


def test_the_limits_do_not_change_the_activity(page):
    activity.write(page, 3)
    limits_page.write(page, SlotLimits(1 << 40, 2.5))
    assert limits_page.read(page) == SlotLimits(1 << 40, 2.5)
    assert activity.read(page, 1e12).busy == 3
    assert os.fstat(page).st_size == activity.PAGE_BYTES


def test_a_page_without_limits_sets_nothing(page):
    environment = {}
    LimitVariables(page).apply(environment)
    assert limits_page.read(page) is None and environment == {}


def test_variables_follow_the_limits_and_the_images_own_stay(page, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    server, kernel = {"OMP_NUM_THREADS": "5"}, {"MKL_NUM_THREADS": "7", "OMP_NUM_THREADS": "5"}
    variables = LimitVariables(page)
    limits_page.write(page, SlotLimits(1 << 30, 2.0))
    variables.apply(server, kernel)
    assert (server["POLARS_MAX_THREADS"], server["MKL_NUM_THREADS"], kernel["MKL_NUM_THREADS"]) == ("2", "2", "7")
    # The environment of a restart is that of the first start.
    limits_page.write(page, SlotLimits(1 << 31, 4.0))
    variables.apply(server, kernel)
    assert server["OMP_NUM_THREADS"] == kernel["OMP_NUM_THREADS"] == "5" and kernel["MKL_NUM_THREADS"] == "7"
    assert kernel["RAYON_NUM_THREADS"] == "4" and server["MEM_LIMIT"] == str(1 << 31)
    limits_page.write(page, SlotLimits(1 << 31, None))
    variables.apply(server, kernel)
    assert server == {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "PASSIVE", "MEM_LIMIT": str(1 << 31)}
