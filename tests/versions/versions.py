#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""`make versions`: images with versions of Python and Jupyter are imported, forked and tried on a host.

    tests/versions/versions.py [--only NAME …] [--keep]

Each image is an OCI layout in one of two forms. `stacks` is like those of jupyter/docker-stacks: an environment at
/opt/conda that belongs to the user 1000:100, which is a virtual environment or, as conda's, has an interpreter of its
own; scripts in etc/conda/activate.d, tini and start.sh as its entry point. `python` is like python:3.x: root, an
interpreter in /usr/local or /usr/bin, and packages by pip. They are made of Debian's and PyPI's packages, and, for
Python 3.12, of an interpreter that pyenv has built on this machine; where there is none, the image is left out. A row
passes if `nbagent image check` does, if an interrupt ends a cell that waits for input or at a breakpoint, if terminals
find the programs of notebooks, if packages that pip installs are imported, and if slots are forked, or not for the
reason that the row names.

Layers are cached by a hash of their recipe. The table goes to standard output.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / name) for name in ("integration", "conformance", ".", "..")]

import acts
import reported_programs
from waits import check_waits

import product
from archives import Archive, Layers
from conftest import Agent
from nbagent.core import paths
from notebook import Notebook
from product import say
from testhost_driver import Host, aptsources, state
from wheels import wheel

CACHE = product.CACHE / "versions"
SETTINGS = "[pool]\nwarm = 1\n[cull]\ninterval = \"1s\"\n"
ZYGOTE_WAIT_S = 900.0
PACKAGES = "bash ca-certificates libstdc++6 procps python3 python3-venv tini"
# Of an interpreter by pyenv.
LIBRARIES = "libbz2-1.0 libffi8 liblzma5 libncursesw6 libreadline8 libsqlite3-0 libssl3 libuuid1 zlib1g"
# A cell.
VERSIONS = """
import importlib.metadata, json, sys
found = {one.metadata["Name"].lower().replace("-", "_"): one.version for one in importlib.metadata.distributions()}
print(json.dumps({"python": ".".join(map(str, sys.version_info[:3])), **found}))
"""


@dataclass(frozen=True)
class Version:
    """One image. `built` is the version of an interpreter by pyenv; `by_exec` a part of the reason for exec; `packages`
    are Debian's in addition to PACKAGES, and `files` those of the upper layer.
    """

    name: str
    form: str
    suite: str
    python: str
    requirements: tuple[str, ...]
    built: str = ""
    by_exec: str = ""
    packages: str = ""
    files: tuple[tuple[str, bytes], ...] = ()

    @property
    def prefix(self) -> str:
        """The directory of the environment with Jupyter."""
        if self.form == "stacks":
            return "/opt/conda"
        return "/usr/local" if self.built else "/opt/venv"


TABLE = (
    Version("py311-lab42", "stacks", "bookworm", "3.11", ("jupyterlab==4.2.7", "ipykernel==6.29.5")),
    Version("py312-lab43", "python", "bookworm", "3.12",
            ("jupyterlab==4.3.8", "notebook==7.3.3", "ipykernel==6.29.5"), built="3.12"),
    Version("py312-prefix", "stacks", "bookworm", "3.12", ("jupyterlab==4.6.6", "ipykernel==7.4.0"), built="3.12"),
    Version("py313-lab44", "stacks", "trixie", "3.13",
            ("jupyterlab==4.4.10", "notebook==7.4.7", "ipykernel==6.30.1")),
    Version("py313-lab46", "stacks", "trixie", "3.13", ("jupyterlab==4.6.6", "notebook", "ipykernel==7.4.0")),
    Version("py314-lab46", "python", "forky", "3.14", ("jupyterlab==4.6.6", "ipykernel==7.4.0")),
)

