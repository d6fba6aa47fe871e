# SPDX-License-Identifier: BSD-3-Clause
"""The sides of the comparison: this project by fork and by exec, and other ways to start a notebook server.

A side is opened, starts servers, ends them and is closed; while one is open, only this project's idle
services run beside it. A peer's preparations that need no user are made before its clock starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from client import TIMEOUT_S, Client, Server

from product import CACHE, Api, say, wait_complete
from testhost_driver import Host

HERE = Path(__file__).resolve().parent
PYTHON = "/usr/bin/python3"
OUT = CACHE / "bench"
ZYGOTE_READY = "MESSAGE_ID=c5f0b8c1b9a04d52a3d6c1b7f0d2a9e4"
# No claim of a burst times out, and only the side whose turn it is has a pool.
SETTINGS = f'[pool]\nwarm = 0\nclaim_timeout = "{TIMEOUT_S}s"\n[images.minimal]\nwarm = 1\n'
# Debian packages of the peers, beside those of every test host.
HUB_PACKAGES = ("nodejs",)
PACKAGES = ("crun", *HUB_PACKAGES, "podman")
FIRST_PORT = 20000
SPARE_USERS = 10
ZYGOTE_TIMEOUT_S = 60
NOTHING = r"(?!)"
SERVER = "jupyter lab --no-browser --ip=127.0.0.1 --port={port} --ServerApp.root_dir=/home/jovyan"
# The same limits as a slot's.
SYSTEMD_RUN = (
    "systemd-run --scope --quiet --collect --unit=peer-{number} "
    "-p MemoryMax=1G -p MemorySwapMax=0 -p CPUWeight=100 -p TasksMax=256 "
    "env -i HOME=/home/jovyan LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin "
    "/usr/sbin/chroot --userspec={user}:{user} /run/peer/{number}/root "
    f"{SERVER} --IdentityProvider.token={{token}}"
)
PODMAN = (
    "podman run --detach --rm --name=peer-{number} --network=host --uidmap=0:{base}:65536 --gidmap=0:{base}:65536 "
    "--memory=1g --pids-limit=256 --user=1000 --env=HOME=/home/jovyan --workdir=/home/jovyan --rootfs {root}:O "
    f"{SERVER} --IdentityProvider.token={{token}}"
)
MOUNTS = """
set -e
for n in $(seq 0 $(($2 - 1))); do
    at=/run/peer/$n
    mkdir -p $at && mount -t tmpfs -o size=512M,mode=0755 tmpfs $at && mkdir $at/upper $at/work $at/root
    mount -t overlay -o "lowerdir=$1,upperdir=$at/upper,workdir=$at/work" overlay $at/root
    mount --bind /proc $at/root/proc && mount --bind /dev $at/root/dev
    chmod 1777 $at/root/tmp
