# SPDX-License-Identifier: BSD-3-Clause
"""OpenStack Swift on this machine, by its own API and S3's: a proxy, account, container and object server."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

PYTHON = "/usr/bin/python3"
PROGRAM = Path(__file__).with_name("swift_server.py")
ACCOUNT, USER, PASSWORD = "test", "tester", "testing"
PROXY_PORT = 18080
SERVERS = {"account-server": 18012, "container-server": 18011, "object-server": 18010}
COMMON = """[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = root
swift_dir = {directory}
devices = {directory}/devices
mount_check = false
log_address = /nonexistent
"""
PROXY = f"""[pipeline:main]
pipeline = catch_errors cache s3api tempauth copy container-quotas dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
paste.filter_factory = swift_server:filter_factory
[filter:s3api]
use = egg:swift#s3api
[filter:tempauth]
use = egg:swift#tempauth
user_{ACCOUNT}_{USER} = {PASSWORD} .admin
user_{ACCOUNT}_guest = {PASSWORD}
[filter:copy]
use = egg:swift#copy
[filter:container-quotas]
use = egg:swift#container_quotas
[filter:dlo]
use = egg:swift#dlo
"""


class Swift:
    """The account of a server that runs."""

    url = f"http://127.0.0.1:{PROXY_PORT}"

    def __init__(self) -> None:
        self._token = ""

    def call(self, method: str, path: str, headers: Mapping[str, str] = {}) -> int:
        """A request of Swift's API with the token of the administrator; the status."""
        if not self._token:
            login = {"X-Auth-User": f"{ACCOUNT}:{USER}", "X-Auth-Key": PASSWORD}
            with urllib.request.urlopen(urllib.request.Request(f"{self.url}/auth/v1.0", headers=login)) as answer:
                self._token = answer.headers["X-Auth-Token"]
        request = urllib.request.Request(
            f"{self.url}/v1/AUTH_{ACCOUNT}/{path}", method=method, headers={**headers, "X-Auth-Token": self._token})
        with urllib.request.urlopen(request) as answer:
            return int(answer.status)

    def public_url(self, container: str) -> str:
        """The address of a container without a token."""
        return f"{self.url}/v1/AUTH_{ACCOUNT}/{container}"

    def make_public(self, container: str, **headers: str) -> None:
        """Makes a container that everyone may read, from pages of every origin."""
        self.call("PUT", container, {
            "X-Container-Read": ".r:*", "X-Container-Meta-Access-Control-Allow-Origin": "*", **headers})

    def remotes(self, user: str = USER) -> dict[str, str]:
        """The environment with rclone's remotes `swift` and `s3`."""
        return {
            "RCLONE_CONFIG_SWIFT_TYPE": "swift", "RCLONE_CONFIG_SWIFT_AUTH": f"{self.url}/auth/v1.0",
            "RCLONE_CONFIG_SWIFT_USER": f"{ACCOUNT}:{user}", "RCLONE_CONFIG_SWIFT_KEY": PASSWORD,
            "RCLONE_CONFIG_S3_TYPE": "s3", "RCLONE_CONFIG_S3_PROVIDER": "Other",
            "RCLONE_CONFIG_S3_ENDPOINT": self.url, "RCLONE_CONFIG_S3_ACCESS_KEY_ID": f"{ACCOUNT}:{user}",
            "RCLONE_CONFIG_S3_SECRET_ACCESS_KEY": PASSWORD, "RCLONE_CONFIG": "/nonexistent",
        }


@contextlib.contextmanager
def swift(directory: Path) -> Iterator[Swift]:
    """Swift with its configuration and its files in `directory`, until the end of the block."""
    _configure(directory)
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    processes = []
    with contextlib.ExitStack() as stack:
        for name in ("proxy-server", *SERVERS):
            log = stack.enter_context((directory / f"{name}.log").open("w"))
            process = subprocess.Popen(
                [PYTHON, str(PROGRAM), str(directory / f"{name}.conf"), name],
                env=environment, stdout=log, stderr=log)
            processes.append(process)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        found = Swift()
        deadline_s = time.monotonic() + 120
        while True:
            try:
                found.call("PUT", "ready")
                break
            except OSError as error:
                if time.monotonic() > deadline_s or any(process.poll() is not None for process in processes):
                    logs = "\n".join(path.read_text()[-2000:] for path in sorted(directory.glob("*.log")))
                    raise RuntimeError(f"Swift does not answer: {error}\n{logs}") from error
                time.sleep(0.5)
        yield found


def _configure(directory: Path) -> None:
    (directory / "devices/d1").mkdir(parents=True)
    (directory / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = test\n")
    (directory / "proxy-server.conf").write_text(COMMON.format(port=PROXY_PORT, directory=directory) + PROXY)
    for name, port in SERVERS.items():
        kind = name.partition("-")[0]
        (directory / f"{name}.conf").write_text(
            f"{COMMON.format(port=port, directory=directory)}[pipeline:main]\npipeline = {name}\n"
            f"[app:{name}]\nuse = egg:swift#{kind}\n")
        subprocess.run([PYTHON, str(PROGRAM), "ring", str(directory / f"{kind}.ring.gz"), str(port)], check=True)
