"""The peer: what `systemd-run --scope … jupyter lab` gives without an agent, from the same image.

Each of its users has the image under an overlay on a tmpfs, as a slot has, with the host's /proc
and /dev, and `chroot` for its user: no namespaces. All that is made before any clock starts.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from hosts import Host
from notebook import Notebook
from product import Api

FIRST_PORT = 20000
READY_TIMEOUT_S = 120
POLL_S = 0.005
# The same limits as a slot's.
COMMAND = (
    "systemd-run --scope --quiet --collect -p MemoryMax=1G -p MemorySwapMax=0 -p CPUWeight=100 -p TasksMax=256 "
    "env -i HOME=/home/jovyan LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin "
    "/usr/sbin/chroot --userspec={user}:{user} {root} "
    "jupyter lab --no-browser --ip=127.0.0.1 --port={port} --ServerApp.root_dir=/home/jovyan "
    "--IdentityProvider.token={token}"
)
_MOUNTS = """
set -e
image=$(echo /var/lib/nbagent/images/sha256-*/rootfs)
id=$(stat -c %u "$image/home/jovyan")
for n in $(seq 0 $(($1 - 1))); do
    at=/run/peer/$n
    mkdir -p $at && mount -t tmpfs -o size=512M,mode=0755 tmpfs $at && mkdir $at/upper $at/work $at/root
    mount -t overlay -o "lowerdir=$image,upperdir=$at/upper,workdir=$at/work" overlay $at/root
    mount --bind /proc $at/root/proc && mount --bind /dev $at/root/dev
    chmod 1777 $at/root/tmp
done
echo $id
"""


class PeerNotebook(Notebook):
    """A person at a peer's notebook, by its own port; there is no router."""

    def __init__(self, host: Host, port: int, token: str) -> None:
        self.host, self.slot, self.token, self.base = host, "", token, "/"
        self.router = Api(host, port)
        self.headers = {"Authorization": f"token {token}"}


class Peers:
    """The peers of one host, each with a number, a port and a scope."""

    def __init__(self, host: Host, count: int) -> None:
        self.host = host
        self.user = host.run(["sh", "-c", _MOUNTS, "mounts", str(count)]).stdout.strip()

    @contextlib.contextmanager
    def running(self, number: int) -> Iterator[PeerNotebook]:
        """Starts a peer, returns when it answers 200, and ends it afterwards."""
        process, notebook = self.start(number)
        try:
            wait_ready(process, notebook)
            yield notebook
        finally:
            self.end(number, process)

    def start(self, number: int) -> tuple[subprocess.Popen[Any], PeerNotebook]:
        """Starts a peer and does not wait for it."""
        notebook = PeerNotebook(self.host, FIRST_PORT + number, secrets.token_hex(16))
        command = COMMAND.format(
            user=self.user, root=f"/run/peer/{number}/root", port=notebook.router.port, token=notebook.token
        ).split()
        process = self.host.popen(
            [*command[:2], f"--unit=peer-{number}", *command[2:]],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        return process, notebook

    def end(self, number: int, process: subprocess.Popen[Any]) -> None:
        """Ends a peer with all its processes."""
        self.host.run(["systemctl", "kill", "--signal=KILL", f"peer-{number}.scope"], check=False)
        process.kill()
        process.wait()


def wait_ready(process: subprocess.Popen[Any], notebook: PeerNotebook) -> None:
    """Returns when the server answers 200; it cannot be waited for, so it is asked again and again."""
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise RuntimeError(f"the peer on port {notebook.router.port} ended with status {process.returncode}")
        with contextlib.suppress(OSError):
            if notebook.router.get("/api").status == 200:
                return
        time.sleep(POLL_S)
    raise TimeoutError(f"the peer on port {notebook.router.port} does not answer")
