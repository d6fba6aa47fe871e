# SPDX-License-Identifier: BSD-3-Clause
"""The packages of a release: reproducible, with a bill of materials, and with DEP-8 tests: `make test-release`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jinja2
import pytest

import product
from notebook import Notebook
from product import Api
from testhost_driver import Host

TOP = Path(__file__).resolve().parents[2]
CACHE = product.CACHE
PACKAGES = ("python3-nbagent", "nbagent", "nbagent-gateway", "nbagent-image-minimal")
# Two machines: path, mask, time zone, language, home and user's variables, and the date.
FIRST = {"LANG": "C.UTF-8", "TZ": "UTC", "HOME": "/root"}
SECOND = {"LANG": "tr_TR.UTF-8", "LC_ALL": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati", "HOME": "/nonexistent",
          "USER": "builder", "DEB_BUILD_OPTIONS": "parallel=7", "PYTHONHASHSEED": "7", "FAKETIME": "+400d"}


@pytest.fixture(scope="module")
def packages():
    return {path.name.split("_")[0]: path for path in product.build(product.say, PACKAGES)}


def downloaded(directory, status, *names):
    """The packages that a machine with this status of dpkg lacks for `names`."""
    (directory / "partial").mkdir(parents=True)
    command = ["apt-get", "-q", "-y", "--no-install-recommends", "--download-only"]
    command += [f"-oDir::Cache::archives={directory}", f"-oDir::State::status={status}" if status else "--reinstall"]
    subprocess.run([*command, "install", *names], check=True, capture_output=True)
    return sorted(directory.glob("*.deb"))


@pytest.fixture(scope="module")
def faketime(tmp_path_factory):
    """The library that changes the time of a build."""
    directory = tmp_path_factory.mktemp("faketime")
    package = next(path for path in downloaded(directory / "debs", None, "libfaketime") if "libfaketime" in path.name)
    subprocess.run(["dpkg-deb", "-x", package, directory], check=True)
    return next(directory.glob("usr/lib/*/faketime/libfaketime.so.1"))


def checkout(directory):
    """A copy of the work tree, with its index, because build-deb takes the files that git lists."""
    listed = subprocess.run(["git", "-C", TOP, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                            check=True, stdout=subprocess.PIPE, text=True).stdout
    for name in sorted(set(listed.split("\0"))):
        if name and (TOP / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, directory / name)
    subprocess.run(["git", "init", "-q", directory], check=True)
    subprocess.run(["git", "-C", directory, "add", "-A"], check=True)
    return directory


def hashes(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.deb")}


def test_packages_are_the_same_from_two_machines(tmp_path, faketime, packages):
    found = []
    changed = {"LD_PRELOAD": str(faketime), "FAKETIME": SECOND["FAKETIME"]}
    months = [subprocess.run(["date", "+%Y%m"], env=environment, check=True, stdout=subprocess.PIPE).stdout
              for environment in ({}, changed)]
    assert months[0] < months[1]
    for number, (variables, umask) in enumerate(((FIRST, 0o022), (SECOND, 0o077))):
        # The lengths of the paths differ too.
        place = tmp_path / ("a" if number == 0 else "another-place")
        source = checkout(place / "source")
        (place / "cache").mkdir()
        images = place / "cache/images"
        images.symlink_to(CACHE / "images")
        environment = {"PATH": os.environ["PATH"], "NBAGENT_CACHE": str(place / "cache"), "TMPDIR": str(place)}
        environment |= variables | ({"LD_PRELOAD": str(faketime)} if "FAKETIME" in variables else {})
        for command in ([source / "packaging/build-deb", place / "out"],
                        [source / "packaging/build-image-deb", "minimal", place / "out"]):
            done = subprocess.run(command, env=environment, umask=umask, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        found.append(hashes(place / "out"))
    assert len(found[0]) == len(PACKAGES)
    assert found[0] == found[1]
    assert found[0] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in packages.values()}


STATUS = """Package: {name}
Status: install ok installed
Architecture: all
Version: {version}
Maintainer: none
Description: none

