#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make libraries`: libraries that start threads, in a slot with a quota of 2 of 16 processors.

    tests/versions/libraries.py [--here] [--rounds N] [--keep]

The host is a virtual machine; with `--here` a container, and the quota is an eighth of this machine's processors, too.
Three kernels compute the same by turns: one as a person has it, one that sets the number of threads in each library to
that of the quota, and one that sets it to 16, without the variables of the slot's limits. Prints medians as ratios to
the second kernel's; packaging/docs/conformance.md has the table. Fails when the first kernel takes
more than 1.2 of the second's time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / name) for name in ("integration", "conformance", ".", "..")] + [str(HERE)]

import versions
from conftest import Agent
from nbagent.wire.limits_page import THREADS, SlotLimits, processors
from notebook import Kernel, Notebook
from product import say
from versions import Version

IMAGE = Version(
    "libraries", "python", "trixie", "3.13",
    ("jupyterlab==4.6.6", "ipykernel==7.4.0", "numpy", "scikit-learn", "xgboost-cpu", "lightgbm"), packages="libgomp1",
)
PROCESSORS, PART = 16, 1 / 8
GOAL = 1.2
# A measurement takes many periods of the quota, of 100 ms, also on processors that are not emulated.
REPEATED_HERE = 10
# An emulated processor takes more than a minute for the start of a zygote.
PATIENT = '[slots]\nstart_timeout = "20min"\n'
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
square = generator.random((500, 500))
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


def prepared(notebook: Notebook, name: str, threads: int | None, repeated: int, *, bare: bool) -> str:
    """The id of a kernel with the data and functions."""
    code = PREPARE.format(threads=threads, bare=bare, variables=VARIABLES, repeated=repeated)
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


def measured(agent: Agent, rounds: int, quota: float, repeated: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by work and kernel."""
    notebook = agent.open(image=IMAGE.name, memory="2G", cpu_quota=f"{quota:.0%}")
    kernels = {
        "slot": prepared(notebook, "slot", None, repeated, bare=False),
        "tuned": prepared(notebook, "tuned", processors(SlotLimits(0, quota), PROCESSORS), repeated, bare=False),
        "host": prepared(notebook, "host", PROCESSORS, repeated, bare=True),
    }
    found: dict[str, dict[str, list[float]]] = {work: {name: [] for name in kernels} for work in WORKS}
    for number in range(rounds):
        for work, times in found.items():
            for name, kernel_id in kernels.items():
                times[name].append(seconds(notebook, kernel_id, work))
        say(f"round {number + 1} of {rounds}: " + ", ".join(
            f"{work} {'/'.join(f'{times[name][-1]:.2f}' for name in kernels)} s" for work, times in found.items()))
    agent.release(notebook.slot)
    return found


def table(ratios: Mapping[str, Sequence[float]]) -> str:
    lines = [f"| library | in a slot | with {PROCESSORS} threads |", "|---|---|---|"]
    return "\n".join(lines + [f"| {WORKS[work]} | {slot:.2f} | {host:.2f} |" for work, (slot, host) in ratios.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--here", action="store_true", help="in a container, with the processors of this machine")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--keep", action="store_true", help="leave the host up, and use one that is up")
    options = parser.parse_args()
    # Debian 12's machine, since the emulated processor of Debian 13's lacks an instruction that numpy needs (vm.py).
    machine = versions.Machine("libraries", "vm", "bookworm", "8G", PROCESSORS, versions.SETTINGS + PATIENT)
    quota, repeated = PROCESSORS * PART, 1
    if options.here:
        machine, quota, repeated = versions.Machine("libraries-here"), (os.cpu_count() or 1) * PART, REPEATED_HERE
    with versions.agent_for([IMAGE], options.keep, machine) as agent, versions.imported(agent, IMAGE):
        versions.wait_for_zygote(agent, IMAGE.name)
        found = measured(agent, options.rounds, quota, repeated)
    ratios = {}
    for work, times in found.items():
        tuned = statistics.median(times["tuned"])
        ratios[work] = [statistics.median(times[name]) / tuned for name in ("slot", "host")]
    sys.stdout.write(f"{table(ratios)}\n")
    slow = [f"{WORKS[work]}: {slot:.2f}" for work, (slot, _) in ratios.items() if slot > GOAL]
    if slow:
        raise SystemExit(f"more than {GOAL} of the tuned time: {', '.join(slow)}")
    sys.stdout.write(f"{len(ratios)} passed, 0 failed\n")


if __name__ == "__main__":
    main()
