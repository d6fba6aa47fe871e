# SPDX-License-Identifier: BSD-3-Clause
"""A root file system of Debian 13 for arm64, whose programs run by QEMU's user emulation.

The packages are unpacked and not configured, which takes a minute; under emulation the configuration would take an
hour. The emulator is registered in a binfmt_misc that belongs to a user namespace (Linux 6.7), so that nothing of this
machine changes. Run as a script, it enters the root: `machine.py ROOT CHECKOUT COMMAND…`. No system call filter can be
loaded there, because QEMU refuses prctl(PR_SET_SECCOMP).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
SUITE, PYTHON = "trixie", "3.13"
REQUIREMENTS = TOP / "images/minimal/requirements.txt"
QEMU = "/usr/bin/qemu-aarch64-static"
# binfmt_misc's format: the beginning of an ELF file for aarch64, and the mask of what is compared. Flag F opens the
# interpreter now, so that it need not be in the root.
MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
# Beside the dependencies of nbagent's packages: tests, and the programs that would be on any Debian.
PACKAGES = (
    "base-files", "bash", "coreutils", "dash", "findutils", "git", "grep", "gzip", "hostname", "libc-bin",
    "libnginx-mod-http-brotli-static", "python3-brotli", "python3-dnspython", "python3-hypothesis", "python3-pytest",
    "python3-websocket", "sed", "tar",
)
# Newest first: wheels for older C libraries run with Debian's.
PLATFORMS = (*(f"manylinux_2_{version}_aarch64" for version in range(41, 16, -1)), "manylinux2014_aarch64")
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
IDS = 65536


def build() -> Path:
    """The root, from the cache if its recipe is the same."""
    from testhost_driver import aptsources, rootfs

    packages = sorted({*rootfs.COMMON_PACKAGES, *PACKAGES})
    recipe = repr((SUITE, packages, PLATFORMS)) + REQUIREMENTS.read_text()
    cache = rootfs.cache()
    kept = cache / f"arm64-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"
    if kept.is_dir():
        return kept
    if not shutil.which("arch-test") or not Path(QEMU).exists():
        # Without binfmt-support, which would register the emulator for this machine.
        tools = ["arch-test", "mmdebstrap", "qemu-user-static"]
        subprocess.run(["apt-get", "-q", "-y", "--no-install-recommends", "install", *tools], check=True)
    with tempfile.TemporaryDirectory(prefix=".arm64-", dir=cache) as directory:
        root = Path(directory, "root")
        command = ["mmdebstrap", "--mode=root", "--architectures=arm64", "--variant=extract", "--format=directory",
                   f"--include={','.join(packages)}", '--aptopt=Apt::Install-Recommends "false"', SUITE, str(root), "-"]
        lines = "\n".join(aptsources.sources_lines(SUITE))
        subprocess.run(command, check=True, input=lines, text=True, capture_output=True)
        # As `images/build` installs them, with their hashes.
        wheels = Path(directory, "wheels")
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        pip = ["/usr/bin/python3", "-m", "pip", "download", "-q", "--no-deps", "--require-hashes",
               "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", "--abi",
               f"cp{PYTHON.replace('.', '')}", "--abi", "abi3", "--abi", "none", *platforms, "-d", str(wheels),
               "-r", str(REQUIREMENTS)]
        subprocess.run(pip, check=True, capture_output=True)
        site = root / f"usr/local/lib/python{PYTHON}/dist-packages"
        for wheel in wheels.iterdir():
            zipfile.ZipFile(wheel).extractall(site)
        for name in ("src", "proc", "dev", "var/pyc"):
            (root / name).mkdir(parents=True, exist_ok=True)
        root.rename(kept)
    return kept


def command(root: Path, *argv: str) -> list[str]:
    """The command that runs `argv` in the root, with the checkout at /src."""
    return [sys.executable, "-I", __file__, str(root), str(TOP), *argv]


def enter(root: str, checkout: str, argv: list[str]) -> None:
    """Executes `argv` in the root, in new user and mount namespaces."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def mount(source: str, target: str, kind: str = "", flags: int = 0) -> None:
        check(libc.mount(source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), None))

    parent = os.getpid()
    ready, mapped = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        # The maps of a user namespace with several ids can be written only from its parent.
        os.read(ready[0], 1)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{parent}/{name}").write_text(f"0 0 {IDS}")
        os.write(mapped[1], b"x")
        os._exit(0)
    check(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
    os.write(ready[1], b"x")
    os.read(mapped[0], 1)
    os.waitpid(child, 0)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    registry = f"{root}/var/tmp"
    mount("none", registry, "binfmt_misc")
    Path(registry, "register").write_text(f":aarch64:M::{MAGIC}:{MASK}:{QEMU}:OCPF")
    bind, recursive = 1 << 12, 1 << 14
    mount(checkout, f"{root}/src", flags=bind)
    mount("/proc", f"{root}/proc", flags=bind | recursive)
    mount("/dev", f"{root}/dev", flags=bind | recursive)
    os.chroot(root)
    os.chdir("/src")
    environment = {
        "HOME": "/root", "LANG": "C.UTF-8", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": "/src", "PYTHONPYCACHEPREFIX": "/var/pyc",
    }
    os.execvpe(argv[0], argv, environment)


if __name__ == "__main__":
    enter(sys.argv[1], sys.argv[2], sys.argv[3:])
