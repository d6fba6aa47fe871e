"""What is done to a zygote's memory so that its children share it: no holes, code that runs side by side, no counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
BEGIN = f"import sys; sys.path.insert(0, {str(TOP)!r})\n"


def run(code: str) -> None:
    """In a process of its own: what is done to a process's memory is not undone."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", BEGIN + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_after_holes_are_filled_what_comes_next_lies_together() -> None:
    # One in eight of very many goes again; 40 bytes are Python's to place, 800 are malloc's.
    run("""
from nbagent.zygote.memory import heap_fill
def scattered():
    return [[thing for n, thing in enumerate([b"x" * size for _ in range(40000)]) if n % 8] for size in (7, 767)]
kept = scattered()
def pages(size, count):
    return len({id(thing) >> 12 for thing in [b"x" * size for _ in range(count)]})
def least(size, count):
    return count * (size + 48) // 4096
assert pages(7, 1000) > 4 * least(7, 1000) and pages(767, 1000) > 2 * least(767, 1000)
kept += scattered()
taken = heap_fill.fill()
assert 5000 * 800 < taken < 100 << 20, taken
assert pages(7, 1000) <= least(7, 1000) + 4, pages(7, 1000)
assert pages(767, 1000) <= least(767, 1000) + 8, pages(767, 1000)
assert all(thing == b"x" * len(thing) for things in kept for thing in things)
""")


@pytest.mark.parametrize("kind", ["plain", "closure", "generator", "method"])
def test_code_that_has_a_new_place_does_what_it_did(kind: str) -> None:
    run(f"""
from nbagent.zygote.memory import code_layout
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
def cold():
    return 0
function, before = {kind}, {kind}.__code__
runs = {{id(code): (code, {{1}}) for code in (before, Class.method.__code__)}}
assert function(1) == 3
# Theirs, and that of this program, which has them in its own.
assert code_layout.gather(runs) == 3
assert function.__code__ is not before and function.__code__ == before
assert [function(1) for _ in range(100)] == [3] * 100
assert cold.__code__.co_name == "cold"
""")


def test_watching_notes_what_runs_and_in_which_threads() -> None:
    run("""
import threading
from nbagent.zygote.memory import code_layout
def here(): pass
def there(): here()
def nowhere(): pass
with code_layout.watch() as runs:
    here()
    thread = threading.Thread(target=there)
    thread.start()
    other = thread.ident
    thread.join()
found = {code.co_name: threads for code, threads in runs.values()}
if sys.version_info >= (3, 12):
    assert found["here"] == {threading.get_ident(), other} and found["there"] == {other} and "nowhere" not in found
else:
    assert not found
""")


def test_constants_of_code_are_counted_no_more() -> None:
    run("""
from nbagent.zygote.memory import immortal
def outer():
    def inner():
        return "a text that no name could be", 12345678901234567890
    return inner
inner = next(constant for constant in outer.__code__.co_consts if hasattr(constant, "co_consts"))
pair = next(constant for constant in inner.co_consts if isinstance(constant, tuple))
immortal.freeze()
if immortal.possible():
    counts = [sys.getrefcount(thing) for thing in (inner, pair, *pair)]
    more = [inner, pair, *pair] * 10
    assert [sys.getrefcount(thing) for thing in (inner, pair, *pair)] == counts
""")