done
"""
# Podman's layers cannot be on the host's overlay; vfs suffices, because the root filesystem exists already.
PODMAN_STORAGE = """
set -e
mkdir -p /var/lib/containers && mount -t tmpfs -o size=50% tmpfs /var/lib/containers
printf '[storage]\\ndriver = "vfs"\\nrunroot = "/run/containers/storage"\\n' >/etc/containers/storage.conf
printf 'graphroot = "/var/lib/containers/storage"\\n' >>/etc/containers/storage.conf
podman info >/dev/null
"""


CLEAR_HUB = "rm -rf /run/bench-hub /run/jupyter-u*-singleuser && mkdir /run/bench-hub && systemctl reset-failed"


class Side(Protocol):
    """A side of the comparison. `slots` and `services` (for all users) are regular expressions of its units."""

    key: str
    name: str
    how: str
    slots: str
    services: str

    def open(self, count: int) -> None:
        """Prepares for `count` servers at once."""

    async def start(self, number: int, poll_s: float) -> Server:
        """Starts a server and returns when it responds with 200."""

    def end(self, keep: int = 0) -> None:
        """Ends all but the first `keep`, and returns when they have ended."""

    def close(self) -> None:
        """Removes everything that `open` made."""


class Ours:
    """This project: claims of one image, from an empty pool unless `warm` filled it."""

    slots = r"nbagent-(?!slots).*\.scope"

    def __init__(self, host: Host, client: Client, key: str, image: str) -> None:
        self.host, self.client, self.key, self.image, self.api = host, client, key, image, Api(host)
        self.name = f"nbagent, by {key}"
        self.how = (
            f"claims of an image with launch = \"{key}\", through gunicorn and nginx; the pool is empty, so a claim "
            "waits for a start, except in columns with a warm pool"
        )
        # A zygote serves the slots that are forked from it.
        zygotes = r"|nbagent-zygote@.*\.service" if key == "fork" else ""
        self.services = rf"nbagent(-api|-router|-network)?\.service{zygotes}"
        self._claimed: list[str] = []

    def open(self, count: int) -> None:
        self.configure(0, count)
        if self.key == "fork":
            wait_complete(self.host, self.image)

    def _zygotes(self) -> int:
        """The number of zygotes that became ready since the boot of the host."""
        output = self.host.run(["journalctl", "-q", "-t", "nbagent", "-o", "cat", ZYGOTE_READY], check=False)
        return len(output.stdout.splitlines())

    def _wait_zygote(self, count: int) -> None:
        """Waits until `count` zygotes were ready."""
        deadline_s = time.monotonic() + ZYGOTE_TIMEOUT_S
        while self._zygotes() < count:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"no zygote of image {self.image} was ready within {ZYGOTE_TIMEOUT_S} s")
            time.sleep(0.5)

    def replace_zygote(self, capacity: int, meanwhile: Callable[[], Any]) -> None:
        """Lets another zygote replace the present one, and runs `action` before it is ready."""
        before = self._zygotes()
        self.configure(0, capacity, zygote_slots=1)
        meanwhile()
        if self._zygotes() != before:
            raise RuntimeError("the next zygote was ready before the action ended")
        self._wait_zygote(before + 1)
        self.configure(0, capacity)

    def warm(self, count: int, capacity: int) -> None:
        """Fills the pool with `count` slots and returns when it is full and at rest."""
        self.configure(count, capacity)
        self._settle(lambda s: s["warm"] == min(count, capacity - s["claimed"]) and not s["starting"] + s["stopping"])

    async def start(self, number: int, poll_s: float) -> Server:
        server = await self.claim()
        await self.client.ready(server, poll_s)
        return server

    async def claim(self) -> Server:
        """Claims as a user does, and waits until the slot's server responds."""
        server = await self.client.claim(self.image)
        self.took(server)
        return server

    def took(self, server: Server) -> None:
        """Ends a slot that another client claimed, together with the others."""
        self._claimed.append(server.slot)

    def in_order(self, servers: list[Server]) -> None:
        """The slots in the order of their claims; `end` keeps the first."""
        self._claimed = [server.slot for server in servers]

    def end(self, keep: int = 0) -> None:
        for slot in self._claimed[keep:]:
            self.api.delete(f"/slots/{slot}")
        del self._claimed[keep:]
        self._settle(lambda s: s["claimed"] == keep and not s["stopping"])

    def close(self) -> None:
        self.end()
        self.configure(0, 1)
        self._settle(lambda s: not s["warm"] + s["starting"] + s["stopping"])

    def configure(self, warm: int, capacity: int, **pool: int) -> None:
        """Sets the sizes of the pool and of the host, and settings of all pools; the other image has no pool."""
        sizes = {"minimal": 0, "exec": 0, self.image: warm}
        settings = f"[slots]\ncapacity = {capacity}\n[pool]\n"
        settings += "".join(f"{name} = {value}\n" for name, value in pool.items())
        settings += "".join(f"[images.{image}]\nwarm = {number}\n" for image, number in sizes.items())
        self.host.run(["tee", "/etc/nbagent/conf.d/60-sizes.toml"], input=settings)
        self.host.run(["systemctl", "reload", "nbagent.service"])

    def _settle(self, what: Callable[[dict[str, Any]], bool]) -> None:
        """Waits until the stats match, and for the work that a start leaves behind."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while not what(stats := self.api.get("/stats").json()):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the pool did not settle: {stats}")
            time.sleep(0.1)
        time.sleep(0.3)


class Peers:
    """The common part of peers with one process for each server: a port and a token for each number."""

    services = NOTHING

    def __init__(self, host: Host, client: Client, root: str) -> None:
        self.host, self.client, self.root = host, client, root
        self._running: dict[int, subprocess.Popen[Any]] = {}

    async def _start(self, number: int, poll_s: float, command: str, **values: object) -> Server:
        server = Server(f"http://127.0.0.1:{FIRST_PORT + number}/", secrets.token_hex(16), str(number))
        words = command.format(number=number, port=FIRST_PORT + number, token=server.token, **values).split()
        self._running[number] = self.host.popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        await self.client.ready(server, poll_s)
        return server

    def _reap(self, keep: int) -> list[int]:
        """The numbers of servers to end; their processes are reaped."""
        ended = [number for number in self._running if number >= keep]
        for number in ended:
            process = self._running.pop(number)
            process.kill()
            process.wait()
        return ended


class SystemdRun(Peers):
    """`systemd-run --scope … jupyter lab`: the way to start a server without an agent."""

    key, name, slots = "systemd-run", "systemd-run", r"peer-.*\.scope"

    def __init__(self, host: Host, client: Client, root: str, user: str, count: int) -> None:
        super().__init__(host, client, root)
        self.user = user
        self.how = (
            "the same image under an overlay on a tmpfs, made before its clock starts, with the host's /proc and /dev "
            "and no namespaces: " + SYSTEMD_RUN.format(user="ID", number="N", port="PORT", token="TOKEN")
        )
        host.run(["sh", "-c", MOUNTS, "mounts", root, str(count)])

    def open(self, count: int) -> None: ...

    async def start(self, number: int, poll_s: float) -> Server:
        return await self._start(number, poll_s, SYSTEMD_RUN, user=self.user)

    def end(self, keep: int = 0) -> None:
        for number in self._reap(keep):
            self.host.run(["systemctl", "kill", "--signal=KILL", f"peer-{number}.scope"], check=False)
        time.sleep(0.5)

    def close(self) -> None:
        self.end()


class Podman(Peers):
    """`podman run` of the same tree."""

    key, name, slots = "podman", "podman run", r"libpod.*\.scope"

    def __init__(self, host: Host, client: Client, root: str, base: str) -> None:
        super().__init__(host, client, root)
        self.base = base
        self.how = (
            "Debian's podman with crun; the same image, its owners' ids as they are, podman's overlay above it on a "
            "tmpfs: " + PODMAN.format(base="BASE", root="ROOT", number="N", port="PORT", token="TOKEN")
        )

    def open(self, count: int) -> None:
        if self.host.run(["mountpoint", "-q", "/var/lib/containers"], check=False).returncode:
            self.host.run(["sh", "-c", PODMAN_STORAGE])
        trial = PODMAN.format(number="trial", port=1, token="none", base=self.base, root=self.root).split()
        words = [word for word in trial[: trial.index("jupyter")] if word != "--detach"]
        self.host.run([*words, "true"])

    async def start(self, number: int, poll_s: float) -> Server:
        return await self._start(number, poll_s, PODMAN, base=self.base, root=self.root)

    def end(self, keep: int = 0) -> None:
        names = [f"peer-{number}" for number in self._reap(keep)]
        if names:
            self.host.run(["podman", "rm", "--force", "--ignore", "--time=0", *names], timeout=TIMEOUT_S)

    def close(self) -> None:
        self.end()


class Hub:
    """JupyterHub with one of its spawners, and its default proxy."""

    url = "http://127.0.0.1:8100"

    def __init__(self, host: Host, client: Client, spawner: str) -> None:
        self.host, self.client = host, client
        local = spawner == "local"
        self.key = f"hub-{spawner}"
        self.name = "JupyterHub, local" if local else "JupyterHub, systemd"
        self.spawner = "jupyterhub.spawner.LocalProcessSpawner" if local else "systemd"
        self.how = (
            ("LocalProcessSpawner, with system users made before" if local else "SystemdSpawner with dynamic_users")
            + ", mem_limit 1G, configurable-http-proxy; POST users/N/server, then the progress events until it is "
            "ready, and the first 200 through the proxy. Its JupyterLab is that of the image, for the host's Python "
            "(tests/bench/hub)"
        )
        self.slots = NOTHING if local else r"jupyter-.*\.service"
        self.services = r"bench-hub\.service"
        self._users: list[str] = []
        self._running: dict[int, str] = {}

    def open(self, count: int) -> None:
        self.at = install_hub(self.host)
        self.token = secrets.token_hex(16)
        # Each start has a user of its own, because a dynamic user's directory in /run stays as a dangling link, and
        # SystemdSpawner 1.0.2 fails on it when it starts the same user again.
        self._users = [f"u{number}" for number in range(count + SPARE_USERS)]
        users = "for name; do id -u $name >/dev/null 2>&1 || useradd --create-home $name; done"
        if self.spawner != "systemd":
            self.host.run(["sh", "-c", users, "users", *self._users], timeout=TIMEOUT_S)
        self.host.run(["sh", "-c", CLEAR_HUB])
        environment = {
            "BENCH_AT": str(self.at), "BENCH_SPAWNER": self.spawner, "BENCH_TOKEN": self.token,
            "PATH": f"{self.at}/hub/bin:/usr/local/bin:/usr/bin:/bin",
        }
        self.host.run([
            "systemd-run", "--unit=bench-hub", "--collect", "-p", "WorkingDirectory=/run/bench-hub",
            *(f"--setenv={name}={value}" for name, value in environment.items()),
            f"{self.at}/hub/bin/jupyterhub", "-f", f"{self.at}/jupyterhub_config.py",
        ])
        self.client.run(self._open())

    async def _open(self) -> None:
        deadline_s = time.monotonic() + 60
        names = {"usernames": self._users}
        while time.monotonic() < deadline_s:
            with contextlib.suppress(aiohttp.ClientError, RuntimeError):
                await self._call("GET", "", 200)
                await self._call("POST", "users", 201, json=names)
                return
            await asyncio.sleep(0.2)
        journal = self.host.run(["journalctl", "-u", "bench-hub", "-n", "15", "--no-pager", "-o", "cat"]).stdout
        raise RuntimeError(f"the hub does not respond: {journal}")

    async def _call(self, method: str, path: str, *expected: int, **options: Any) -> int:
        url = f"{self.url}/hub/api/{path}"
        async with self.client.http.request(method, url, headers=self._headers, **options) as answer:
            text = await answer.text()
        if answer.status not in expected:
            raise RuntimeError(f"{method} {path}: {answer.status} {text[:300]}")
        return answer.status

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"token {self.token}"}

    async def start(self, number: int, poll_s: float) -> Server:
        user = self._running[number] = self._users.pop()
        if await self._call("POST", f"users/{user}/server", 201, 202) == 202:
            await self._progress(user)
        server = Server(f"{self.url}/user/{user}/", self.token, user)
        await self.client.ready(server, poll_s)
        return server

    async def _progress(self, user: str) -> None:
        """Waits for the event that the server is ready or has failed, without polling."""
        url = f"{self.url}/hub/api/users/{user}/server/progress"
        async with self.client.http.get(url, headers=self._headers) as events:
            async for line in events.content:
                event = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if event.get("failed"):
                    raise RuntimeError(f"{user}: {event['message']}")
                if event.get("ready"):
                    return
        raise RuntimeError(f"{user}: no event `ready`")

    def end(self, keep: int = 0) -> None:
        numbers = [number for number in self._running if number >= keep]
        self.client.run(self.stop([self._running.pop(number) for number in numbers]))

    async def stop(self, users: list[str]) -> None:
        """Ends the servers of users, and returns when they have ended."""
        async def one(user: str) -> None:
            await self._call("DELETE", f"users/{user}/server", 202, 204, 400)
            # 400: another action is pending, or there is no server. The user is polled until there is none, which
            # takes as long as systemd waits for a server that ignores SIGTERM, as one of fifty does.
            url = f"{self.url}/hub/api/users/{user}"
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    async with self.client.http.get(url, headers=self._headers) as got:
                        model = await got.json()
                    if not model.get("servers") and not model.get("pending"):
                        return
                    await asyncio.sleep(0.2)

        await asyncio.gather(*map(one, users))

    def close(self) -> None:
        """Ends the hub, and with it the remaining servers."""
        self._running.clear()
        self.host.run(["systemctl", "stop", "bench-hub.service", "jupyter-u*.service"], check=False, timeout=TIMEOUT_S)


def install_hub(host: Host) -> Path:
    """Installs JupyterHub (PyPI) and its proxy (npm) at the same path on the host as in this machine's cache."""
    at = built_hub()
    if host.run(["test", "-e", str(at)], check=False).returncode:
        host.run(["mkdir", "-p", str(at.parent)])
        host.copy_in(str(at), str(at.parent))
    return at