START = b"#!/bin/bash\nset -e\nsource /usr/local/bin/run-hooks.sh /usr/local/bin/before-notebook.d\nexec \"$@\"\n"
HOOK = b'eval "$(conda shell.bash hook)"\n'
ACTIVATE = b"export FROM_ACTIVATE=$CONDA_PREFIX\n"
# As docker-stacks has it.
SERVER = b"""c = get_config()  # noqa
c.ServerApp.ip = "0.0.0.0"
c.ServerApp.open_browser = False
c.InlineBackend.figure_formats = {"png", "jpeg", "svg", "pdf"}
c.FileContentsManager.delete_to_trash = False
"""
PASSWD = b"root:x:0:0:root:/root:/bin/bash\njovyan:x:1000:100::/home/jovyan:/bin/bash\n"


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command whose failure has its output."""
    done = subprocess.run(command, text=True, capture_output=True, check=False, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done


def bootstrap(root: Path, suite: str, packages: str) -> None:
    """Debian's essential packages and some more."""
    # A mirror may have a copy of Debian testing whose signature has expired by its date.
    run("mmdebstrap", "--quiet", "--mode=root", "--variant=essential", f"--include={','.join(packages.split())}",
        '--aptopt=Acquire::Check-Valid-Until "false"',
        "--format=directory", "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
        suite, root, *aptsources.sources_lines(suite))
    for place in ("var/cache/apt", "var/lib/apt/lists", "etc/apt/sources.list.d"):
        shutil.rmtree(root / place, ignore_errors=True)
    for file in ("etc/apt/sources.list", "etc/resolv.conf", "etc/hostname"):
        (root / file).unlink(missing_ok=True)


def interpreter(built: str) -> Path | None:
    """The directory of an interpreter by pyenv."""
    found = sorted((Path.home() / ".pyenv/versions").glob(f"{built}.*"))
    return found[-1] if found else None


def within(root: Path, *command: str) -> str:
    """Runs a program in the tree, without a network; its output."""
    environment = ["env", "-i", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME=/root", "LANG=C.UTF-8"]
    return run("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", f"--mount-proc={root}/proc",
               "chroot", root, *environment, *command).stdout


def install(root: Path, version: Version, wheels: Path) -> None:
    """Jupyter at the version's prefix, from wheels that the machine's pip downloads."""
    run(sys.executable, "-m", "pip", "download", "-qq", "--only-binary=:all:", f"--python-version={version.python}",
        f"--dest={wheels}", *version.requirements, "pip", "setuptools")
    shutil.copytree(wheels, root / "opt/.wheels")
    if version.built:
        home = interpreter(version.built)
        assert home is not None
        for part in ("bin", "lib", "include"):
            shutil.copytree(home / part, root / version.prefix[1:] / part, symlinks=True, dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns("test", "__pycache__", "site-packages"))
        (root / version.prefix[1:] / f"lib/python{version.python}/site-packages").mkdir(exist_ok=True)
        # pyenv's interpreter has no run path; conda's has one.
        (root / "etc/ld.so.conf.d/nbagent-prefix.conf").write_text(f"{version.prefix}/lib\n")
        within(root, "ldconfig")
        python = f"{version.prefix}/bin/python{version.python}"
        within(root, python, "-m", "ensurepip")
    else:
        within(root, "python3", "-m", "venv", version.prefix)
        python = f"{version.prefix}/bin/python3"
    within(root, python, "-m", "pip", "install", "-qq", "--no-index", "--find-links=/opt/.wheels",
           "--no-warn-script-location", "--root-user-action=ignore", *version.requirements)
    shutil.rmtree(root / "opt/.wheels")
    if version.form == "stacks":
        run("chown", "-R", "1000:100", root / version.prefix[1:])


def layer(version: Version) -> Path:
    """The lower layer of an image, packed, from the cache or made."""
    parts = (bootstrap, install, within)
    recipe = repr(dataclasses.replace(version, files=())) + PACKAGES + LIBRARIES
    recipe += "".join(map(inspect.getsource, parts))
    cached = CACHE / f"{version.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.tar.zst"
    if cached.exists():
        return cached
    CACHE.mkdir(parents=True, exist_ok=True)
    say(f"building {version.name}")
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        os.chmod(directory, 0o755)  # apt reads in it as a user of its own
        root = Path(directory) / "root"
        bootstrap(root, version.suite, f"{PACKAGES} {version.packages} {LIBRARIES if version.built else ''}")
        install(root, version, Path(directory) / "wheels")
        packed = Path(directory) / "layer"
        run("tar", "--zstd", "-cf", packed, "--one-file-system", "--exclude=./dev/*", "-C", root, ".")
        packed.rename(cached)
    return cached


def layout(version: Version, path: Path) -> None:
    """Writes the image as an OCI layout."""
    packed, mine = layer(version).read_bytes(), {"uid": 1000, "gid": 100}
    if version.form == "python":
        variables = [f"PATH={version.prefix}/bin:/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8"]
        layers, upper = Layers(Env=variables, Cmd=["python3"]).layer(packed, bytes), Archive()
        for name, content in version.files:
            upper.add(name, content, mode=0o644)
        layers.layer(upper).save(path).close()
        return
    upper = Archive().add("etc/passwd", PASSWD).add("home/jovyan", type=tarfile.DIRTYPE, mode=0o2775, **mine)
    upper.add("home/jovyan/.bashrc", b"# conda\n", **mine).add("opt/conda", type=tarfile.DIRTYPE, mode=0o2775, **mine)
    upper.add("usr/local/bin/start.sh", START, mode=0o755)
    upper.add("usr/local/bin/before-notebook.d/10activate-conda-env.sh", HOOK, mode=0o755)
    upper.add("opt/conda/etc/conda/activate.d/libxml2_activate.sh", ACTIVATE, mode=0o644, **mine)
    upper.add("etc/jupyter/jupyter_server_config.py", SERVER)
    for name, content in version.files:
        upper.add(name, content, mode=0o644)
    path_variable = "PATH=/opt/conda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    config = {
        "User": "1000", "WorkingDir": "/home/jovyan", "Entrypoint": ["tini", "-g", "--", "start.sh"],
        "Cmd": ["start-notebook.py"], "ExposedPorts": {"8888/tcp": {}},
        "Env": [path_variable, "CONDA_DIR=/opt/conda", "SHELL=/bin/bash", "NB_USER=jovyan", "NB_UID=1000", "NB_GID=100",
                "LC_ALL=C.UTF-8", "LANG=C.UTF-8", "HOME=/home/jovyan", "JUPYTER_PORT=8888"],
    }
    Layers(**config).layer(packed, bytes).layer(upper).save(path).close()


