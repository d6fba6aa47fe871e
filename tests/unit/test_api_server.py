# SPDX-License-Identifier: BSD-3-Clause
"""The API under gunicorn, in a process of its own on a real port, with malformed and malicious requests."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_supervisor import LABEL, FakeSupervisor

from nbagent.api.__main__ import main

ROOT = Path(__file__).parents[2]
HEAD = "POST /claim HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Server:
    """A process of nbagent.api with the listening sockets that systemd would pass to it."""

    def __init__(self, folder: Path) -> None:
        (folder / "nbagent.toml").write_text(f'[host]\nlabel = "{LABEL}"\n[api]\nworkers = 1\nthreads = 4\n')
        self.folder = folder
        self.stderr = folder / "stderr"
        # Socket activation: the sockets are descriptors 3 and 4, and LISTEN_PID is the process itself.
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.landing = socket.socket(socket.AF_UNIX)
        self.landing.bind(str(folder / "landing.sock"))
        self.landing.listen()
        self.port = self.listener.getsockname()[1]
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(folder / "notify.sock"))
        self.notify.settimeout(20)
        self.start()

    def start(self) -> None:
        """Starts the process and returns when it has sent READY=1."""
        folder = self.folder
        (folder / "token").write_text("t" * 43)
        activate = (
            "import fcntl, os, sys; api, landing = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]);"
            "os.dup2(api, 3); os.dup2(landing, 4);"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2');"
            "os.execv(sys.executable, [sys.executable, '-m', 'nbagent.api', *sys.argv[3:]])"
        )
        with self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", activate, str(self.listener.fileno()), str(self.landing.fileno()),
                 "--config", str(folder / "nbagent.toml"), "--control", str(folder / "control.sock"),
                 "--token", str(folder / "token"), "--landing", str(folder / "landing.sock")],
                cwd=ROOT, stderr=stderr, pass_fds=[self.listener.fileno(), self.landing.fileno()],
                env=os.environ | {"NOTIFY_SOCKET": str(folder / "notify.sock"), "JOURNAL_STREAM": "1:1"},
            )
        assert b"READY=1" in self.notify.recv(4096)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.listener.close()
        self.landing.close()
        self.notify.close()

    def wait_for(self, path: str, text: str) -> None:
        """Returns when the response to a GET of `path` contains `text`."""
        deadline_s = time.monotonic() + 20
        while text not in (response := self.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")):
            assert time.monotonic() < deadline_s, response
            time.sleep(0.05)

    def raw(self, request: str) -> str:
        with self.connect() as connection:
            connection.sendall(request.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n").encode())
            with connection.makefile("rb") as response:
                return response.read().decode()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 20)

    def send(self, request: bytes) -> tuple[int, Any]:
        """Sends bytes unchanged; returns status and document of the response."""
        with self.connect() as connection:
            connection.sendall(request)
            with http.client.HTTPResponse(connection) as response:
                response.begin()
                return response.status, json.loads(response.read())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def supervisor(folder: Path) -> Iterator[FakeSupervisor]:
    with FakeSupervisor(folder / "control.sock", capacity=10**6) as running:
        yield running


@pytest.fixture(scope="module")
def server(folder: Path, supervisor: FakeSupervisor) -> Iterator[Server]:
    running = Server(folder)
    try:
        yield running
    finally:
        running.close()
    assert running.process.returncode == 0
    assert running.stderr.read_text() == "", "the service logged something"


def test_body_of_ten_megabytes_is_refused_and_the_response_arrives(server: Server) -> None:
    # http.client sends the whole body before it reads, so a reset of the connection would fail the request.
    for connection_header in ("keep-alive", "close"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        headers = {"Content-Type": "application/json", "Connection": connection_header}
        connection.request("POST", "/claim", body=b" " * 10_000_000, headers=headers)
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["type"]) == (413, "urn:nbagent:problem:invalid-body")
        connection.close()


def test_a_body_of_ten_megabytes_is_refused_before_it_is_sent(server: Server) -> None:
    status, problem = server.send(f"{HEAD}Content-Length: 10000000\r\n\r\n".encode())
    assert (status, problem["status"]) == (413, 413)


def test_chunked_body_above_the_limit_is_refused(server: Server) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    request = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 53 + b"0\r\n\r\n"
    assert server.send(request)[0] == 413


def test_chunked_body_within_the_limit_is_read(server: Server) -> None:
    request = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + b'b\r\n{"ttl": 60}\r\n0\r\n\r\n'
    assert server.send(request)[0] == 200


@pytest.mark.parametrize(
    "body", [b"Content-Length: 9\r\n\r\n{'ttl': 1", b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"]
)
def test_a_broken_body_is_a_problem(server: Server, body: bytes) -> None:
    status, problem = server.send(HEAD.encode() + body)
    assert (status, problem["type"]) == (400, "urn:nbagent:problem:invalid-body")


@pytest.mark.parametrize("target", ["/slots/../../etc", "/slots/..%2f..%2fetc%2fshadow", "/slots/%00"])
def test_path_traversal_is_a_malformed_slot_id(server: Server, target: str) -> None:
    status, problem = server.send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert (status, problem["type"]) == (404, "urn:nbagent:problem:slot-not-found")


def test_headers_with_underscores_are_dropped(server: Server) -> None:
    request = "GET /readyz HTTP/1.1\r\nHost: localhost\r\nSCRIPT_NAME: /x\r\n\r\n"
    assert server.send(request.encode())[0] == 200


@pytest.mark.parametrize("host", ["[::zz]", "a b", "[", "", "x:y:z", "localhost:99999999"])
def test_malformed_host_header_is_refused(server: Server, host: str) -> None:
    status, problem = server.send(f"GET /claim HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert status == (403 if host else 200), problem


def test_silent_connections_do_not_block_other_requests(server: Server) -> None:
    silent = [server.connect() for _ in range(3)]
    try:
        assert server.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200
    finally:
        for connection in silent:
            connection.close()


def test_a_killed_worker_is_replaced(server: Server) -> None:
    server.wait_for("/healthz", "200 OK")
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    assert server.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200


def test_worker_exits_although_sigterm_is_repeated(server: Server) -> None:
    # The arbiter sends SIGTERM each second. A repeated signal must not restart the delay after which the worker exits.
    server.wait_for("/healthz", "200 OK")
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    worker, deadline_s = int(children[0]), time.monotonic() + 10
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline_s:
            os.kill(worker, signal.SIGTERM)
            time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


def test_only_the_socket_selects_the_control_api_or_the_landing_page(server: Server, supervisor: Any) -> None:
    def send_to_landing(request: str) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(server.folder / "landing.sock"))
            connection.sendall(f"{request} HTTP/1.0\r\nX-Real-IP: 192.0.2.1\r\n\r\n".encode())
            with connection.makefile("rb") as response:
                return response.read().decode()

    assert '{"url":"/user/' in send_to_landing("POST /api/spawn")
    assert "404 NOT FOUND" in send_to_landing("GET /slots") and "404 NOT FOUND" in send_to_landing("POST /claim")
    assert "405" in server.raw("POST / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert "404 NOT FOUND" in server.raw("POST /api/spawn HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert supervisor.asked[-1]["args"]["client"] == "192.0.2.1"


def test_reload_applies_valid_settings_and_keeps_the_former_ones_otherwise(tmp_path: Path) -> None:
    with FakeSupervisor(tmp_path / "control.sock"):
        server = Server(tmp_path)
        settings = tmp_path / "nbagent.toml"
        try:
            server.wait_for("/claim", "http://localhost:8000/user/")
            settings.write_text('[router]\npublic_url = "https://nb.example.org"\n')
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("/claim", "https://nb.example.org/user/")
            settings.write_text('[router]\npublic_ulr = "https://nb.example.com"\n')
            server.process.send_signal(signal.SIGHUP)
            while "not reloaded" not in server.stderr.read_text():
                time.sleep(0.05)
            server.wait_for("/claim", "https://nb.example.org/user/")
        finally:
            server.close()
    lines = server.stderr.read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("<3>configuration not reloaded: ")


WORKERS_WITH_SIGTERM = """
import os, signal, socket, sys
from nbagent.core import logs
from nbagent.web import gunicorn_app
from nbagent.web.server import Service

