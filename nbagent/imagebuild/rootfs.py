# SPDX-License-Identifier: BSD-3-Clause
"""Creates the root filesystem of an image from its recipe: Debian, Python packages, the recipe's files."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from nbagent.imagebuild.commands import fail, progress, run
from nbagent.imagebuild.recipe import Recipe

# Excluded while dpkg unpacks. Copyright files are kept, because the licences require them.
NOT_UNPACKED = (
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/man/*",
)

# Files that the installation leaves, and files of this machine that mmdebstrap copies so that apt works.
LEFTOVERS = (
    "etc/.pwd.lock", "etc/*-", "etc/apt", "etc/dpkg/dpkg.cfg.d/*",
    "etc/hostname", "etc/machine-id", "etc/resolv.conf",
    "tmp/*", "run/*", "var/cache/*/*", "var/lib/apt",
    "var/lib/dpkg/*-old", "var/lib/dpkg/lock*", "var/lib/dbus/machine-id", "var/lib/systemd/*", "var/log/*",
    "var/tmp/*", "root/*", "dev/*",
)  # fmt: skip

# These would carry a part of this machine's own configuration into the image.
FORBIDDEN = (
    "**/.netrc", "**/pip.conf", "etc/apt", "etc/dpkg/dpkg.cfg.d/*",
    "etc/hostname", "etc/machine-id", "etc/resolv.conf",
    "usr/local/share/ca-certificates/*", "usr/local/lib/python3*/**/*.pth",
)  # fmt: skip

# A slot's sandbox mounts a filesystem on each of these.
MOUNT_POINTS = {"dev": 0o755, "home": 0o755, "proc": 0o555, "run": 0o755, "sys": 0o555, "tmp": 0o1777}

# The directory in the image that has the wheels while they are installed.
WHEELS = "/opt/.wheels"

# The whole environment of the image's programs during the build; in particular no PIP_* and no proxy.
CHROOT_ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PIP_CONFIG_FILE": "/dev/null",
    "PYTHONDONTWRITEBYTECODE": "1",
    # Byte code contains sets in hash order, so a random seed would make it differ between builds.
    "PYTHONHASHSEED": "0",
}


def create(recipe: Recipe, root: Path, scratch: Path) -> None:
    """Create the root filesystem in `root`, which must not exist; `scratch` is for downloads."""
    sources = debian_sources(recipe.suite)
    _bootstrap(recipe, sources, root)
    _allow_pip(root)
    _install_requirements(recipe, root, scratch)
    _add_user(recipe, root)
    _copy_files(recipe, root)
    _tidy(recipe, root)
    _compile_python(root)
    _check_finished(recipe, root)
    _remove_matching(root, LEFTOVERS)
    _check_private_data(root, _mirror_hosts(sources))


def debian_sources(suite: str) -> list[str]:
    """This machine's own Debian mirrors, for another suite, as one-line sources.

    They are read from apt's output, because only apt reads every form of its configuration. Sources that are not
    Debian's are excluded, because one that cannot be reached would fail the build.
    """
    here = platform.freedesktop_os_release()["VERSION_CODENAME"]
    fields = "$(ORIGIN)|$(CODENAME)|$(COMPONENT)|$(REPO_URI)"
    command = ["apt-get", "indextargets", "--format", fields, "Created-By: Packages"]
    for attempt in range(2):
        if attempt:
            run(["apt-get", "-qq", "update"])  # the origin is in the package lists
        listed = subprocess.run(command, check=True, text=True, capture_output=True).stdout
        if sources := _main_sources(listed, here, suite):
            return sources
    return fail("apt has no Debian mirror configured on this machine; see sources.list(5)")


def _main_sources(listed: str, here: str, suite: str) -> list[str]:
    """One-line sources of `suite` for those of Debian's own `here` in the output of `apt-get indextargets`."""
    sources = set()
    for line in listed.splitlines():
        origin, codename, component, uri = line.split("|")
        base, _, pocket = codename.partition("-")
        if (origin, base, component) == ("Debian", here, "main") and pocket in ("", "updates", "security"):
            sources.add(f"deb {uri} {suite}{pocket and '-' + pocket} main")
    return sorted(sources)


def _mirror_hosts(sources: Sequence[str]) -> set[bytes]:
    """The host names of this machine's mirrors, which must not be in the image."""
    urls = [word for line in sources for word in line.split() if "://" in word]
    configured = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], text=True, capture_output=True
    ).stdout
    urls += [word for word in configured.replace("'", " ").split() if "://" in word]
    return {host.encode() for url in urls if (host := urlsplit(url).hostname)}


def _bootstrap(recipe: Recipe, sources: Sequence[str], root: Path) -> None:
    progress(f"Debian {recipe.suite} and {len(recipe.packages)} packages")
    run(
        [
            "mmdebstrap", "--quiet", "--mode=root", "--format=directory", "--variant=essential",
            f"--include={','.join(recipe.packages)}",
            *(f"--dpkgopt={option}" for option in NOT_UNPACKED),
            recipe.suite, root, *sources,
        ],
        env={**os.environ, "SOURCE_DATE_EPOCH": str(recipe.source_date_epoch)},
    )  # fmt: skip


def _python_version(root: Path) -> str:
    found = sorted(
        p.name.removeprefix("python") for p in (root / "usr/bin").glob("python3.*") if p.name[9:].isdigit()
    )
    if len(found) != 1:
        fail(f"expected one Python in the image, found {', '.join(found) or 'none'}; see packages in recipe.toml")
    return found[0]