@contextmanager
def imported(agent: Agent, version: Version) -> Iterator[None]:
    """The image, on the host."""
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        layout(version, Path(directory) / "layout")
        agent.host.copy_in(f"{directory}/layout", "/root/")
    source = ["nbagent", "image", "import", "--name", version.name, "oci:/root/layout"]
    try:
        agent.host.run(source, timeout=600)
        agent.run("rm", "-rf", "/root/layout")
        agent.wait(lambda: version.name in {one["name"] for one in agent.api.get("/images").json()}, "the image")
        yield
    finally:
        agent.run("rm", "-rf", "/root/layout")
        agent.run("nbagent", "image", "remove", version.name, check=False)


def stored(version: Version, directory: Path) -> Path:
    """The image's directory in the store of a container that imports it, copied into `directory`."""
    with agent_for([version], False, Machine(f"{version.name}-store")) as agent, imported(agent, version):
        digest = Path(agent.run("readlink", f"{paths.IMAGES}/names/{version.name}").strip()).name
        agent.host.copy_out(f"{paths.IMAGES}/{digest}", directory)
    return directory / digest


def wait_for_zygote(agent: Agent, image: str, *, complete: bool = False) -> None:
    """Waits until the image's zygote forks, after its warm-up if `complete`, or has failed for good."""
    def is_settled() -> bool:
        found = [one["launch_reason"] for one in agent.api.get("/images").json() if one["name"] == image]
        return bool(found) and "is being started" not in found[0] and not (complete and "no warm-up" in found[0])

    agent.wait(is_settled, f"the zygote of {image}", ZYGOTE_WAIT_S)


def check_packages(notebook: Notebook) -> None:
    """A package that pip installs in a cell is imported by the same kernel, and by a new one."""
    for name, command in (("one", "!pip"), ("two", "%pip"), ("three", "pip")):
        file, content = wheel(name)
        acts.put(notebook, file, {"type": "file", "format": "base64", "content": base64.b64encode(content).decode()})
        use = f"import {name}; print({name}.ANSWER)"
        with notebook.kernel() as kernel:
            installed = kernel.run(f"{command} install --no-index --no-cache-dir ./{file}", 120)
            assert "Successfully installed" in installed.stream, installed
            assert kernel.run(use).stream == "42\n", kernel.run(use)
        assert notebook.run(use).stream == "42\n"


