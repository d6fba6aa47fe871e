#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make preloads`: large libraries as modules that a zygote preloads: which ones it keeps, and what that saves.

    tests/versions/preloads.py [--keep]

An image has them all. Each is imported in a kernel of its own, in forked slots without and with `preload`, and
computes something there. The table goes to standard output; packaging/docs/performance.md has it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / name) for name in ("integration", "conformance", ".", "..")] + [str(HERE)]

import versions
from conftest import Agent
from product import say
from versions import Version

MEMORY = "3G"
# A zygote that has all of them takes more than pool.zygote_memory is by default.
SETTINGS = """
[pool]
warm = 1
zygote_memory = "4G"
[cull]
interval = "1s"
"""
IMAGE = Version(
    "preloads", "python", "trixie", "3.13",
    ("jupyterlab==4.6.6", "ipykernel==7.4.0", "numpy", "pandas", "matplotlib", "scikit-learn", "polars", "pyarrow",
     "duckdb", "numba", "xgboost-cpu", "lightgbm", "tensorflow-cpu"),
    # PyPI's torch requires CUDA's libraries, of 3 GB.
    packages="libgomp1 python3-torch",
    files=(("opt/venv/lib/python3.13/site-packages/debian.pth", b"/usr/lib/python3/dist-packages\n"),),
)
# Modules, each with a computation.
MODULES = {
    "numpy": "numpy.linalg.solve(numpy.eye(300), numpy.ones(300)).sum() == 300",
    "pandas": "pandas.DataFrame({'a': [1, 2, 3]}).a.sum() == 6",
    "matplotlib.pyplot": "matplotlib.pyplot.plot([1, 2]) != []",
    "sklearn.ensemble": "sklearn.ensemble.HistGradientBoostingRegressor(max_iter=5).fit([[1.0]] * 99, [1.0] * 99)"
                        ".predict([[1.0]])[0] == 1",
    "polars": "polars.DataFrame({'a': [1, 2, 3]}).lazy().sum().collect()['a'][0] == 6",
    "pyarrow": "pyarrow.compute.sum(pyarrow.array([1, 2, 3])).as_py() == 6",
    "duckdb": "duckdb.sql('select sum(range) from range(1000000)').fetchall()[0][0] == 499999500000",
    "numba": "numba.njit(lambda a: a + 1)(1) == 2",
    "xgboost": "xgboost.train({'nthread': 2}, xgboost.DMatrix([[1.0]] * 9, [1.0] * 9), 2).num_boosted_rounds() == 2",
    "lightgbm": "lightgbm.LGBMRegressor(n_estimators=2, verbose=-1).fit([[1.0]] * 99, [1.0] * 99) is not None",
    "torch": "float(torch.ones(300, 300).matmul(torch.ones(300, 300))[0, 0]) == 300",
    "tensorflow": "int(tensorflow.reduce_sum([1, 2, 3])) == 6",
}
MANIFEST = f"""
python = "{IMAGE.prefix}/bin/python3"
user = "jovyan"
home = "/home/jovyan"
preload = {json.dumps(list(MODULES))}
[environment]
PATH = "{IMAGE.prefix}/bin:/usr/local/bin:/usr/bin:/bin"
LANG = "C.UTF-8"
"""
TRY = """
import json, re, time
def own_kib():
    with open("/proc/self/smaps_rollup") as file:
        return int(re.search(r"^Anonymous:\\s+(\\d+)", file.read(), re.M)[1])
before, began = own_kib(), time.perf_counter()
import {module}
took, grown = time.perf_counter() - began, own_kib() - before
if "{module}" == "pyarrow":
    import pyarrow.compute
print(json.dumps([took, grown / 1024, bool({check})]))
"""


class Cost(NamedTuple):
    """Of an import in a kernel: seconds, MiB that it wrote, and whether the computation was right; or an error."""

    seconds: float
    mib: float
    right: bool
    error: str = ""


def costs(agent: Agent, image: str) -> dict[str, Cost]:
    """Imports each module in a kernel of its own, in a slot of the image that was forked."""
    notebook = agent.open(image=image, memory=MEMORY)
    slot = agent.api.get(f"/slots/{notebook.slot}").json()
    if slot["launch"] != "fork":
        raise SystemExit(f"{image} is not forked: {slot['launch_reason']}")
    found = {}
    for module, check in MODULES.items():
        result = notebook.run(TRY.format(module=module, check=check), 300)
        line = result.stream.strip().splitlines()[-1:] or [""]
        found[module] = Cost(*json.loads(line[0])) if result.status == "ok" else Cost(0, 0, False, result.error[:300])
        say(f"{image}: {module}: {found[module]}")
    agent.release(notebook.slot)
    return found


def table(without: Mapping[str, Cost], preloaded: Mapping[str, Cost], left_out: Sequence[str]) -> str:
    lines = ["| module | preloaded | import without, s | MiB | import with, s | MiB |", "|---|---|---|---|---|---|"]
    for module, cost in without.items():
        other = preloaded[module]
        why = next((line.partition("preloaded: ")[2] for line in left_out if f" {module} is not" in line), "")
        lines.append(f"| {module} | {'no: ' + why if why else 'yes'} | {cost.seconds:.2f} | {cost.mib:.0f} |"
                     f" {other.seconds:.4f} | {other.mib:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--keep", action="store_true", help="leave the host up, and use one that is up")
    options = parser.parse_args()
    machine = versions.Machine("preloads", settings=SETTINGS)
    with versions.agent_for([IMAGE], options.keep, machine) as agent, versions.imported(agent, IMAGE):
        versions.wait_for_zygote(agent, IMAGE.name)
        without = costs(agent, IMAGE.name)
        name = f"{IMAGE.name}-done"
        try:
            agent.host.run(["tee", "/root/preload.toml"], input=MANIFEST)
            began = agent.run("date", "+%s").strip()
            agent.run("nbagent", "image", "use", "--manifest", "/root/preload.toml", name, IMAGE.name)
            versions.wait_for_zygote(agent, name, complete=True)
            left_out = agent.run(
                "sh", "-c", f"journalctl -o cat --since=@{began} -t nbagent -g 'is not preloaded' || true")
            sys.stdout.write(left_out)
            preloaded = costs(agent, name)
            status = agent.host.run(["nbagent", "image", "check", name], check=False, timeout=600).stdout
        finally:
            agent.run("nbagent", "image", "remove", name, check=False)
        sys.stdout.write(f"{status}\n{table(without, preloaded, left_out.splitlines())}\n")
    wrong = {module: cost for module, cost in preloaded.items() if not cost.right}
    if wrong:
        raise SystemExit("\n".join(f"{module}: {cost}" for module, cost in wrong.items()))
    sys.stdout.write(f"{len(preloaded)} passed, 0 failed\n")


if __name__ == "__main__":
    main()
