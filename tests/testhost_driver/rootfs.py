# SPDX-License-Identifier: BSD-3-Clause
"""Root filesystems of test hosts: built once by mmdebstrap, cached by a hash of their recipe.

A recipe is a suite, a role (the driver it is for), a package list and what is done to the tree. `held()`
gives the path of the finished build and keeps it from being pruned while the caller sets up; a build appears
under its final name only when it is whole. A host never writes to a build, because it has an overlay layer of its own
above it.

The role `nspawn` is a directory. The role `vm` is a directory with `root.ext4`, `vmlinuz` and `initrd.img`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from testhost_driver import aptsources, state
from testhost_driver.errors import BuildFailed

# The dependencies of the .debs are in every host, so that `apt install ./x.deb` needs no network.
# fmt: off
COMMON_PACKAGES = [
    "ca-certificates", "curl", "dbus", "dnsmasq-base", "gunicorn", "haproxy", "iproute2", "kmod", "less",
    "lsof", "man-db", "nftables", "nginx", "procps", "python3", "python3-attr", "python3-cattr",
    "python3-click", "python3-flask", "python3-h11", "python3-nftables", "python3-prometheus-client", "python3-psutil",
    "python3-pyroute2", "python3-pystemd", "python3-rich", "python3-seccomp", "python3-systemd", "skopeo",
    "strace", "systemd-sysv", "umoci", "util-linux", "zstd",
]
# fmt: on
ROLE_PACKAGES = {
    "nspawn": [],
    # apparmor, because the kernel's package recommends it, so that every Debian has it.
    "vm": ["apparmor", "initramfs-tools", "linux-image-cloud-amd64", "openssh-server", "udev"],
}
MMDEBSTRAP = ["mmdebstrap", "--mode=root", "--variant=apt", "--format=directory", "--verbose"]
MKE2FS = ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-L", "testhost"]
DISK_SIZE = "8G"  # sparse

# Runs on this machine after the packages are in, with the tree as $1.
COMMON_SETUP = r"""
set -eu
cd "$1"
: > etc/machine-id            # empty: a new one at each boot, and no "first boot" that would preset every unit
rm -f etc/hostname etc/resolv.conf
printf '127.0.0.1 localhost\n::1 localhost\n' > etc/hosts
echo 'LANG=C.UTF-8' > etc/default/locale
: > etc/apt/sources.list      # a test host is offline; what it installs resolves from what is there
rm -rf etc/apt/sources.list.d/* var/lib/apt/lists/* var/cache/apt/*.bin
mkdir -p etc/systemd/journald.conf.d
printf '[Journal]\nStorage=volatile\nRateLimitIntervalSec=0\n' > etc/systemd/journald.conf.d/testhost.conf

# Commands of `testhost exec` are in this unit's cgroup: it is delegated, so that systemd leaves what is in it
# alone, and it is not init.scope, so that what they use is not PID 1's.
cat > etc/systemd/system/testhost-exec.service <<'UNIT'
[Unit]
Description=Commands run from outside by testhost exec
DefaultDependencies=no
[Service]
Delegate=yes
ExecStart=sleep infinity
KillMode=process
TasksMax=infinity
[Install]
WantedBy=basic.target
UNIT
systemctl --root="$1" enable --quiet testhost-exec.service

# Distributors' maintenance would wake up in the middle of a measurement.
systemctl --root="$1" mask --quiet apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer man-db.timer systemd-tmpfiles-clean.timer
# Ours are nbagent-router.service and the gateway; the distribution's would only take their ports.
systemctl --root="$1" disable --quiet nginx.service haproxy.service
"""
ROLE_SETUP = {
    "nspawn": r"""
# The last four would mount the machine's own debugfs, tracefs and huge pages into the host.
systemctl --root="$1" mask --quiet console-getty.service getty@.service getty.target \
    sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount dev-hugepages.mount
""",
    "vm": r"""
# None of these has anything to do in a virtual machine without devices, and each costs a second where it is
# emulated.
systemctl --root="$1" mask --quiet getty@.service serial-getty@.service getty.target \
    modprobe@drm.service modprobe@efi_pstore.service modprobe@fuse.service modprobe@loop.service \
    modprobe@dm_mod.service systemd-binfmt.service systemd-pstore.service systemd-hwdb-update.service \
    sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount dev-hugepages.mount
printf 'MODULES=list\nCOMPRESS=zstd\nCOMPRESSLEVEL=1\n' > etc/initramfs-tools/conf.d/testhost
printf 'virtio_pci\nvirtio_blk\next4\n' >> etc/initramfs-tools/modules
chroot "$1" update-initramfs -u -k all
mkdir -p etc/ssh/sshd_config.d etc/systemd/system/ssh.service.d etc/modules-load.d
printf 'MaxSessions 1000\nMaxStartups 1000\nUseDNS no\nPrintMotd no\n' > etc/ssh/sshd_config.d/testhost.conf
printf '[Service]\nTasksMax=infinity\n' > etc/systemd/system/ssh.service.d/testhost.conf
cat > etc/systemd/system/testhost-identity.service <<'UNIT'
[Unit]
Description=Take the address and the ssh key of this test host from the kernel's command line
DefaultDependencies=no
After=systemd-remount-fs.service systemd-udevd.service
Before=ssh.service basic.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/lib/testhost/identity
[Install]
WantedBy=basic.target
UNIT
cat > etc/systemd/system/testhost-ready.service <<'UNIT'
[Unit]
Description=Tell the machine that ssh answers
After=ssh.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=sh -c 'echo testhost-ready > /dev/ttyS1'
[Install]
WantedBy=multi-user.target
UNIT
mkdir -p usr/lib/testhost
cat > usr/lib/testhost/identity <<'SCRIPT'
#!/bin/sh
set -eu
for word in $(cat /proc/cmdline); do
    case $word in
        testhost.key=*) key=${word#testhost.key=} ;;
        systemd.hostname=*) name=${word#systemd.hostname=} ;;
    esac
done
install -d -m 700 /root/.ssh
echo "$key" | base64 -d > /root/.ssh/authorized_keys
echo "$name" > /etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 %s\n::1 localhost\n' "$name" > /etc/hosts
modprobe virtio_net
until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
ip address add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip route add default via 10.0.2.2
SCRIPT
chmod 755 usr/lib/testhost/identity
systemctl --root="$1" enable --quiet testhost-identity.service testhost-ready.service
""",
}
# Podman would look for containers to start and to update, and fail where there is no network.
EXTRA_SETUP = r"""
systemctl --root="$1" mask --quiet podman.socket podman-auto-update.timer podman-auto-update.service \
    podman-restart.service
"""


@dataclasses.dataclass(frozen=True)
class Recipe:
    suite: str
    role: str
    extra: tuple[str, ...] = ()  # packages of the benchmarks' hosts

    @property
    def kind(self) -> str:
        # A new build prunes older builds of its kind, so a recipe with extra packages is a kind of its own.
        return f"{'more-' if self.extra else ''}{self.role}-{self.suite}"

    @property
    def packages(self) -> list[str]:
        return sorted({*COMMON_PACKAGES, *ROLE_PACKAGES[self.role], *self.extra})

    @property
    def setup(self) -> str:
        return COMMON_SETUP + ROLE_SETUP[self.role] + (EXTRA_SETUP if self.extra else "")

    @property
    def digest(self) -> str:
        setup = [line for line in self.setup.splitlines() if not line.startswith("#")]
        text = json.dumps([self.suite, self.role, self.packages, setup, MMDEBSTRAP, MKE2FS, DISK_SIZE])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        return cache() / f"{self.kind}-{self.digest}"


def cache() -> Path:
    """$NBAGENT_CACHE, for all that tests keep. An empty value is as none, because it would be the working directory."""
    return Path(os.environ.get("NBAGENT_CACHE") or "/var/cache/nbagent-build")


@contextlib.contextmanager
def held(recipe: Recipe, say: Callable[[str], None]) -> Iterator[Path]:
    """The finished build, made now if it is missing. It is not pruned within the block, nor while a state names it."""
    lock = cache() / f".{recipe.kind}.lock"
    if not recipe.path.is_dir():
        with state.locked(lock):
            if not recipe.path.is_dir():
                _build(recipe, say)
                _prune(recipe)
    with state.locked(lock, shared=True):
        if not recipe.path.is_dir():
            raise BuildFailed(f"{recipe.path} was removed just now; run the command again")
        yield recipe.path


def _build(recipe: Recipe, say: Callable[[str], None]) -> None:
    started = time.monotonic()
    say(f"building the {recipe.suite} root filesystem for {recipe.role}, once (about a minute)")
    # The leading dot marks an incomplete build; the next prune removes the remains of a builder that died.
    temporary = Path(tempfile.mkdtemp(prefix=f".{recipe.kind}-", dir=cache()))
    try:
        tree = temporary / "tree"
        _bootstrap(recipe, tree, temporary / "log")
        if recipe.role == "vm":
            _make_disk(tree, temporary / "whole")
        else:
            tree.rename(temporary / "whole")
        (temporary / "whole").rename(recipe.path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"built {recipe.path} in {time.monotonic() - started:.0f} s")


def _bootstrap(recipe: Recipe, tree: Path, log: Path) -> None:
    tree.parent.joinpath("setup").write_text("#!/bin/sh\n" + recipe.setup)
    tree.parent.joinpath("setup").chmod(0o755)
    argv = [*MMDEBSTRAP, f"--include={','.join(recipe.packages)}", '--aptopt=Apt::Install-Recommends "false"']
    argv += [f"--aptopt={option}" for option in aptsources.proxy_options()]
    argv += [f"--customize-hook={tree.parent / 'setup'}"]
    argv += ['--customize-hook=rm -f "$1"/etc/apt/apt.conf.d/99mmdebstrap', recipe.suite, str(tree)]
    with open(log, "wb") as output:
        done = subprocess.run(
            [*argv, *aptsources.sources_lines(recipe.suite)],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    if done.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise BuildFailed(f"mmdebstrap of {recipe.suite} ended with status {done.returncode}:\n{end}")


def _make_disk(tree: Path, whole: Path) -> None:
    whole.mkdir()
    for link, name in (("vmlinuz", "vmlinuz"), ("initrd.img", "initrd.img")):
        (target,) = (tree / "boot").glob(f"{link}-*")
        shutil.copyfile(target, whole / name)
    argv = [*MKE2FS, "-d", str(tree), str(whole / "root.ext4"), DISK_SIZE]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        raise BuildFailed(f"mke2fs: {done.stderr.strip()}")


def _prune(recipe: Recipe) -> None:
    """Remove older recipes' builds of the same kind, except those that a host uses."""
    # A host may have found its build by a link in a cache of its own.
    used = {Path(found.tree).resolve() for name in state.names() if (found := state.load(name))}
    for path in cache().glob(f"{recipe.kind}-*"):
        if path != recipe.path and path.resolve() not in used:
            shutil.rmtree(path, ignore_errors=True)
    for path in cache().glob(f".{recipe.kind}-*"):  # the lock is held, so no builder runs
        shutil.rmtree(path, ignore_errors=True)
