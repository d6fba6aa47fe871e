#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make libraries`: libraries that start threads, in slots of hosts with many processors.

    tests/versions/libraries.py [--here | --crowded] [--rounds N] [--keep]

A slot has a quota of 2 of the 16 processors of a virtual machine; with `--here` an eighth of this machine's, in a
container. Kernels compute the same by turns: one as a person has it, one that sets the number of threads in each
library to that of the quota, and in the container one that sets it to 16, without the variables of the slot's limits.
Prints medians as ratios to the second kernel's; packaging/docs/conformance.md has the table. Fails when the first
kernel takes more than 1.2 of the second's time.

With `--crowded`, three kernels in a slot without a quota on a virtual machine with 64 processors have imported and used
all of the libraries at the same time. Fails when one of them cannot start its threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / name) for name in ("integration", "conformance", ".", "..")] + [str(HERE)]

import versions
from conftest import Agent
from nbagent.wire.limits_page import THREADS, SlotLimits, processors
from notebook import Kernel, Notebook
from product import say
from testhost_driver import state
from versions import Version

IMAGE = Version(
    "libraries", "python", "trixie", "3.13",
    ("jupyterlab==4.6.6", "ipykernel==7.4.0", "numpy", "scikit-learn", "xgboost-cpu", "lightgbm"), packages="libgomp1",
)
PROCESSORS, PART = 16, 1 / 8
GOAL = 1.2
CROWDED = 64
# A measurement takes many periods of the quota, of 100 ms. An emulated processor computes floating-point numbers a
# hundredth as fast.
REPEATED, SIZE = 4, 300
REPEATED_HERE, SIZE_HERE = 10, 500
# An emulated processor takes more than a minute for the start of a zygote. The image is the only one of the machine.
PATIENT = """
[slots]
start_timeout = "20min"
[pool]
image = "libraries"
warm = 1
"""
PACKAGES = ("python3-nbagent", "nbagent")
CELL_TIMEOUT_S = 900.0
# With `threads` None, each library chooses the number by itself.
PREPARE = """
import os, time
threads = {threads}
if {bare}:
    for name in {variables}:
        os.environ.pop(name, None)
import lightgbm, numpy, xgboost
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from threadpoolctl import threadpool_info, threadpool_limits
threadpool_limits(threads)
generator = numpy.random.default_rng(1)
square = generator.random(({size}, {size}))
rows = generator.random((4000, 10))
values = rows.sum(axis=1)
matrix = xgboost.DMatrix(rows, values)

def multiply():
    for _ in range(4):
        square @ square

def gradient_boosting():
    HistGradientBoostingRegressor(max_iter=10).fit(rows, values)

def forest():
    RandomForestRegressor(16, n_jobs=threads or -1).fit(rows, values)

def xgboost_train():
    xgboost.train({{"nthread": threads}} if threads else {{}}, matrix, 10)

def lightgbm_fit():
    LGBM = lightgbm.LGBMRegressor(n_estimators=10, n_jobs=threads, verbose=-1)
    LGBM.fit(rows, values)

def took(work):
    began = time.perf_counter()
    for _ in range({repeated}):
        work()
    return time.perf_counter() - began

for work in (multiply, gradient_boosting, forest, xgboost_train, lightgbm_fit):
    work()
print(os.cpu_count(), {{pool["num_threads"] for pool in threadpool_info()}})
"""
WORKS = {
    "multiply": "numpy, product of matrices", "gradient_boosting": "scikit-learn, HistGradientBoostingRegressor",
    "forest": "scikit-learn, RandomForestRegressor with n_jobs=-1", "xgboost_train": "xgboost, train",
    "lightgbm_fit": "lightgbm, LGBMRegressor",
}
VARIABLES = (*THREADS, "OMP_WAIT_POLICY")


class Scale(NamedTuple):
    """How much is computed: the times that each work is repeated, and the size of its matrices."""

    repeated: int
    size: int


def prepared(notebook: Notebook, name: str, threads: int | None, scale: Scale, *, bare: bool) -> str:
    """The id of a kernel with the data and functions."""
    code = PREPARE.format(threads=threads, bare=bare, variables=VARIABLES, **scale._asdict())
    with notebook.kernel() as kernel:
        result = kernel.run(code, CELL_TIMEOUT_S)
    if result.status != "ok":
        raise SystemExit(f"{name}: {result.error}")
    say(f"{name}: os.cpu_count() and threads of the libraries: {result.stream.strip()}")
    return kernel.id


def seconds(notebook: Notebook, kernel_id: str, work: str) -> float:
    """The time of a work, by a connection of its own, because the server closes one that nothing reads for a minute."""
    with Kernel(notebook, kernel_id) as kernel:
        return float(kernel.run(f"took({work})", CELL_TIMEOUT_S).text)


