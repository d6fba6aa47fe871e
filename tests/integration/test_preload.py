# SPDX-License-Identifier: BSD-3-Clause
"""Preloaded modules are in every kernel at no cost, and work as if each kernel had imported them."""

import json
import shutil
import subprocess

import pytest

import product

PRELOADED = ["numpy", "pandas", "matplotlib.pyplot", "lots"]
# A library that creates generators of random numbers on import, as many do.
LOTS = """
import random
import numpy
MADE = [random.Random(), numpy.random.RandomState(), numpy.random.default_rng()]
"""
IMPORT = """
import json, re, time
def own_kib():
    # Only written pages are counted: a page of the zygote's file is private too while no other process has it mapped.
    with open("/proc/self/smaps_rollup") as file:
        return int(re.search(r"^Anonymous:\\s+(\\d+)", file.read(), re.M)[1])
before, began = own_kib(), time.perf_counter()
import numpy, pandas, matplotlib.pyplot
print(json.dumps([time.perf_counter() - began, own_kib() - before]))
"""
PROGRAM = f"""
import subprocess, sys
print(subprocess.run([sys.executable, "-c", {IMPORT!r}], stdout=subprocess.PIPE, text=True, check=True).stdout)
"""
# Large enough for OpenBLAS to use several threads.
SOLVE = """
import json, multiprocessing, numpy, os
def solve():
    numbers = numpy.random.default_rng(1).random((700, 700))
    before = len(os.listdir("/proc/self/task"))
    right = numpy.allclose(numpy.linalg.solve(numbers, numbers @ numbers), numbers)
    return right, len(os.listdir("/proc/self/task")) - before
found = [solve(), solve()]
with multiprocessing.get_context("fork").Pool(1) as pool:
    found.append(pool.apply(solve))
print(json.dumps([found, len(os.sched_getaffinity(0))]))
"""
OPENMP = """
import ctypes, threading
team = set()
work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: team.add(threading.get_native_id()))
ctypes.CDLL("libgomp.so.1").GOMP_parallel(work, None, 4, 0)
len(team)
"""
STATES = """
import json, numpy, lots
print(json.dumps([numpy.random.random(), numpy.random.default_rng().random(), *(made.random() for made in lots.MADE)]))
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An image: minimal, and science.txt. Built once, as images/build keeps it by what it is made of."""
    recipe = tmp_path_factory.mktemp("recipe") / "science"
    shutil.copytree(product.TOP / "images/minimal", recipe, symlinks=True)
    with open(recipe / "requirements.txt", "a") as file:
        file.write((product.TOP / "tests/integration/science.txt").read_text())
    text = (recipe / "recipe.toml").read_text()
    (recipe / "recipe.toml").write_text(text.replace("packages = [\n", 'packages = [\n  "libgomp1",\n', 1))
    manifest = recipe / "files/etc/nbagent-image.toml"
    manifest.write_text(f"preload = {json.dumps(PRELOADED)}\n" + manifest.read_text())
    lots = recipe / "files/usr/local/lib/python3.13/dist-packages/lots.py"
    lots.parent.mkdir(parents=True)
    lots.write_text(LOTS)
    done = subprocess.run([product.TOP / "images/build", recipe], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split(maxsplit=1)[1].strip()


@pytest.fixture(scope="module")
def added(shared, archive):
    """The image on the shared host, for all tests of this file."""
    shared.host.copy_in(archive, "/root/")
    shared.host.run(["nbagent", "image", "add", "--name", "science", "/root/science.tar.zst"], timeout=300)
    shared.run("rm", "/root/science.tar.zst")
    yield
    shared.run("nbagent", "image", "remove", "science")


@pytest.fixture
def science(agent, added):
    """Claims slots that are forked from what was preloaded."""
    agent.configure("[images.science]\nwarm = 0\n")


    def zygote_messages():
        messages = [entry["MESSAGE"] for entry in agent.journal("-t", "nbagent", "NBAGENT_IMAGE=science")]
        return [message for message in messages if "zygote" in message]

    assert "of image science is ready" in agent.wait(zygote_messages, "the zygote")[-1]
    return lambda: agent.open(image="science")


def test_an_import_costs_a_kernel_neither_time_nor_memory(science):
    notebook = science()
    (forked_s, forked_kib), (program_s, program_kib) = (
        json.loads(notebook.run(code).stream) for code in (IMPORT, PROGRAM)
    )
    print(f"forked: {forked_s:.4f} s, {forked_kib} KiB; a program: {program_s:.2f} s, {program_kib} KiB")
    assert forked_s < program_s / 50 and forked_kib < program_kib / 50


def test_linear_algebra_and_openmp_have_their_threads(science):
    with science().kernel() as kernel:
        found, processors = json.loads(kernel.run(SOLVE).stream)
        # An existing thread pool is reused; one whose threads a fork did not copy is created again.
        assert found == [[True, processors - 1], [True, 0], [True, processors - 1]]
        assert kernel.run(OPENMP).text == "4"


def test_figures_are_shown_as_in_any_kernel(science):
    for code in ("import matplotlib.pyplot as plt\nplt.plot([1, 2]);", "%matplotlib inline\nplt.plot([1, 2]);"):
        with science().kernel() as kernel:
            kernel.run("import matplotlib.pyplot as plt")
            assert "image/png" in kernel.run(code).data


def test_random_numbers_differ_between_slots_and_kernels(science):
    one, other = science(), science()
    states = [json.loads(notebook.run(STATES).stream) for notebook in (one, other, one)]
    for numbers in zip(*states, strict=True):
        assert len(set(numbers)) == 3