def tried(agent: Agent, version: Version) -> tuple[list[str], list[str]]:
    """The row of the table, and what is wrong."""
    # On a busy machine a zygote takes longer than `nbagent image check` waits.
    wait_for_zygote(agent, version.name)
    done = agent.host.run(["nbagent", "image", "check", version.name, "--json"], check=False, timeout=600)
    results = json.loads(done.stdout)
    wrong = [f"{one['check']}: {one['found']}" for one in results if one["status"] == "fail"]
    found: dict[str, str] = {}
    for result in results:
        found.setdefault(result["check"], result["found"])
    launch, _, reason = found["launch"].partition(": ")
    if launch == "exec" and (not version.by_exec or version.by_exec not in reason):
        wrong.append(f"not forked: {reason}")
    notebook = Notebook(agent.host, agent.claim(image=version.name))
    have = json.loads(notebook.run(VERSIONS).stream)
    if version.form == "stacks":
        activated = notebook.run("import os; print(os.environ['FROM_ACTIVATE'])").stream.strip()
        if activated != "/opt/conda":
            wrong.append(f"activate.d: {activated!r}")
    try:
        reported_programs.terminals_and_notebooks_have_the_same_programs(notebook)
    except AssertionError as error:
        wrong.append(f"terminal: {error}")
    try:
        check_waits(agent, notebook)
    except AssertionError as error:
        wrong.append(f"interrupt: {error}")
    try:
        check_packages(notebook)
    except AssertionError as error:
        wrong.append(f"pip: {error}")
    agent.release(notebook.slot)
    after = re.search(r"memory (.+?) of", found.get("kernel", ""))
    memory = f"{found['memory at rest'].partition(' of')[0]}, {after[1] if after else 'unknown'}"
    row = [have["python"], version.form, have["jupyterlab"], have.get("notebook", ""), have["ipykernel"],
           have["jupyter_server"], launch + (f": {reason}" if reason else ""), memory]
    return row, wrong


def show(rows: Sequence[Sequence[str]]) -> None:
    """Prints the table in Markdown's form."""
    head = ["Python", "form", "JupyterLab", "notebook", "ipykernel", "jupyter_server", "slots start by", "memory"]
    for row in (head, ["---"] * len(head), *rows):
        sys.stdout.write("| " + " | ".join(row) + " |\n")


class Machine(NamedTuple):
    """The host of a run, with the options of `Host.up`, the product's packages and settings, and an image of its store.

    `store` is the image's directory in the store of another host, and `image` its name: an emulated processor takes
    more than ten minutes to import one.
    """

    name: str
    driver: str = "nspawn"
    suite: str = "bookworm"
    memory: str | None = None
    cpus: int | None = None
    settings: str = SETTINGS
    packages: Sequence[str] = product.HOST
    store: Path | None = None
    image: str = ""


CONTAINER = Machine("versions")


@contextmanager
def agent_for(wanted: Sequence[Version], keep: bool, machine: Machine = CONTAINER) -> Iterator[Agent]:
    """A host with the product, after the layers of the images have been built; `keep` leaves it up for the next run."""
    packages = product.build(say, machine.packages)
    for version in wanted:
        layer(version)
    up = partial(Host.up, machine.name, machine.driver, machine.suite, machine.memory, machine.cpus)
    host = Host.attach(machine.name) if keep and machine.name in state.names() else up()
    if keep:
        host.keep()
    try:
        if machine.store is not None:
            host.copy_in(machine.store, f"{paths.IMAGES}/")
            host.run(["mkdir", "-p", f"{paths.IMAGES}/names"])
            host.run(["ln", "-sfn", f"../{machine.store.name}", f"{paths.IMAGES}/names/{machine.image}"])
        host.run(["mkdir", "-p", "/etc/nbagent/conf.d"])
        host.run(["tee", "/etc/nbagent/conf.d/50-test.toml"], input=machine.settings)
        product.add_changed(host, packages, say)
        host.run(["systemctl", "reload", "nbagent"])
        product.wait_warm(host)
        yield Agent(host)
    finally:
        if not keep:
            host.down()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[version.name for version in TABLE], default=[])
    parser.add_argument("--keep", action="store_true", help="leave the host up, and use one that is up")
    options = parser.parse_args()
    wanted = [version for version in TABLE if not options.only or version.name in options.only]
    for version in [version for version in wanted if version.built and interpreter(version.built) is None]:
        say(f"{version.name} is left out, because pyenv has no Python {version.built} here")
        wanted.remove(version)
    rows, faults = [], {}
    with agent_for(wanted, options.keep) as agent:
        for version in wanted:
            began_s = time.monotonic()
            with imported(agent, version):
                row, wrong = tried(agent, version)
            rows.append(row)
            if wrong:
                faults[version.name] = wrong
            say(f"{version.name}: {'; '.join(wrong) or 'ok'} in {time.monotonic() - began_s:.0f} s")
    show(rows)
    if faults:
        raise SystemExit("\n".join(f"{name}: {fault}" for name, found in faults.items() for fault in found))
    sys.stdout.write(f"{len(rows)} passed, 0 failed\n")


if __name__ == "__main__":
    main()
