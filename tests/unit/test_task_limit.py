"""A slot's limit of processes and threads: whether there is room for another kernel, and the reason in a refusal."""

import errno
import os
import threading

import pytest

from nbagent.wire import activity, limits_page
from nbagent.wire.limits_page import SlotLimits
from nbagent.zygote import task_limit
from nbagent.zygote.task_limit import KERNEL_TASKS, NoTasksLeft


@pytest.fixture
def page():
    fd = activity.create()
    yield fd
    os.close(fd)


@pytest.fixture
def processes(monkeypatch):
    """The threads of each process of the slot, instead of those of this machine."""
    found = {1: 1, 7: 3, 20: 11}
    monkeypatch.setattr(task_limit, "tasks", lambda: found)
    return found


def test_the_threads_of_processes_are_counted():
    before, ended = task_limit.tasks()[os.getpid()], threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    assert task_limit.tasks()[os.getpid()] == before + 1
    ended.set()
    thread.join()


def test_a_name_with_brackets_and_blanks_and_a_process_that_has_ended(tmp_path):
    for pid, line in ((5, "5 (a) b (c)) S 1 5 5 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 9 0 1"), (6, "")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(line)
    (tmp_path / "8").mkdir()
    (tmp_path / "self").mkdir()
    assert task_limit.tasks(str(tmp_path)) == {5: 9}


@pytest.mark.parametrize(("most", "kernels", "starting", "room"), [
    (15 + KERNEL_TASKS, [], 0, True), (14 + KERNEL_TASKS, [], 0, False),
    # One that has 11 tasks, and one that has none yet.
    (16 + KERNEL_TASKS, [20], 0, True), (15 + KERNEL_TASKS, [20], 0, False),
    (28 + KERNEL_TASKS, [20, 21], 0, True), (27 + KERNEL_TASKS, [20, 21], 0, False),
    (15 + 3 * KERNEL_TASKS, [], 2, True), (14 + 3 * KERNEL_TASKS, [], 2, False),
])
def test_a_kernel_that_would_reach_the_limit_is_refused(page, processes, most, kernels, starting, room):
    limits_page.write(page, SlotLimits(1 << 30, None, most))
    if room:
        task_limit.check_room(page, kernels, starting)
    else:
        with pytest.raises(NoTasksLeft, match=f"has 15 of at most {most} processes and threads"):
            task_limit.check_room(page, kernels, starting)


def test_a_page_of_an_older_supervisor_refuses_nothing(page, processes):
    task_limit.check_room(page, [])
    limits_page.write(page, SlotLimits(1 << 30, None))
    task_limit.check_room(page, [])
    assert "has 15 processes" in task_limit.explanation(page) and "has 15 processes" in task_limit.explanation(-1)


@pytest.mark.parametrize(("error", "is_cause"), [
    (BlockingIOError(errno.EAGAIN, "fork"), True), (RuntimeError("can't start new thread"), True),
    (NoTasksLeft("x"), True), (OSError(errno.ENOSPC, "x"), False), (RuntimeError("x"), False), (KeyError("x"), False),
])
def test_errors_for_want_of_tasks_are_recognised(error, is_cause):
    assert task_limit.is_cause(error) is is_cause