def _run_in_image(root: Path, command: Sequence[str]) -> None:
    """Run a program of the image in a chroot, without network, in a pid namespace and with a clean environment."""
    namespaces = ["--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child"]
    environment = [f"{name}={value}" for name, value in CHROOT_ENVIRONMENT.items()]
    run(
        ["unshare", *namespaces, f"--mount-proc={root / 'proc'}",
         "chroot", root, "/usr/bin/env", "--ignore-environment", *environment, *command]
    )  # fmt: skip


def _install_requirements(recipe: Recipe, root: Path, scratch: Path) -> None:
    """Download with this machine's pip, because the chroot has no network; install with the image's pip, offline.

    Both check the hash of every package.
    """
    version = _python_version(root)
    pinned = sum(line[:1].isalnum() for line in recipe.requirements.read_text().splitlines())
    progress(f"{pinned} Python packages for Python {version}")
    wheels = scratch / "wheels"
    run(
        [
            sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--require-hashes",
            "--only-binary=:all:", f"--python-version={version}", f"--dest={wheels}",
            f"--requirement={recipe.requirements}",
        ]
    )  # fmt: skip
    inside = root / WHEELS.lstrip("/")
    shutil.copytree(wheels, inside)
    shutil.copy(recipe.requirements, inside)
    pip = next(inside.glob("pip-*.whl"), None)
    if pip is None:
        fail(f"{recipe.requirements} does not contain pip, which installs the other packages; add it")
    _run_in_image(
        root,
        [
            "/usr/bin/python3", f"{WHEELS}/{pip.name}/pip", "install", "--quiet", "--no-cache-dir",
            "--no-compile", "--no-deps", "--no-index", "--require-hashes", "--root-user-action=ignore",
            "--disable-pip-version-check", "--no-warn-script-location",
            f"--find-links={WHEELS}", f"--requirement={WHEELS}/requirements.txt",
        ],
    )  # fmt: skip
    shutil.rmtree(inside)


def _allow_pip(root: Path) -> None:
    """Allow pip to install for Debian's Python, for the system and by a user into ~/.local (PEP 668)."""
    _remove_matching(root, ["usr/lib/python3*/EXTERNALLY-MANAGED"])


def _add_user(recipe: Recipe, root: Path) -> None:
    """Add the user to passwd and group, and create the home directory.

    Without useradd, because it writes the day into /etc/shadow. `*` matches no password.
    """
    name, number = recipe.user, recipe.user_id
    home = root / recipe.home.lstrip("/")
    for file, line in (
        ("etc/passwd", f"{name}:*:{number}:{number}::{recipe.home}:/bin/bash"),
        ("etc/group", f"{name}:*:{number}:"),
    ):
        with (root / file).open("a") as stream:
            stream.write(line + "\n")
    shutil.copytree(root / "etc/skel", home)
    for directory in recipe.home_directories:
        (home / directory).mkdir(parents=True, exist_ok=True)


def _copy_files(recipe: Recipe, root: Path) -> None:
    """Copy files/ over the root, with the modes that git keeps, because others depend on the checkout's umask."""
    source = recipe.path / "files"
    if source.is_dir():
        shutil.copytree(source, root, symlinks=True, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for file in source.rglob("*"):
        target = root / file.relative_to(source)
        if not target.is_symlink():
            executable = target.is_dir() or file.stat().st_mode & 0o100
            target.chmod(0o755 if executable else 0o644)
    home = root / recipe.home.lstrip("/")
    for path in (home, *home.rglob("*")):
        os.chown(path, recipe.user_id, recipe.user_id, follow_symlinks=False)


def _remove_matching(root: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in list(root.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _tidy(recipe: Recipe, root: Path) -> None:
    """Remove the files that the recipe excludes and those that differ between builds."""
    _remove_matching(root, (*recipe.remove, *LEFTOVERS))
    for name, mode in MOUNT_POINTS.items():
        (root / name).mkdir(exist_ok=True)
        (root / name).chmod(mode)
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")


def _compile_python(root: Path) -> None:
    """Write byte code that is never checked against its source, because a slot cannot write to the image.

    With hashes and not times of the sources, and by one process, so that each build writes the same bytes: the marshal
    format shares constants with the files that the same process has compiled before.
    """
    progress("compiling Python")
    _remove_matching(root, ("usr/**/__pycache__",))
    folders = [
        f"/{path.relative_to(root)}"
        for path in sorted(root.glob("usr/**/python3*/"))
        if path.parent.name == "lib"
    ]
    _run_in_image(
        root,
        ["/usr/bin/python3", "-m", "compileall", "-qq", "--invalidation-mode", "unchecked-hash", *folders],
    )


def _check_finished(recipe: Recipe, root: Path) -> None:
    progress(f"checking: {recipe.check}")
    _run_in_image(root, ["/bin/sh", "-c", recipe.check])


def _check_private_data(root: Path, hosts: set[bytes]) -> None:
    for pattern in FORBIDDEN:
        if found := next(root.glob(pattern), None):
            fail(f"/{found.relative_to(root)} must not be in an image: it may be this machine's configuration")
    for top in ("etc", "home", "root", "usr/local/bin", "usr/local/etc", "var"):
        for path in (root / top).rglob("*"):
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                if named := [host for host in hosts if host in content]:
                    fail(f"/{path.relative_to(root)} contains the name of this machine's mirror {named[0].decode()}")
