"""What a zygote has loaded is a sealed file: forks have it in common, and nobody can change it for another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
# Each in a process of its own: what is done to a process's memory is not undone.
BEGIN = f"""
import ctypes, os, sys
sys.path.insert(0, {str(TOP)!r})
from nbagent.zygote.memory import snapshot
assert snapshot.begin()
loaded = [os.urandom(number % 900) for number in range(100_000)] + [bytes([number]) * 3_000_000 for number in range(8)]
before = hash(tuple(loaded))
def ours():
    with open("/proc/self/smaps") as maps:
        parts = maps.read().split("memfd:nbagent-zygote")[1:]
    assert len(parts) == 1, parts
    return parts[0].split("VmFlags:")
def kib(name):
    return int(ours()[0].split(name + ":")[1].split()[0])
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", BEGIN + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_is_loaded_stays_and_is_no_memory_of_ones_own() -> None:
    run("""
snapshot.settle()
assert kib("Anonymous") < 2048, ours()
assert hash(tuple(loaded)) == before
assert " sh " not in ours()[1].splitlines()[0]
# What was not used is given back.
assert kib("Size") < 150 * 1024, ours()
more = [bytearray(number % 5000) for number in range(50_000)]
del more, loaded
assert kib("Anonymous") > 0
""")


def test_a_fork_changes_nothing_for_its_parent() -> None:
    run("""
spare = bytearray(b"x" * 100)
# The first fork settles, whoever makes it.
if (child := os.fork()) == 0:
    spare[:] = b"y" * 100
    del loaded
    os._exit(0 if [bytes(300) for _ in range(100_000)] else 1)
assert os.waitpid(child, 0)[1] == 0
assert spare == b"x" * 100 and hash(tuple(loaded)) == before
assert " sh " not in ours()[1].splitlines()[0]
""")


def test_a_fork_in_vain_leaves_no_child_and_no_trace() -> None:
    run("""
with open("/proc/self/status") as status:
    caught = [line for line in status if line.startswith("SigCgt")]
snapshot.fork_noop()
with open("/proc/self/status") as status:
    assert [line for line in status if line.startswith("SigCgt")] == caught
try:
    os.waitpid(-1, 0)
    raise AssertionError("a child is left")
except ChildProcessError:
    pass
flags = ours()[1].splitlines()[0].split()
assert "sh" in flags and "dc" not in flags, flags
snapshot.settle()
snapshot.fork_noop()
assert hash(tuple(loaded)) == before
""")


def test_nobody_can_change_the_file() -> None:
    run("""
import fcntl
fd = os.dup(snapshot._heap._fd)
descriptors = len(os.listdir("/proc/self/fd"))
snapshot.settle()
snapshot.settle()
assert len(os.listdir("/proc/self/fd")) == descriptors - 1
wanted = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == wanted
for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.truncate(fd, 0)):
    try:
        change()
    except PermissionError:
        continue
    raise AssertionError("the file can be changed")
""")


def test_another_heap_than_glibcs_is_left_alone() -> None:
    run("""
assert snapshot._row([None, None]) == []
# In no order, and in no heap.
assert snapshot._row([4096, 1024, 8192]) == []
assert snapshot._row(list(range(4096, 409600, 4096))) == []
""")