def built_hub() -> Path:
    """Builds it once, and again when the requirements change."""
    recipe = b"".join(path.read_bytes() for path in sorted((HERE / "hub").iterdir()) if path.is_file())
    # The cache may be a symbolic link, and the installed files contain their resolved path.
    at = (CACHE / f"bench-hub-{hashlib.sha256(recipe).hexdigest()[:16]}").resolve()
    if (at / "ready").exists():
        return at
    say("installing JupyterHub and its proxy, once")
    shutil.rmtree(at, ignore_errors=True)
    at.mkdir(parents=True)
    proxy = (HERE / "hub/proxy").read_text().split()
    for command in (
        [PYTHON, "-m", "venv", str(at / "hub")],
        [str(at / "hub/bin/python"), "-m", "pip", "install", "-q", "-r", str(HERE / "hub/requirements.txt")],
        ["npm", "install", "--prefix", str(at / "proxy"), "--no-audit", "--no-fund", *proxy],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-500:]}")
    shutil.copy(HERE / "hub/jupyterhub_config.py", at)
    at.chmod(0o755)
    (at / "ready").touch()
    for old in at.parent.glob("bench-hub-*"):
        if old != at:
            shutil.rmtree(old, ignore_errors=True)
    return at


# Beside minimal an image of the same tree with launch = "exec" in its manifest: the package's archive as the only
# layer of a container image, because such an image takes an external manifest.
EXEC_IMAGE = r"""
import hashlib, json, os, pathlib, re, subprocess, sys
top = pathlib.Path("/root/exec-image")
blobs = top / "blobs/sha256"
blobs.mkdir(parents=True)
def put(content):
    digest = hashlib.sha256(content).hexdigest()
    (blobs / digest).write_bytes(content)
    return {"digest": "sha256:" + digest, "size": len(content)}
archive = pathlib.Path("/usr/share/nbagent/images/minimal.tar.zst").read_bytes()
layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar+zstd", **put(archive)}
config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}, "config": {}}
config = {"mediaType": "application/vnd.oci.image.config.v1+json", **put(json.dumps(config).encode())}
kind = "application/vnd.oci.image.manifest.v1+json"
manifest = {"schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer]}
chosen = {"mediaType": kind, **put(json.dumps(manifest).encode())}
(top / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [chosen]}))
(top / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
manifest = (pathlib.Path(sys.argv[1]) / "etc/nbagent-image.toml").read_text()
manifest = re.sub(r"(?ms)^preload\s*=\s*\[.*?\]$|^launch\s*=[^\n]*$", "", manifest)
pathlib.Path("/root/exec.toml").write_text('launch = "exec"\n' + manifest)
command = ["nbagent", "image", "import", "--name", "exec", "--manifest", "/root/exec.toml", f"oci:{top}"]
subprocess.run(command, check=True)
"""


def add_exec_image(host: Host, root: str) -> None:
    """Image `exec` beside `minimal`."""
    host.run(["python3", "-", root], input=EXEC_IMAGE, timeout=TIMEOUT_S)


def image(host: Host, name: str) -> dict[str, Any]:
    """The record of an image in the store."""
    found: list[dict[str, Any]] = json.loads(host.run(["nbagent", "image", "list", "--json"]).stdout)
    return next(entry for entry in found if entry["name"] == name)
