# SPDX-License-Identifier: BSD-3-Clause
"""The router's real configuration in nginx, with an image's files: ranges, encodings and addresses of assets."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbagent.config import host_config, nginx_check, nginx_settings
from nbagent.core import paths

pytestmark = pytest.mark.skipif(not Path(nginx_check.NGINX).exists(), reason="needs nginx")
CONFIG = Path(__file__).resolve().parents[2] / "packaging/router/nginx.conf"
DIGEST = f"sha256-{'0123456789abcdef' * 4}"
FOR_EVER, NEVER = "public, max-age=31536000, immutable", "no-store"
SIZE = 95


class Router:
    """nginx on a unix socket, in one process, with directories below `path`."""

    def __init__(self, path: Path) -> None:
        self._socket = str(path / "router.sock")
        (path / "settings.conf").write_text(nginx_settings.nginx(host_config.parse({})))
        (path / "listen.conf").write_text(f"listen unix:{self._socket};\n")
        # Workers of root's nginx have another user, who may not read the test's directory.
        (path / "workers.conf").write_text("master_process off;\n")
        text = CONFIG.read_text()
        for there, here in ((paths.IMAGES, "images"), (paths.SLOTS, "slots"), (paths.ROUTER_RUN, ".")):
            text = text.replace(str(there), str(path / here))
        (path / "nginx.conf").write_text(text.replace("/usr/share/nbagent/router", str(CONFIG.parent / "pages")))
        with (path / "log").open("wb") as log:
            arguments = [nginx_check.NGINX, "-e", "stderr", "-c", str(path / "nginx.conf")]
            self._process = subprocess.Popen(arguments, stderr=log)
        deadline_s = time.monotonic() + 30
        while not self._listens():
            assert self._process.poll() is None and time.monotonic() < deadline_s, (path / "log").read_text()
            time.sleep(0.01)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            return connection.connect_ex(self._socket) == 0

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str]]:
        """The status and the headers of a response."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._socket)
            lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{lines}\r\n".encode())
            response = http.client.HTTPResponse(connection)
            response.begin()
            response.read()
            return response.status, {name.lower(): value for name, value in response.getheaders()}

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    path = tmp_path_factory.mktemp("router")
    files = path / "images" / DIGEST / "static" / "lab"
    files.mkdir(parents=True)
    (path / "slots").mkdir()
    (files / "main.js").write_text("x" * SIZE)
    for suffix in (".gz", ".br"):
        (files / f"main.js{suffix}").write_text("y" * (SIZE - 1))
    for file in files.iterdir():
        os.utime(file, (1, 1))
    made = Router(path)
    yield made
    made.close()


@pytest.mark.parametrize(("given", "status"), [
    ("0-0", 206), ("0-", 206), ("0-94", 206), ("0-95", 206), ("9-10", 206), ("10-9999", 206), ("89-90", 206),
    ("94-94", 206), ("94-", 206), ("80-", 206), ("-1", 206), ("-0001", 206), ("-95", 206), ("-999999999999999999", 206),
    ("0-999999999999999999", 206),
    ("95-", 416), ("96-", 416), ("100-", 416), ("900-1000", 416), ("5-3", 416), ("10-9", 416), ("90-89", 416),
    ("05-3", 416), ("5-03", 416), ("-0", 416), ("-000", 416), ("0-9999999999999999999", 416), ("1-", 206),
    ("-99999999999999999999", 416), ("99999999999999999999-", 416), ("-0,95-", 416), ("-", 416), ("x", 416),
    ("5-9x", 416), ("-5-", 416), (" -0", 416), ("-0 ", 416), ("5 - 3", 416),
])
def test_a_response_with_a_file_is_kept_for_ever_and_an_error_never(router: Router, given: str, status: int) -> None:
    found, headers = router.get(f"/assets/{DIGEST}/lab/main.js", Range=f"bytes={given}")
    assert (found, headers["cache-control"]) == (status, FOR_EVER if status == 206 else NEVER)


@pytest.mark.parametrize("given", ["0-1,5-9", "-1,95-", " 5-9", "5 - 9", "1-,2-", ""])
def test_no_cache_keeps_a_range_that_the_headers_cannot_tell(router: Router, given: str) -> None:
    found, headers = router.get(f"/assets/{DIGEST}/lab/main.js", Range=f"bytes={given}")
    assert found in (200, 206) and headers["cache-control"] == NEVER


@pytest.mark.parametrize(("name", "value", "status"), [
    ("If_None_Match", "*", 304), ("If_Modified_Since", "Thu, 01 Jan 1970 00:00:01 GMT", 304),
    ("If_Match", '"other"', 412), ("If_Unmodified_Since", "Thu, 01 Jan 1970 00:00:00 GMT", 412),
])
def test_conditions(router: Router, name: str, value: str, status: int) -> None:
    found, headers = router.get(f"/assets/{DIGEST}/lab/main.js", **{name: value})
    assert (found, headers["cache-control"]) == (status, FOR_EVER if status == 304 else NEVER)


@pytest.mark.parametrize(("accepted", "encoding"), [
    ("br", "br"), ("gzip, br", "br"), ("BR;q=1.0", "br"), ("br;q=0.001", "br"), ("br;q=0", None), ("br; q=0.000", None),
    ("gzip;q=0, br;q=0", None), ("br;q=0, gzip", "gzip"), ("*", None), ("identity;q=0", None), ("identity", None),
    ("xbr", None), ("brx, gzip", "gzip"), ("", None), ("gzip;q=0", None), ("br ; q=0 , gzip", "gzip"),
])
def test_the_encoding_is_one_that_the_client_accepts(router: Router, accepted: str, encoding: str | None) -> None:
    status, headers = router.get(f"/assets/{DIGEST}/lab/main.js", Accept_Encoding=accepted)
    assert (status, headers.get("content-encoding"), headers["vary"]) == (200, encoding, "Accept-Encoding")
    assert headers["cache-control"] == FOR_EVER


@pytest.mark.parametrize("path", [
    "lab/../lab/main.js", "lab/./main.js", "./lab/main.js", "lab/x/../main.js", "lab/main.js/.", "lab/main.js/..",
    "lab/%2e/main.js", "lab%2Fmain.js", "lab/%2E%2e/lab/main.js", "lab//main.js", "lab/..%2flab/main.js",
    "lab/main.js%00", "lab\\main.js", "lab/main.js/", "lab/.%2e/lab/main.js",
])
def test_a_file_has_one_address(router: Router, path: str) -> None:
    status, headers = router.get(f"/assets/{DIGEST}/{path}")
    assert status in (400, 404)
    assert status == 400 or headers["cache-control"] == NEVER
    assert router.get(f"/assets/{DIGEST}/lab/main.js?v=../..//")[0] == 200
