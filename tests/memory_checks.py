# SPDX-License-Identifier: BSD-3-Clause
"""Checks of nbagent.zygote.memory, each run in a process of its own because its effect on memory cannot be undone.

    python3 -I memory_checks.py PACKAGES [CHECK…]

PACKAGES is the directory that contains the package nbagent. Without a CHECK, all that apply to this Python run. The
checks run under the host's Python (tests/unit/test_zygote_memory.py) and, because CPython before 3.12 has neither
sys.monitoring nor immortal objects, under that of an image (tests/integration/test_kernels.py).

Standard library only; Python 3.9 and up.
"""

import fcntl
import gc
import os
import re
import subprocess
import sys
import threading

TIMEOUT_S = 120


def heap_fill_leaves_no_scattered_blocks():
    from nbagent.zygote.memory import heap_fill

    # Python's allocator serves objects of 40 bytes, malloc those of 800. Every eighth of many is freed.
    def scattered():
        return [[obj for n, obj in enumerate([b"x" * size for _ in range(40000)]) if n % 8] for size in (7, 767)]

    def pages(size, count):
        return len({id(obj) >> 12 for obj in [b"x" * size for _ in range(count)]})

    def minimum(size, count):
        return count * (size + 48) // 4096

    kept = scattered()
    assert pages(7, 1000) > 4 * minimum(7, 1000)
    assert pages(767, 1000) > 2 * minimum(767, 1000)
    kept += scattered()
    filled_bytes = heap_fill.fill()
    assert 5000 * 800 < filled_bytes < 100 << 20, filled_bytes
    assert pages(7, 1000) <= minimum(7, 1000) + 4, pages(7, 1000)
    assert pages(767, 1000) <= minimum(767, 1000) + 8, pages(767, 1000)
    assert all(obj == b"x" * len(obj) for objects in kept for obj in objects)


def plain(x, *, y=2):
    return x + y


def closure(x):
    def inner(y):
        return (lambda z: x + y + z)(0)
    return inner(2)


def generator(x):
    return sum(y for y in (x, 2))


class Class:
    def method(self, x):
        return self.__class__.__name__ and super().__hash__() is not None and x + 2


def method(x):
    return Class().method(x)


def not_run():
    return 0


def relocated_code_behaves_the_same():
    from nbagent.zygote.memory import code_layout

    functions = [plain, closure, generator, method, Class.method]
    originals = [function.__code__ for function in functions]
    untouched = not_run.__code__
    assert all(function(1) == 3 for function in functions[:4])
    # The interpreter runs this file as a function too, whose code contains theirs.
    assert code_layout.relocate({id(code): (code, {1}) for code in originals}) in (len(functions), len(functions) + 1)
    for function, original in zip(functions, originals):  # noqa: B905  strict= is of 3.10
        assert function.__code__ is not original and function.__code__ == original
    for function in functions[:4]:
        assert [function(1) for _ in range(100)] == [3] * 100
    assert not_run.__code__ is untouched


def recording_finds_code_and_its_threads():
    from nbagent.zygote.memory import code_layout

    def here():
        pass

    def in_thread():
        here()

    with code_layout.record() as runs:
        here()
        thread = threading.Thread(target=in_thread)
        thread.start()
        other = thread.ident
        thread.join()
    not_run()
    threads = dict(runs.values())
    assert code_layout.supported()
    assert threads[here.__code__] == {threading.get_ident(), other}
    assert threads[in_thread.__code__] == {other}
    assert not_run.__code__ not in threads


def recording_is_not_supported():
    from nbagent.zygote.memory import code_layout

    with code_layout.record() as runs:
        not_run()
    assert not code_layout.supported()
    assert runs == {}


def _constants():
    """A code object that is a constant of another one, a tuple that is its constant, and the tuple's elements."""
    def outer():
        def inner():
            return "a text that is not an identifier", 12345678901234567890
        return inner

    inner = next(constant for constant in outer.__code__.co_consts if hasattr(constant, "co_consts"))
    pair = next(constant for constant in inner.co_consts if isinstance(constant, tuple))
    return [inner, pair, *pair]


