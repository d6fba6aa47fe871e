# SPDX-License-Identifier: BSD-3-Clause
"""The faults of a zygote that the kernel's facts show: threads, descriptors, processes and processor time."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbagent.runtime import zygote_inspection
from nbagent.runtime.zygote_inspection import INTERVAL_S, LOOK_AGAIN_S, Inspection

TOP = Path(__file__).resolve().parents[2]
# Runs each line that it reads, and responds.
ZYGOTE = "import os, sys, threading, time\nfor line in sys.stdin:\n    exec(line)\n    print('done', flush=True)\n"


class Zygote:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.run("pass")

    def run(self, code):
        self.process.stdin.write(code + "\n")
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def zygote(tmp_path, monkeypatch):
    """A process with an inspection; its cgroup is a file of the test."""
    monkeypatch.setattr(zygote_inspection, "_unit_cgroup", lambda: str(tmp_path))
    made = Zygote()
    processes = tmp_path / "cgroup.procs"
    processes.write_text(f"{os.getpid()}\n{made.process.pid}\n")
    yield made, Inspection(made.process.pid), processes
    made.process.kill()
    made.process.wait()
    made.process.stdin.close()
    made.process.stdout.close()


def keep_none(monkeypatch):
    """No descriptor may be kept from one inspection to the next."""
    for name in ("KEPT_MAX_S", "KEPT_ASLEEP_S"):
        monkeypatch.setattr(zygote_inspection, name, 0.0)


def test_a_zygote_that_sleeps_has_no_fault(zygote):
    _, inspection, _ = zygote
    assert [inspection.find(forks) for forks in (0, 5, 1000)] == [None] * 3
    assert inspection.again_s == INTERVAL_S


def test_a_zygote_that_has_ended_has_no_fault_and_one_whose_files_cannot_be_read_has_one(zygote, monkeypatch):
    made, inspection, _ = zygote

    def refuse(pid):
        raise PermissionError(13, "Permission denied", f"/proc/{pid}/fd")

    monkeypatch.setattr(zygote_inspection, "_descriptors", refuse)
    with pytest.raises(PermissionError):
        inspection.find(0)
    made.process.kill()
    os.waitid(os.P_PID, made.process.pid, os.WEXITED | os.WNOWAIT)
    assert inspection.find(0) is None


def test_a_descriptor_that_is_kept_for_longer_than_a_fork_may_take_is_found(zygote, monkeypatch):
    made, inspection, _ = zygote
    made.run("kept = os.pipe()")
    assert inspection.find(1) is None and inspection.again_s == LOOK_AGAIN_S
    assert inspection.find(1) is None
    # Under another number too.
    made.run("moved = [os.dup(fd) for fd in kept]; [os.close(fd) for fd in kept]")
    keep_none(monkeypatch)
    assert "it keeps descriptors" in inspection.find(1)


def test_a_zygote_that_sleeps_has_closed_the_descriptors_and_one_that_runs_may_be_about_to(zygote, monkeypatch):
    made, inspection, _ = zygote
    monkeypatch.setattr(zygote_inspection, "KEPT_ASLEEP_S", 0.0)
    made.run("kept = os.pipe()")
    made.process.stdin.write("while time.process_time() < 1: pass\n")
    while zygote_inspection._sleep(made.process.pid) is not None:
        time.sleep(0.01)
    assert [inspection.find(1) for _ in range(3)] == [None] * 3
    made.process.stdout.readline()
    while zygote_inspection._sleep(made.process.pid) is None:
        time.sleep(0.01)
    assert "it keeps descriptors" in inspection.find(1)


@pytest.mark.parametrize("make", ["os.pipe()", "[os.memfd_create('nbagent-config')]"], ids=["pipe", "memfd"])
def test_descriptors_of_one_request_after_another_are_none_that_is_kept(zygote, monkeypatch, make):
    keep_none(monkeypatch)
    made, inspection, _ = zygote
    for _ in range(5):
        # The numbers are the same each time.
        made.run(f"kept = {make}")
        assert inspection.find(1) is None
        made.run("[os.close(fd) for fd in kept]")


def test_a_descriptor_of_a_request_that_is_closed_soon_is_none(zygote):
    made, inspection, _ = zygote
    made.run("kept = os.pipe()")
    assert inspection.find(1) is None
    made.run("[os.close(fd) for fd in kept]")
    assert inspection.find(1) is None and inspection.again_s == INTERVAL_S


def test_another_file_under_a_known_number_is_found(zygote, monkeypatch):
    made, inspection, _ = zygote
    keep_none(monkeypatch)
    made.run("os.dup2(os.open('/dev/zero', os.O_RDWR), 2); os.close(3)")
    assert inspection.find(0) is None
    assert "it keeps descriptors that it did not have when it was ready: 2" in inspection.find(0)


def test_a_thread_is_found(zygote):
    made, inspection, _ = zygote
    made.run("threading.Thread(target=time.sleep, args=[600], daemon=True).start()")
    assert "2 threads" in inspection.find(0)


def test_a_process_that_stays_in_the_unit_is_found_when_a_start_would_be_over(zygote, monkeypatch):
    _, inspection, processes = zygote
    with processes.open("a") as file:
        file.write("4711\n")
    assert inspection.find(0) is None
    monkeypatch.setattr(zygote_inspection, "UNPLACED_MAX_S", -1.0)
    assert inspection.find(0) == "it has processes of its own: 4711"


def test_processor_time_beyond_that_of_its_forks_is_found(zygote, monkeypatch):
    made, inspection, _ = zygote
    monkeypatch.setattr(zygote_inspection, "CPU_FIRST_S", 0.1)
    made.run("while time.process_time() < 1: pass")
    assert inspection.find(1000) is None
    assert "of processor time for 0 slots" in inspection.find(0)


def test_the_end_of_the_zygote_is_no_fault(zygote):
    made, inspection, _ = zygote
    made.process.kill()
    made.process.wait()
    assert inspection.find(0) is None


def test_the_cgroup_of_a_process_is_found():
    directory = zygote_inspection._unit_cgroup()
    with open(f"{directory}/cgroup.procs") as file:
        assert str(os.getpid()) in file.read().split()


def test_a_descriptor_that_is_no_pidfd_is_malformed():
    one, other = socket.socketpair()
    with one, other, pytest.raises(ValueError, match="is not a pidfd"):
        zygote_inspection.check_fork(one.fileno(), os.getpid(), other.fileno())


def test_the_score_of_the_service_is_set_after_it_has_changed_its_user_and_not_that_of_an_earlier_child():
    """A higher score, because a lower one takes CAP_SYS_RESOURCE, which the tests may not have."""
    program = """
import os
from nbagent.linux.process import PR_SET_DUMPABLE, prctl
from nbagent.runtime import zygote_service
zygote_service.OOM_SCORE_ADJ = int(open("/proc/self/oom_score_adj").read()) + 7
protect = zygote_service._fork_protector()
os.setresuid(65534, 65534, 65534)
prctl(PR_SET_DUMPABLE, 0)
read_fd, write_fd = os.pipe()
if os.fork() == 0:
    os.close(write_fd)
    os.read(read_fd, 1)
    print(open("/proc/self/oom_score_adj").read().strip(), flush=True)
    os._exit(0)
protect()
print(open("/proc/self/oom_score_adj").read().strip(), flush=True)
os.close(write_fd)
os.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=TOP)
    service, child = map(int, done.stdout.split())
    assert service == child + 7