def measured(agent: Agent, rounds: int, quota: float, scale: Scale, *, bare: bool) -> dict[str, dict[str, list[float]]]:
    """Seconds by work and kernel; `bare`: with the one without the variables, which takes 40 times as long."""
    notebook = agent.open(image=IMAGE.name, memory="2G", cpu_quota=f"{quota:.0%}")
    kernels = {
        "slot": prepared(notebook, "slot", None, scale, bare=False),
        "tuned": prepared(notebook, "tuned", processors(SlotLimits(0, quota), PROCESSORS), scale, bare=False),
    }
    if bare:
        kernels["host"] = prepared(notebook, "host", PROCESSORS, scale, bare=True)
    found: dict[str, dict[str, list[float]]] = {work: {name: [] for name in kernels} for work in WORKS}
    for number in range(rounds):
        for work, times in found.items():
            # In another order each time, because the first one may find a quota that nothing has used.
            for name, kernel_id in list(kernels.items())[::-1 if number % 2 else 1]:
                times[name].append(seconds(notebook, kernel_id, work))
            say(f"round {number + 1} of {rounds}: {work} {'/'.join(f'{times[name][-1]:.2f}' for name in kernels)} s")
    agent.release(notebook.slot)
    return found


def table(ratios: Mapping[str, Mapping[str, float]]) -> str:
    """The ratios to the tuned kernel by work and kernel, in Markdown's form."""
    head = ["library", *next(iter(ratios.values()))]
    rows = [head, ["---"] * len(head)]
    rows += [[WORKS[work], *(f"{ratio:.2f}" for ratio in found.values())] for work, found in ratios.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def crowded(agent: Agent) -> None:
    """Three kernels use all libraries, and their threads are there at the same time. Prints the slot's tasks."""
    notebook = agent.open(image=IMAGE.name, memory="2G")
    for number in range(3):
        prepared(notebook, f"kernel {number + 1}", None, Scale(1, SIZE), bare=False)
        tasks = agent.run("systemctl", "show", "-P", "TasksCurrent", f"nbagent-{notebook.slot}.scope").strip()
        say(f"{tasks} tasks in the slot")


@contextmanager
def emulated(machine: versions.Machine, keep: bool) -> Iterator[Agent]:
    """A virtual machine with the image, which a container has imported."""
    with tempfile.TemporaryDirectory(dir=versions.CACHE) as directory:
        if not (keep and machine.name in state.names()):
            machine = machine._replace(store=versions.stored(IMAGE, Path(directory)), image=IMAGE.name)
        with versions.agent_for([IMAGE], keep, machine) as agent:
            yield agent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--here", action="store_true", help="in a container, with the processors of this machine")
    parser.add_argument("--crowded", action="store_true", help="three kernels at a time, with 64 processors")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--keep", action="store_true", help="leave the host up, and use one that is up")
    options = parser.parse_args()
    # Debian 12's machine, since the emulated processor of Debian 13's lacks an instruction that numpy needs (vm.py).
    cpus = CROWDED if options.crowded else PROCESSORS
    machine = versions.Machine(f"libraries-{cpus}", "vm", "bookworm", "8G", cpus, PATIENT, PACKAGES)
    with ExitStack() as stack:
        if options.here:
            agent = stack.enter_context(versions.agent_for([IMAGE], options.keep, versions.Machine("libraries-here")))
            stack.enter_context(versions.imported(agent, IMAGE))
            quota, scale = (os.cpu_count() or 1) * PART, Scale(REPEATED_HERE, SIZE_HERE)
        else:
            agent = stack.enter_context(emulated(machine, options.keep))
            quota, scale = PROCESSORS * PART, Scale(REPEATED, SIZE)
        versions.wait_for_zygote(agent, IMAGE.name)
        if options.crowded:
            crowded(agent)
            return
        seconds_of = measured(agent, options.rounds, quota, scale, bare=options.here)
    ratios = {}
    for work, times in seconds_of.items():
        tuned = statistics.median(times["tuned"])
        ratios[work] = {name: statistics.median(times[name]) / tuned for name in times if name != "tuned"}
    sys.stdout.write(f"{table(ratios)}\n")
    slow = [f"{WORKS[work]}: {found['slot']:.2f}" for work, found in ratios.items() if found["slot"] > GOAL]
    if slow:
        raise SystemExit(f"more than {GOAL} of the tuned time: {', '.join(slow)}")
    sys.stdout.write(f"{len(ratios)} passed, 0 failed\n")


if __name__ == "__main__":
    main()