"""


def test_updates_that_an_image_does_not_have_are_listed(tmp_path):
    tree = tmp_path / "rootfs"
    for name in ("usr/lib", "var/lib/dpkg"):
        (tree / name).mkdir(parents=True)
    (tree / "usr/lib/os-release").write_text("NAME=x\nVERSION_CODENAME=trixie\n")
    old, new = ("ca-certificates", "20200101"), ("base-passwd", "99:1")
    text = "".join(STATUS.format(name=name, version=version) for name, version in (old, new))
    (tree / "var/lib/dpkg/status").write_text(text)
    done = subprocess.run([TOP / "packaging/pending-updates", tree], stdout=subprocess.PIPE, text=True, check=False)
    (line,) = done.stdout.splitlines()
    source, *words, _ = line.split()
    assert words == [*old] and source in ("Debian", "Debian-Security")
    assert done.returncode == (source == "Debian-Security")


@pytest.fixture(scope="module")
def validator():
    """A Python with the library of CycloneDX."""
    recipe = TOP / "tests/requirements-release.txt"
    kept = CACHE / f"release-{hashlib.sha256(recipe.read_bytes()).hexdigest()[:16]}"
    if not (kept / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", kept], check=True)
        subprocess.run([kept / "bin/python", "-m", "pip", "install", "-q", "-r", recipe], check=True)
        (kept / "ready").touch()
    return kept / "bin/python"


VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
for file in sys.argv[1:]:
    if error := JsonStrictValidator(SchemaVersion.V1_5).validate_str(open(file).read()):
        sys.exit(f"{file}: {error}")
"""


def test_bills_of_materials_are_valid_and_list_what_is_inside(tmp_path, packages, validator):
    made = [tmp_path / number for number in ("1", "2")]
    for directory in made:
        command = [TOP / "packaging/build-sbom", directory, *packages.values()]
        files = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    subprocess.run([validator, "-c", VALIDATE, *files], check=True)
    first, second = ({path.name: path.read_bytes() for path in directory.iterdir()} for directory in made)
    assert first == second and len(first) == len(PACKAGES)
    image = packages["nbagent-image-minimal"]
    bill = json.loads(first[f"{image.name}.cdx.json"])
    assert bill["metadata"]["component"]["hashes"][0]["content"] == hashlib.sha256(image.read_bytes()).hexdigest()
    inside = {component.get("purl", "").partition("@")[0].partition("?")[0] for component in bill["components"]}
    assert {"pkg:deb/debian/python3.13", "pkg:pypi/jupyterlab", "pkg:pypi/ipykernel", "pkg:npm/react"} <= inside
    pinned = [line for line in (TOP / "images/minimal/requirements.txt").read_text().splitlines() if line[:1].isalnum()]
    assert {f"pkg:pypi/{line.split('==')[0]}" for line in pinned} <= inside
    agent = json.loads(first[f"{packages['nbagent'].name}.cdx.json"])
    assert "/usr/lib/systemd/system/nbagent.service" in {component["name"] for component in agent["components"]}


def test_the_tests_of_the_package_pass_on_a_host(packages, tmp_path):
    """By autopkgtest, with a test host as the machine."""
    with Host.up(name=f"ap{os.getpid()}"[:16]) as host, tempfile.TemporaryDirectory() as scratch:
        status = tmp_path / "status"
        host.copy_out("/var/lib/dpkg/status", status)
        missing = downloaded(Path(scratch, "debs"), status, "autopkgtest", "dpkg-dev")
        tree = tmp_path / "nbagent"
        shutil.copytree(TOP / "packaging/debian", tree / "debian")
        host.run(["mkdir", "-p", "/root/missing", "/root/built"])
        host.copy_in(missing, "/root/missing/")
        host.copy_in(list(packages.values()), "/root/built/")
        host.copy_in(tree, "/root/")
        host.run(["sh", "-c", "dpkg -i /root/missing/*.deb"], timeout=300)
        done = host.run(
            ["sh", "-c", "autopkgtest --no-built-binaries /root/built/*.deb /root/nbagent -- null"],
            check=False, timeout=900,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout[-3000:])


NEWER = "+newer"
MODULES = "/usr/lib/python3/dist-packages"


def newer(packages, directory):
    """Packages of the program with a higher version."""
    found = []
    for name in ("python3-nbagent", "nbagent"):
        tree = directory / name
        subprocess.run(["dpkg-deb", "-R", packages[name], tree], check=True)
        control = tree / "DEBIAN/control"
        version = re.search(r"^Version: (.*)$", control.read_text(), re.MULTILINE)[1]
        control.write_text(control.read_text().replace(version, version + NEWER))
        found.append(directory / f"{name}.deb")
        subprocess.run(["dpkg-deb", "-b", "--root-owner-group", tree, found[-1]], check=True, capture_output=True)
    return found


