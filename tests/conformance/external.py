# SPDX-License-Identifier: BSD-3-Clause
"""A plugin of pytest: jupyter_server's own tests against a server that runs already, instead of one in their process.

The environment names the server: CONFORMANCE_URL, the address of its base URL; CONFORMANCE_TOKEN; CONFORMANCE_ROOT, its
root directory, which this process sees at the same path and whose files it deletes before each test.
CONFORMANCE_RESULTS is the file that gets {test: [outcome, text]} as JSON.

A test that uses objects of the server's process is skipped. Tests that are repeated with other settings of the server
run once.

Runs under the image's own Python.
"""

import json
import os
import shutil
import urllib.parse
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from jupyter_server.utils import url_path_join
from tornado.escape import url_escape
from tornado.httpclient import HTTPRequest
from tornado.simple_httpclient import SimpleAsyncHTTPClient
from tornado.websocket import websocket_connect

URL = os.environ["CONFORMANCE_URL"]
TOKEN = os.environ["CONFORMANCE_TOKEN"]
ROOT = Path(os.environ["CONFORMANCE_ROOT"])
SETTINGS = ("jp_server_config", "jp_argv")
RESULTS = {}


def call(method, path):
    """A request to the server; its JSON."""
    headers = {"Authorization": f"token {TOKEN}"}
    request = urllib.request.Request(URL + path, None, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as response:
        content = response.read()
    return json.loads(content) if content else None


class Inside:
    """An object of the server's process: using it skips the test."""

    def __init__(self, **known):
        self.__dict__.update(known)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        pytest.skip(f"{name} is in the server's process")

    def __setattr__(self, name, value):
        pytest.skip(f"{name} is in the server's process")


class Fixtures:
    """The fixtures that replace those of pytest-jupyter: a plugin of its own."""

    @pytest.fixture(autouse=True)
    def jp_server_cleanup(self, jp_asyncio_loop):
        for path in ROOT.iterdir():
            # Jupyter's and IPython's own directories stay.
            if path.name not in (".local", ".ipython", ".cache", ".bashrc", ".profile"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.rmtree(ROOT / ".local/share/jupyter/kernels", ignore_errors=True)
        yield
        for kind, key in (("api/sessions", "id"), ("api/kernels", "id"), ("api/terminals", "name")):
            for known in call("GET", kind):
                call("DELETE", f"{kind}/{known[key]}")

    @pytest.fixture
    def jp_root_dir(self):
        return ROOT

    @pytest.fixture
    def jp_data_dir(self):
        return ROOT / ".local/share/jupyter"

    @pytest.fixture
    def jp_base_url(self):
        return urllib.parse.urlsplit(URL).path

    @pytest.fixture
    def jp_http_port(self):
        return urllib.parse.urlsplit(URL).port

    @pytest.fixture
    def jp_auth_header(self):
        return {"Authorization": f"token {TOKEN}"}

    @pytest.fixture
    def jp_configurable_serverapp(self):
        pytest.skip("the test starts a server of its own")

    @pytest.fixture
    def jp_web_app(self):
        pytest.skip("the application is in the server's process")

    @pytest.fixture
    def jp_serverapp(self, jp_base_url):
        kernels = Inside(use_pending_kernels=False)
        return Inside(root_dir=str(ROOT), base_url=jp_base_url, token=TOKEN, kernel_manager=kernels)

    @pytest.fixture
    def http_server_client(self, jp_asyncio_loop):
        class Client(SimpleAsyncHTTPClient):
            def fetch(self, path, **options):
                return super().fetch(f"http://127.0.0.1:{urllib.parse.urlsplit(URL).port}{path}", **options)

        async def client():
            return Client()

        with closing(jp_asyncio_loop.run_until_complete(client())) as made:
            yield made

    @pytest.fixture
    def jp_ws_fetch(self, jp_asyncio_loop, jp_auth_header, jp_base_url, jp_http_port):
        def fetch(*parts, headers=None, params=None, **_):
            path = url_path_join(jp_base_url, url_escape(url_path_join(*parts), plus=False))
            url = f"ws://127.0.0.1:{jp_http_port}{path}?{urllib.parse.urlencode(params or {})}"
            headers = {**jp_auth_header, **(headers or {})}
            return websocket_connect(HTTPRequest(url, headers=headers, connect_timeout=60))

        return fetch


def pytest_collection(session):
    # After the plugins of the suite's conftest.py, because of two fixtures with one name the later one is used.
    session.config.pluginmanager.register(Fixtures(), "conformance-fixtures")


def pytest_collection_modifyitems(config, items):
    """Keeps of each test the first of those that differ in the server's settings only."""
    kept, seen = [], set()
    for item in items:
        parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        for name in SETTINGS:
            parameters.pop(name, None)
        # The indices tell apart values that have no representation of their own.
        indices = getattr(getattr(item, "callspec", None), "indices", {})
        key = (item.nodeid.split("[")[0], str(sorted((name, indices.get(name)) for name in parameters)))
        if key not in seen:
            seen.add(key)
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        former = RESULTS.get(report.nodeid, ["passed", ""])
        if former[0] != "failed":
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
            RESULTS[report.nodeid] = [report.outcome, text[-3000:]]


def pytest_sessionfinish():
    with open(os.environ["CONFORMANCE_RESULTS"], "w") as file:
        json.dump(RESULTS, file)