fork = os.fork

def fork_and_end():
    pid = fork()
    if pid:
        os.kill(pid, signal.SIGTERM)
        print(pid, flush=True)
    return pid

os.fork = fork_and_end
logs.configure()
shape = gunicorn_app.Shape(workers=1, graceful_s=60)
service = Service(lane_of=lambda listener, peer: None, body_max_bytes=0)
gunicorn_app.GunicornApp("test", lambda: None, lambda _: shape, lambda _: service, f"unix:{sys.argv[1]}").run()
"""


def test_a_worker_that_gets_sigterm_before_its_first_instruction_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKERS_WITH_SIGTERM, str(tmp_path / "socket")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as arbiter:
        # The arbiter starts a worker after the former one has ended.
        pids = {arbiter.stdout.readline() for _ in range(5)}
        arbiter.terminate()
        _, stderr = arbiter.communicate(timeout=30)
    assert len(pids) == 5 and stderr == "" and arbiter.returncode == 0


def test_request_during_a_restart_gets_a_response(tmp_path: Path) -> None:
    with FakeSupervisor(tmp_path / "control.sock"):
        server = Server(tmp_path)
        try:
            server.process.terminate()
            with server.connect() as connection:
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
                server.process.wait(60)
                server.start()
                assert connection.recv(4096).startswith(b"HTTP/1.1 200 OK")
        finally:
            server.close()


def test_invalid_settings_exit_with_ex_config(tmp_path: Path) -> None:
    settings = tmp_path / "nbagent.toml"
    settings.write_text("[api]\nworkres = 2\n")
    done = subprocess.run(
        [sys.executable, "-m", "nbagent.api", "--config", str(settings)],
        cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 78
    assert "workers" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("arguments", "status"), [(["--no-such"], 2), (["--config"], 2), (["--help"], 0)])
def test_exit_status_of_the_command_line(arguments: list[str], status: int) -> None:
    done = subprocess.run([sys.executable, "-m", "nbagent.api", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status
    assert "Traceback" not in done.stderr


def test_sockets_need_not_be_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd passes the listening sockets, so the mode of their paths gives the service no permission."""
    (tmp_path / "nbagent.toml").touch()
    (tmp_path / "landing.sock").touch()
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)
    done = CliRunner().invoke(main, ["--check", "--config", f"{tmp_path}/nbagent.toml",
                                     "--landing", f"{tmp_path}/landing.sock"])
    assert done.exit_code == 0, done.output


def test_check_reads_the_settings_and_serves_nothing(tmp_path: Path) -> None:
    (tmp_path / "nbagent.toml").write_text("[api]\nworkers = 2\n")
    command = [sys.executable, "-m", "nbagent.api", "--check", "--config", str(tmp_path / "nbagent.toml")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode == 0