def test_an_upgrade_on_a_full_disk_keeps_the_host_serving_and_is_completed_with_room(packages, tmp_path):
    with Host.up(name=f"fd{os.getpid()}"[:16]) as host:
        product.install(host, [packages[name] for name in product.HOST])
        claim = Api(host).post("/claim").json()
        with Notebook(host, claim).kernel() as kernel:
            kernel.run("x = 41")
            files = [f"/root/{package.name}" for package in newer(packages, tmp_path)]
            host.copy_in(list(tmp_path.glob("*.deb")), "/root/")
            # The file system that dpkg unpacks Python modules to has room for a part of them.
            for command in (
                "mkdir /small", "mount -t tmpfs -o size=600k small /small", "mkdir /small/upper /small/work",
                "mount -t overlay -o lowerdir={0},upperdir=/small/upper,workdir=/small/work overlay {0}",
            ):
                host.run(command.format(MODULES).split())
            upgrade = ["apt-get", "-q", "install", "-y", *files]
            done = host.run(upgrade, check=False, timeout=300)
            assert done.returncode and "No space left on device" in done.stdout + done.stderr
            assert version(host, "python3-nbagent").endswith(NEWER) is False
            # The former files are in place: what starts now starts from them.
            host.run(["systemctl", "restart", "nbagent.service", "nbagent-api.service"])
            product.wait_warm(host)
            assert kernel.run("x + 1").text == "42"
            assert Notebook(host, Api(host).post("/claim").json()).run("6 * 7").text == "42"
            host.run(["mount", "-o", "remount,size=100M", "/small"])
            host.run(upgrade, timeout=300)
            assert all(version(host, name).endswith(NEWER) for name in ("python3-nbagent", "nbagent"))
            assert host.run(["dpkg", "--audit"]).stdout == ""
            product.wait_warm(host)
            assert kernel.run("x + 1").text == "42"
            assert Notebook(host, Api(host).post("/claim").json()).run("6 * 7").text == "42"


def version(host, name):
    return host.run(["dpkg-query", "-W", "-f", "${Version}", name]).stdout


def test_the_user_data_is_valid(tmp_path):
    """By Debian's cloud-init, after its template is filled in."""
    for package in downloaded(tmp_path / "debs", None, "cloud-init"):
        subprocess.run(["dpkg-deb", "-x", package, tmp_path / "tree"], check=True)
    text = (TOP / "packaging/cloud/user-data.yaml").read_text()
    first, _, rest = text.partition("\n")
    assert first == "## template: jinja"
    rendered = jinja2.Template(rest).render(v1={"instance_id": "i-0123456789ABCDEF0"})
    assert 'label = "123456789abcdef0"' in rendered
    data = tmp_path / "user-data"
    for content, status in ((rendered, 0), (rendered.replace("package_update: true", "package_update: 7"), 1)):
        data.write_text(content)
        modules = tmp_path / "tree/usr/lib/python3/dist-packages"
        done = subprocess.run(
            [sys.executable, tmp_path / "tree/usr/bin/cloud-init", "schema", "--config-file", data],
            env={**os.environ, "PYTHONPATH": str(modules)}, capture_output=True, text=True, check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr


@pytest.fixture(scope="module")
def shells():
    missing = [shell for shell in ("fish", "zsh") if not shutil.which(shell)]
    if missing:
        subprocess.run(["apt-get", "-q", "-y", "--no-install-recommends", "install", *missing], check=True,
                       capture_output=True)


# A zsh with a terminal of its own, which completes two lines one after the other.
ZSH = r"""
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "fpath=($1 \$fpath); autoload -U compinit; compinit -u -D; PS1='> '; echo rea''dy"
zpty -r shell output '*ready*'
zpty -w -n shell $'nbagent gateway drain-\t'
zpty -r shell output '*drain-host*'
zpty -w -n shell $'\C-u'
zpty -w -n shell $'nbagent rel\t'
zpty -r shell output '*release*'
"""


def test_fish_and_zsh_complete_commands_at_each_tab(shells, packages, tmp_path):
    subprocess.run(["dpkg-deb", "-x", packages["python3-nbagent"], tmp_path], check=True)
    share = tmp_path / "usr/share"
    environment = os.environ | {
        "PATH": f"{tmp_path}/usr/bin:{os.environ['PATH']}", "PYTHONPATH": f"{tmp_path}/usr/lib/python3/dist-packages",
        "HOME": str(tmp_path), "TERM": "xterm",
    }
    command = f"source {share}/fish/vendor_completions.d/nbagent.fish; complete -C 'nbagent gateway drain-'"
    offered = subprocess.run(["fish", "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert offered.stdout.startswith("drain-host\t")
    subprocess.run(["zsh", "-f", "-c", ZSH, "zsh", share / "zsh/vendor-completions"], env=environment, check=True,
                   timeout=300)