def _counts_change(objects):
    before = [sys.getrefcount(obj) for obj in objects]
    references = objects * 10
    after = [sys.getrefcount(obj) for obj in objects]
    return bool(references) and [a != b for a, b in zip(before, after)]  # noqa: B905  strict= is of 3.10


def frozen_objects_keep_their_reference_counts():
    from nbagent.zygote.memory import immortal

    frozen = [*_constants(), Class(), ["list"], "text" + str(os.getpid()), Class.method]
    assert _counts_change(frozen) == [True] * len(frozen)
    assert immortal.supported()
    assert immortal.freeze() > 10_000
    assert _counts_change(frozen) == [False] * len(frozen)
    assert _counts_change([Class(), ["list"]]) == [True, True]


def immortal_objects_are_not_supported():
    from nbagent.zygote.memory import immortal

    obj = Class()
    assert not immortal.supported()
    assert immortal.freeze() == 0
    assert _counts_change([obj]) == [True]
    assert gc.get_freeze_count() > 2000


class _Snapshot:
    """A snapshot that was begun, and objects that were loaded into it."""

    def __init__(self):
        from nbagent.zygote.memory import snapshot

        self.module = snapshot
        assert snapshot.begin()
        self.loaded = [os.urandom(number % 900) for number in range(100_000)]
        self.loaded += [bytes([number]) * 3_000_000 for number in range(8)]
        self.hash = hash(tuple(self.loaded))

    def is_unchanged(self):
        return hash(tuple(self.loaded)) == self.hash

    def mappings(self):
        """The entries of smaps for the file. There are several if Python has unmapped an arena in the middle."""
        with open("/proc/self/smaps") as maps:
            entries = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", maps.read(), flags=re.M)
        found = [entry for entry in entries if "memfd:nbagent-zygote" in entry.partition("\n")[0]]
        assert found, "the file is not mapped"
        return found

    def kib(self, field):
        return sum(int(re.search(rf"^{field}: +(\d+) kB", entry, re.M)[1]) for entry in self.mappings())

    def flags(self):
        return {flag for entry in self.mappings() for flag in entry.partition("VmFlags:")[2].split()}


def snapshot_is_file_memory_after_sealing():
    found = _Snapshot()
    found.module.seal()
    assert found.kib("Anonymous") < 2048, found.mappings()
    assert found.is_unchanged()
    assert "sh" not in found.flags()
    # Unused memory was returned.
    assert found.kib("Size") < 150 * 1024, found.mappings()
    objects = [bytearray(number % 5000) for number in range(50_000)]
    del objects
    found.loaded.clear()
    assert found.kib("Anonymous") > 0


def snapshot_is_sealed_by_the_first_fork():
    found = _Snapshot()
    buffer = bytearray(b"x" * 100)
    child = os.fork()
    if child == 0:
        buffer[:] = b"y" * 100
        found.loaded.clear()
        os._exit(0 if [bytes(300) for _ in range(100_000)] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert buffer == b"x" * 100 and found.is_unchanged()
    assert "sh" not in found.flags()


def snapshot_fork_noop_leaves_no_child_and_no_handler():
    def caught_signals():
        with open("/proc/self/status") as status:
            return [line for line in status if line.startswith("SigCgt")]

    found = _Snapshot()
    before = caught_signals()
    found.module.fork_noop()
    assert caught_signals() == before
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        pass
    else:
        raise AssertionError("fork_noop left a child")
    assert "sh" in found.flags() and "dc" not in found.flags(), found.flags()
    found.module.seal()
    found.module.fork_noop()
    assert found.is_unchanged()


def snapshot_file_cannot_be_changed():
    found = _Snapshot()
    fd = os.dup(found.module._heap._fd)
    descriptors = len(os.listdir("/proc/self/fd"))
    found.module.seal()
    found.module.seal()
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == seals
    for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.truncate(fd, 0)):
        try:
            change()
        except PermissionError:
            continue
        raise AssertionError("the sealed file can be changed")


