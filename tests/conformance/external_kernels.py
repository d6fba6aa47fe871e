# SPDX-License-Identifier: BSD-3-Clause
"""A plugin of pytest: ipykernel's own tests with kernels that a running server starts, instead of ones of their own.

The environment names the server: CONFORMANCE_SOCKET, a unix socket that leads to it, because this process is in the
kernels' network, which may have no other way to the server; CONFORMANCE_PATH, its base URL; CONFORMANCE_TOKEN.
CONFORMANCE_RESULTS is the file that gets {test: [outcome, text]} as JSON.

A test that starts a kernel with arguments, or waits for the end of its process, is skipped: the server starts a kernel
again that has ended.

Runs under the image's own Python.
"""

import contextlib
import http.client
import json
import os
import socket

import pytest
from jupyter_client import manager
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_core.paths import jupyter_runtime_dir
from traitlets import Unicode
from traitlets.config import Configurable

HEADERS = {"Authorization": f"token {os.environ['CONFORMANCE_TOKEN']}"}
RESULTS = {}


def call(method, path):
    """A request to the server; its JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(os.environ["CONFORMANCE_SOCKET"])
    with contextlib.closing(connection):
        connection.request(method, os.environ["CONFORMANCE_PATH"] + path, headers=HEADERS)
        response = connection.getresponse()
        content = response.read()
    assert response.status < 400, (method, path, response.status, content)
    return json.loads(content) if content else None


class ServersKernel(Configurable):
    """In the place of a KernelManager."""

    id = Unicode()

    def interrupt_kernel(self):
        call("POST", f"api/kernels/{self.id}/interrupt")

    def shutdown_kernel(self, now=False):
        call("DELETE", f"api/kernels/{self.id}")

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        pytest.skip(f"{name} is of a manager in the test's process")


class Client(BlockingKernelClient):
    # By the heartbeat a kernel counts as dead whose start takes some seconds, on a busy machine.
    async def _async_is_alive(self):
        return True


def start_new_kernel(startup_timeout=60, **options):
    if options.get("extra_arguments"):
        pytest.skip("the kernel's program gets arguments")
    kernel = ServersKernel(id=call("POST", "api/kernels")["id"])
    client = Client(parent=kernel)
    client.load_connection_file(os.path.join(jupyter_runtime_dir(), f"kernel-{kernel.id}.json"))
    client.start_channels()
    client.wait_for_ready(timeout=startup_timeout)
    return kernel, client


@contextlib.contextmanager
def run_kernel(**options):
    kernel, client = start_new_kernel(**options)
    try:
        yield client
    finally:
        client.stop_channels()
        kernel.shutdown_kernel()


manager.start_new_kernel, manager.run_kernel = start_new_kernel, run_kernel


def pytest_addoption(parser):
    # Of pytest-cov, by which some tests skip themselves.
    parser.addoption("--cov", action="append", default=[])


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        former = RESULTS.get(report.nodeid, ["passed", ""])
        if former[0] != "failed":
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
            RESULTS[report.nodeid] = [report.outcome, text[-3000:]]


def pytest_sessionfinish():
    with open(os.environ["CONFORMANCE_RESULTS"], "w") as file:
        json.dump(RESULTS, file)
