# SPDX-License-Identifier: BSD-3-Clause
"""jupyter_server's own API tests, run against slots and against a plain `jupyter lab` of the same image.

The tests come from the source archive of the image's version of jupyter_server, and pytest from wheels; both are
downloaded by pip and cached by a hash of the recipe. pytest runs under the image's Python in the file system of the
server, so that the tests may write into its root directory, but in the network of the test host, so that requests to a
slot pass the router.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nbagent.sandbox.plan import RUNTIME_PATH
from notebook import Notebook
from testhost_driver import Host, rootfs

HERE = Path(__file__).resolve().parent
IMAGE = HERE.parent.parent / "images/minimal"
CACHE = rootfs.cache()
HOME, PLACE = "/home/jovyan", "/tmp/conformance"
PLAIN, PLAIN_UNIT, PLAIN_PORT, PLAIN_TOKEN = "/run/conformance-plain", "conformance-plain", 8899, "conformance"
# The files of tests about the API that a browser uses.
FILES = (
    "services/api/test_api.py", "services/config/test_api.py", "services/contents/test_api.py",
    "services/kernels/test_api.py", "services/kernelspecs/test_api.py", "services/nbconvert/test_api.py",
    "services/sessions/test_api.py", "nbconvert/test_handlers.py", "test_files.py", "test_terminal.py", "test_view.py",
)
# They need settings of the server: terminals that end after 10 s.
WITHOUT = "not test_culling"
_KERNELS = "tests/services/kernels/test_api.py::test_resolve_path_server_"
# Tests that pass with the plain server and not in a slot, each with the reason.
DIFFERENCES = {
    f"{_KERNELS}traversal": "writes to /home, which belongs to the image's root",
    f"{_KERNELS}expands_user_rejects_outside_root": "writes to /home, which belongs to the image's root",
}


def version(project: str = "jupyter_server") -> str:
    """The image's version of a project."""
    name = project.replace("_", "-")
    found = re.search(rf"^{name}==(\S+)", (IMAGE / "requirements.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def material(project: str = "jupyter_server", more: Sequence[str] = ()) -> Path:
    """A tar archive with the tests of a project, pytest, and `more` packages, downloaded once."""
    recipe = (HERE / "requirements.txt").read_bytes() + version(project).encode() + " ".join(more).encode()
    cached = CACHE / f"conformance-{hashlib.sha256(recipe).hexdigest()[:16]}.tar"
    if cached.exists():
        return cached
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        made = Path(directory)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        wheels = ["--no-deps", "--only-binary=:all:", "--python-version=3.13", "--target", str(made / "packages")]
        subprocess.run([*pip, "install", *wheels, "-r", HERE / "requirements.txt", *more], check=True)
        source = ["--no-deps", f"--no-binary={project}", "-d", str(made), f"{project}=={version(project)}"]
        subprocess.run([*pip, "download", *source], check=True, stdout=subprocess.DEVNULL)
        (archive,) = made.glob(f"{project}-*.tar.gz")
        subprocess.run(["tar", "-xf", archive, "-C", made, "--wildcards", "*/tests"], check=True)
        (tests,) = made.glob(f"{project}-*/tests")
        with tarfile.open(made / "made.tar", "w") as tar:
            tar.add(tests, "tests")
            tar.add(made / "packages", "packages")
        (made / "made.tar").rename(cached)
    return cached


@dataclass(frozen=True)
class Server:
    """A server to test: its address from the test host, and the command that runs a program beside it.

    `variables` are of the environment of its kernels.
    """

    host: Host
    url: str
    token: str
    enter: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)

    def run(self, files: Sequence[str] = FILES, select: str = WITHOUT, timeout: float = 1200) -> dict[str, list[str]]:
        """Runs the tests; returns {test: [outcome, text]}."""
        self.unpack(material())
        self.inside("sh", "-c", f"cat > {PLACE}/external.py", input=(HERE / "external.py").read_text())
        variables = {
            "CONFORMANCE_URL": self.url, "CONFORMANCE_TOKEN": self.token, "CONFORMANCE_ROOT": HOME, "HOME": HOME,
            "CONFORMANCE_RESULTS": f"{PLACE}/results", "PYTHONPATH": f"{PLACE}:{PLACE}/packages",
            "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1",
        }
        argv = ["env", "-i", f"--chdir={PLACE}", *(f"{name}={value}" for name, value in variables.items()),
                "python3", "-m", "pytest", "-q", "-p", "external", "-p", "no:cacheprovider", "--timeout=60",
                "-k", select, *(f"tests/{file}" for file in files)]
        done = self.host.run([*self.enter, *argv], check=False, timeout=timeout)
        assert done.returncode in (0, 1), f"{shlex.join(argv)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        found: dict[str, list[str]] = json.loads(self.inside("cat", f"{PLACE}/results"))
        self.inside("rm", "-rf", PLACE)
        return found

    def unpack(self, archive: Path) -> None:
        """Makes PLACE with the content of a tar archive."""
        self.inside("rm", "-rf", PLACE)
        self.inside("mkdir", PLACE)
        self.host.run([*self.enter, "tar", "-xf", "-", "-C", PLACE], input=archive.read_bytes(), text=False)

    def inside(self, *argv: str, input: str | None = None) -> str:  # noqa: A002 - as subprocess.run has it
        return str(self.host.run([*self.enter, *argv], input=input).stdout)


def slot(notebook: Notebook) -> Server:
    """The server of a claimed slot."""
    record = json.loads(notebook.host.run(["cat", f"/run/nbagent/slots/{notebook.slot}/slot.json"]).stdout)
    uid = str(record["uid"])
    # Without the network namespace, so that the tests reach the router.
    enter = ["nsenter", "-t", str(record["pid"]), "-U", "-m", "-p", "-S", uid, "-G", uid]
    variables = {"JUPYTER_RUNTIME_DIR": RUNTIME_PATH}
    return Server(notebook.host, f"http://127.0.0.1:8000{notebook.base}", notebook.token, enter, variables)


@contextmanager
def plain(host: Host, root: str, path: str = "/usr/local/bin:/usr/bin:/bin") -> Iterator[Server]:
    """A plain `jupyter lab` with the files of an image, in a tmpfs of the test host; `path` is its PATH."""
    script = f"""
        root={root}
        mkdir -p {PLAIN}
        mount -t tmpfs -o mode=755 conformance {PLAIN}
        cp -a $root/. {PLAIN}
        mount -t proc proc {PLAIN}/proc
        mount --rbind /dev {PLAIN}/dev
        mount --make-rprivate {PLAIN}/dev
        mount -t tmpfs -o mode=1777 conformance {PLAIN}/tmp
        stat -c %u {PLAIN}/home/jovyan"""
    try:
        uid = host.run(["sh", "-ec", script]).stdout.strip()
        enter = ["chroot", f"--userspec=+{uid}:+{uid}", "--groups=", PLAIN]
        environment = [f"HOME={HOME}", f"PATH={path}", "LANG=C.UTF-8", "SHELL=/bin/bash"]
        argv = ["env", "-i", f"--chdir={HOME}", *environment, "jupyter-lab", "--no-browser", "--ip=127.0.0.1",
                f"--port={PLAIN_PORT}", "--port-retries=0", f"--IdentityProvider.token={PLAIN_TOKEN}"]
        host.run(["systemd-run", "-q", "--collect", f"--unit={PLAIN_UNIT}", *enter, *argv])
        probe = f"for n in $(seq 300); do curl -sf 127.0.0.1:{PLAIN_PORT}/api && exit; sleep .1; done; exit 1"
        host.run(["sh", "-c", probe])
        yield Server(host, f"http://127.0.0.1:{PLAIN_PORT}/", PLAIN_TOKEN, enter)
    finally:
        host.run(["sh", "-c", f"systemctl stop {PLAIN_UNIT}; umount -R {PLAIN}; rmdir {PLAIN}"], check=False)


def differences(
    plain: Mapping[str, list[str]], other: Mapping[str, list[str]], known: Mapping[str, str] = DIFFERENCES
) -> dict[str, str]:
    """Tests that pass with the plain server and not with the other, without those in `known`."""
    missing = ["missing", ""]
    return {
        name: ": ".join(other.get(name, missing))
        for name, (outcome, _) in plain.items()
        if outcome == "passed" and other.get(name, missing)[0] != "passed" and name not in known
    }


def table(results: Mapping[str, Mapping[str, list[str]]]) -> str:
    """The passed tests of each file by server, and what differs, as text."""
    return columns("jupyter_server " + version(), results, FILES, DIFFERENCES)


def columns(
    title: str, results: Mapping[str, Mapping[str, list[str]]], files: Sequence[str], known: Mapping[str, str]
) -> str:
    counts = {kind: Counter(name.split("::")[0] for name, (outcome, _) in found.items() if outcome == "passed")
              for kind, found in results.items()}
    lines = [f"{'passed tests of ' + title:45}" + "".join(f"{kind:>8}" for kind in results)]
    for file in files:
        lines.append(f"{file:45}" + "".join(f"{counts[kind]['tests/' + file]:8}" for kind in results))
    lines.append(f"{'all':45}" + "".join(f"{counts[kind].total():8}" for kind in results))
    return "\n".join([*lines, *(f"{name}: {reason}" for name, reason in known.items())])