def snapshot_ignores_other_heaps():
    from nbagent.zygote.memory import snapshot

    assert snapshot._consecutive([None, None]) == []
    assert snapshot._consecutive([4096, 1024, 8192]) == []
    # At equal distances, but not in the heap.
    assert snapshot._consecutive(list(range(4096, 409600, 4096))) == []


def sharing_does_everything_when_it_is_on():
    from nbagent.zygote.memory.sharing import share_memory

    memory = share_memory(True)
    loaded = [os.urandom(100) for _ in range(10_000)]
    code = plain.__code__
    with memory.arrange_code():
        plain(1)
    memory.freeze()
    assert _is_snapshot()
    assert gc.get_freeze_count() > 2000
    if sys.version_info >= (3, 12):
        assert plain.__code__ is not code
        assert _counts_change([loaded]) == [False]


def sharing_changes_nothing_when_it_is_off():
    from nbagent.zygote.memory.sharing import share_memory

    frozen = gc.get_freeze_count()
    memory = share_memory(False)
    loaded = [os.urandom(100) for _ in range(10_000)]
    code = plain.__code__
    with memory.arrange_code():
        plain(1)
    memory.fork_noop()
    memory.freeze()
    assert not _is_snapshot()
    assert gc.get_freeze_count() == frozen
    assert plain.__code__ is code
    assert _counts_change([loaded]) == [True]
    assert not {"code_layout", "heap_fill", "immortal"} & {name.rpartition(".")[2] for name in sys.modules}
    # No hook of os.register_at_fork and no heap of a file: the child inherits ordinary memory.
    child = os.fork()
    if child == 0:
        os._exit(0 if not _is_snapshot() and len(loaded) == 10_000 else 1)
    assert os.waitpid(child, 0)[1] == 0


def _is_snapshot():
    with open("/proc/self/maps") as maps:
        return "memfd:nbagent-zygote" in maps.read()


SINCE_3_11 = (heap_fill_leaves_no_scattered_blocks,)
SINCE_3_12 = (recording_finds_code_and_its_threads, frozen_objects_keep_their_reference_counts)
BEFORE_3_12 = (recording_is_not_supported, immortal_objects_are_not_supported)
ALWAYS = (
    relocated_code_behaves_the_same,
    snapshot_is_file_memory_after_sealing,
    snapshot_is_sealed_by_the_first_fork,
    snapshot_fork_noop_leaves_no_child_and_no_handler,
    snapshot_file_cannot_be_changed,
    snapshot_ignores_other_heaps,
    sharing_does_everything_when_it_is_on,
    sharing_changes_nothing_when_it_is_off,
)
CHECKS = {check.__name__: check for check in (*ALWAYS, *SINCE_3_11, *SINCE_3_12, *BEFORE_3_12)}


def names(version=sys.version_info):
    """The checks that apply to a version of Python."""
    checks = ALWAYS + (SINCE_3_11 if version >= (3, 11) else ()) + (SINCE_3_12 if version >= (3, 12) else BEFORE_3_12)
    return [check.__name__ for check in checks]


def run(packages, name):
    """Runs one check in a process of its own. Raises AssertionError with its standard error."""
    command = [sys.executable, "-I", os.path.abspath(__file__), str(packages), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, f"{name}: exit status {done.returncode}\n{done.stderr}"


def main():
    packages, *wanted = sys.argv[1:]
    if len(wanted) == 1:
        sys.path.insert(0, packages)
        CHECKS[wanted[0]]()
        return
    for name in wanted or names():
        run(packages, name)
        print(name, "ok", flush=True)


if __name__ == "__main__":
    main()
