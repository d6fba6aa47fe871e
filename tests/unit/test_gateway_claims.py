# SPDX-License-Identifier: BSD-3-Clause
"""HAProxy with a generated configuration in front of fake hosts: the routing of claims and users."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import re
import secrets
import socket
import socketserver
import subprocess
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_gateway_settings import pages

from malformed import REQUESTS, status_of
from nbagent.gateway import haproxy, settings

# HAProxy forwards these with one length and without continued lines; nginx on the host refuses the others of them.
FORWARDED = ("chunked and a length", "a length and chunked", "a continued header", "chunks by HTTP/1.0",
             "NUL in a header", "HTTP/2.0", "no Host", "HTTP/1.10", "a header without a colon", "an unknown method")
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class FakeHost:
    """The two servers of a host that the gateway uses: its router and its agent check."""

    def __init__(self, label: str, capacity: int) -> None:
        self.label, self.capacity, self.used, self.requests = label, capacity, 0, 0
        self.weight = 100
        # Whether it closes the connection of a claim without a response, as if it had died with the new slot.
        self.dies = False
        # Whether its agent check always reports that it is free.
        self.reports_free = False
        # Whether its API responds; without it claims wait in the router for minutes.
        self.has_api = True
        # The paths below /assets/ that it has; without them 404.
        self.assets: set[str] = set()
        self.keys: dict[str, str] = {}
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.router, self.check = _Http(("127.0.0.1", 0), _router(self)), _Tcp(("127.0.0.1", 0), _check(self))

    @property
    def settings(self) -> dict[str, Any]:
        return {"address": "127.0.0.1", "port": self.router.server_address[1],
                "check_port": self.check.server_address[1], "weight": self.weight}

    def claim(self, key: str) -> str | None:
        """The slot, or None if the host is full."""
        with self.lock:
            self.requests += 1
            if key not in self.keys:
                if self.used >= self.capacity:
                    return None
                self.used += 1
                self.keys[key] = f"{self.label}-{secrets.token_hex(6)}"
            return self.keys[key]


class _Http(http.server.ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Ignore errors, because HAProxy closes connections of failed attempts."""


class _Unix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    request_queue_size = 512
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """As above."""


class _Tcp(socketserver.ThreadingTCPServer):
    request_queue_size = 512
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """As above."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def address_string(self) -> str:
        return ""

    def do_POST(self) -> None:
        self.do_GET()

    def respond(self, status: int, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _router(host: FakeHost) -> type[_Handler]:
    class Router(_Handler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            path = urllib.parse.urlsplit(self.path).path
            if path == "/healthz":
                return self.respond(200, "ok")
            if path == f"/user/{haproxy.ABSENT}/nbagent/return":
                return self.respond(404 if host.has_api else 503, {})
            host.headers.append(dict(self.headers))
            if path.startswith(("/spawn", "/api/spawn")):
                slot = host.claim(self.headers.get("Idempotency-Key") or urllib.parse.parse_qs(body)["key"][0])
                if host.dies:
                    self.close_connection = True
                    return None
                return self.respond(200, {"slot": slot}) if slot else self.respond(503, {"full": host.label})
            if self.path.startswith("/assets/") and self.path not in host.assets:
                return self.respond(404, {"host": host.label})
            return self.respond(200, {"host": host.label, "path": self.path})

    return Router


def _check(host: FakeHost) -> type[socketserver.BaseRequestHandler]:
    class Check(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            free = 100 if host.reports_free else -(-100 * (host.capacity - host.used) // max(1, host.capacity))
            self.request.sendall(f"ready {max(0, free)}%\n".encode())

    return Check


class Status(_Handler):
    """A status service that responds with its name and with the statuses of the real one."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kinds = {"/spawn": 503, "/api/spawn": 429, "/user/": 404}
        status = next((status for path, status in kinds.items() if self.path.startswith(path)), 200)
        self.respond(status, {"status service": self.path})


class Gateway:
    """HAProxy with the configuration for some hosts; `ready` is its status for GET / when it is up."""

    def __init__(self, directory: Path, hosts: list[FakeHost], ready: int = 200, **tables: Any) -> None:
        directory.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        tables["listen"] = {"http": [f"127.0.0.1:{self.port}"], "metrics": "none", "connections": 500,
                            **tables.get("listen", {})}
        tables["landing"] = {"rate": 100000, **tables.get("landing", {})}
        tables["hosts"] = {host.label: host.settings for host in hosts}
        text = haproxy.render(settings.parse(tables)).replace(haproxy.STATUS_SOCKET, f"{directory}/status.sock")
        text = text.replace(haproxy.RUN, str(directory)).replace(haproxy.PAGES, str(pages(directory)))
        (directory / "haproxy.cfg").write_text(text)
        self.status = _Unix(f"{directory}/status.sock", Status)
        threading.Thread(target=self.status.serve_forever, args=[0.05], daemon=True).start()
        self.log = directory / "log"
        with self.log.open("wb") as log:
            command = ["/usr/sbin/haproxy", "-db", "-f", str(directory / "haproxy.cfg")]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        # From another address, because HAProxy may count this connection for a while after its end.
        self.wait(lambda: self.call("GET", "/", address="127.0.0.9")[0] == ready)

    def wait(self, what: Any) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if what():
                    return
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def call(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None,
        address: str = "127.0.0.1",
    ) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, 30, (address, 0))
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            text = response.read()
        return response.status, json.loads(text) if text[:1] in (b"{", b'"') else text.decode()

    def claim(self, key: str = "") -> str:
        status, document = self.call("POST", "/api/spawn", headers={"Idempotency-Key": key} if key else {})
        assert status == 200, (status, document)
        return str(document["slot"])

    def click(self, key: str) -> str:
        status, document = self.call("POST", "/spawn/lab", f"key={key}".encode(), FORM)
        assert status == 200, (status, document)
        return str(document["slot"])

    def claims(self, count: int) -> list[int]:
        """The statuses of `count` claims, sixteen at a time."""
        with ThreadPoolExecutor(16) as threads:
            return list(threads.map(lambda _: self.call("POST", "/api/spawn")[0], range(count)))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.status.shutdown()
        self.status.server_close()


@pytest.fixture
def hosts() -> Iterator[list[FakeHost]]:
    made = [FakeHost("a", 100), FakeHost("b", 100), FakeHost("c", 300)]
    for host in made:
        for server in (host.router, host.check):
            threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    yield made
    for host in made:
        for server in (host.router, host.check):
            server.shutdown()
            server.server_close()


@pytest.fixture
def gateway(hosts: list[FakeHost], tmp_path: Path) -> Iterator[Gateway]:
    made = Gateway(tmp_path / "one", hosts)
    yield made
    made.close()


def by_host(hosts: list[FakeHost]) -> Counter[str]:
    return Counter({host.label: len(host.keys) for host in hosts})


def test_a_claim_is_sent_to_another_host_if_one_is_full(gateway: Gateway, hosts: list[FakeHost]) -> None:
    # HAProxy learns from refusals only.
    hosts[0].reports_free, hosts[0].used = True, hosts[0].capacity
    assert Counter(gateway.claims(200)) == {200: 200}
    assert hosts[0].requests > 0 and not hosts[0].keys


def test_the_whole_capacity_of_the_fleet_is_used(gateway: Gateway, hosts: list[FakeHost]) -> None:
    # The claims are faster than the agent checks. With weights that are a second old, the twenty random attempts of a
    # claim may miss the last free slot, about once in a hundred runs of this test; a second later they find it.
    statuses = Counter(gateway.claims(500))
    assert set(statuses) <= {200, 429} and statuses[429] <= 5
    for _ in range(statuses[429]):
        time.sleep(1.5)
        assert gateway.claims(1) == [200]
    assert by_host(hosts) == {"a": 100, "b": 100, "c": 300}
    assert gateway.call("POST", "/api/spawn")[0] == 429


def test_a_host_with_a_larger_weight_gets_more_claims(hosts: list[FakeHost], tmp_path: Path) -> None:
    for host, weight in zip(hosts, (20, 20, 160), strict=True):
        host.capacity, host.weight = 10**6, weight
    gateway = Gateway(tmp_path / "one", hosts)
    try:
        assert Counter(gateway.claims(400)) == {200: 400}
        # A third without weights. At most four of five with them, because of two random hosts the less busy is used.
        assert by_host(hosts)["c"] > 200
    finally:
        gateway.close()


def test_a_claim_is_sent_to_another_host_if_one_dies(gateway: Gateway, hosts: list[FakeHost]) -> None:
    hosts[0].dies = True
    assert Counter(gateway.claims(100)) == {200: 100}
    assert hosts[0].requests > 0


def test_a_host_without_its_api_gets_no_claims_and_keeps_its_users(gateway: Gateway, hosts: list[FakeHost]) -> None:
    # Its supervisor, which responds to the agent check, may work.
    hosts[0].has_api, hosts[0].reports_free = False, True
    gateway.wait(lambda: all(f"Server {stage}/a is DOWN" in gateway.log.read_text() for stage in haproxy.STAGES))
    assert Counter(gateway.claims(50)) == {200: 50} and hosts[0].requests == 0
    assert gateway.call("GET", "/user/a-0123456789ab/lab")[1]["host"] == "a"
    hosts[0].has_api = True
    gateway.wait(lambda: gateway.claims(10) and hosts[0].requests > 0)


def test_the_status_service_responds_if_every_host_is_full(gateway: Gateway, hosts: list[FakeHost]) -> None:
    for host in hosts:
        host.used = host.capacity
    # At first all hosts refuse; two seconds later their agent checks have reported that they are full.
    statuses = gateway.claims(60)
    time.sleep(2)
    assert Counter(statuses + gateway.claims(20)) == {429: 80}
    path = "/spawn/lab/tree/x.ipynb?a=b"
    assert gateway.call("GET", path) == (503, {"status service": path})
    assert gateway.call("POST", "/spawn", b"key=anything", FORM)[0] == 503


def test_the_same_key_returns_the_same_slot_through_every_gateway(
    gateway: Gateway, hosts: list[FakeHost], tmp_path: Path
) -> None:
    other = Gateway(tmp_path / "other", hosts[::-1])
    try:
        slots = {key: gateway.claim(key) for key in map(str, range(20))}
        assert {key: other.claim(key) for key in slots} == slots
        assert {key: gateway.claim(key) for key in slots} == slots
    finally:
        other.close()
    assert sum(by_host(hosts).values()) == len(slots)
    assert len({slot[0] for slot in slots.values()}) > 1, "all keys on one host"


def test_a_key_keeps_its_host_when_its_first_choice_becomes_free(
    gateway: Gateway, hosts: list[FakeHost]
) -> None:
    for host in hosts[:2]:
        host.used = host.capacity
    slots = {key: gateway.claim(key) for key in map(str, range(10))}
    for host in hosts[:2]:
        host.used = 0
    time.sleep(1.5)
    assert {key: gateway.claim(key) for key in slots} == slots
    assert by_host(hosts) == {"a": 0, "b": 0, "c": 10}


def test_the_trace_of_a_claim_is_forwarded_and_logged(gateway: Gateway, hosts: list[FakeHost]) -> None:
    trace = f"00-{'4b' * 16}-{'00f0' * 4}-01"
    for header in (trace, f"{trace}\tspan", "token"):
        assert gateway.call("POST", "/api/spawn", headers={"traceparent": header})[0] == 200
    assert gateway.call("POST", "/api/spawn")[0] == 200
    sent = [headers.get("traceparent") for host in hosts for headers in host.headers]
    assert Counter(sent) == {trace: 1, f"{trace}\tspan": 1, "token": 1, None: 1}
    gateway.wait(lambda: gateway.log.read_text().count(" trace=") == 4)
    assert re.findall(r" trace=(.*)$", gateway.log.read_text(), re.MULTILINE) == [
        f"{'4b' * 16}-{'00f0' * 4}", "-", "-", "-",
    ]


def test_two_clicks_on_the_button_are_one_claim(gateway: Gateway, hosts: list[FakeHost]) -> None:
    for key in map(str, range(10)):
        with ThreadPoolExecutor(2) as threads:
            assert len(set(threads.map(gateway.click, [key, key]))) == 1
    assert sum(by_host(hosts).values()) == 10


def test_the_gateway_adds_a_key_to_every_claim(gateway: Gateway, hosts: list[FakeHost]) -> None:
    gateway.claims(5)
    assert gateway.call("GET", "/spawn")[0] == 200
    keys = [headers["idempotency-key"] for host in hosts for headers in host.headers]
    assert len(set(keys)) == 6 and all(key.startswith(haproxy.OWN_KEY) for key in keys)


def test_claims_follow_the_free_capacity(gateway: Gateway, hosts: list[FakeHost]) -> None:
    hosts[0].used, hosts[1].used = 90, 50
    time.sleep(1.5)
    assert Counter(gateway.claims(60)) == {200: 60}
    taken = by_host(hosts)
    assert taken["a"] < taken["b"] < taken["c"]


@pytest.mark.parametrize(("method", "path", "headers"), [
    ("HEAD", "/spawn", {}),
    ("GET", "/api/spawn", {}),
    ("OPTIONS", "/api/spawn", {}),
    ("GET", "/spawn/user/a-0123456789ab/lab", {}),
    ("GET", "/spawn", {"Sec-Purpose": "prefetch;prerender"}),
    ("GET", "/spawn/lab", {"User-Agent": "Slackbot-LinkExpanding 1.0 (+https://api.slack.com/robots)"}),
    ("GET", "/spawn", {"User-Agent": "Microsoft Office Word 2014"}),
    ("GET", "/api/stats", {}),
])
def test_requests_that_claim_no_slot_are_not_sent_to_hosts(
    gateway: Gateway, hosts: list[FakeHost], method: str, path: str, headers: dict[str, str]
) -> None:
    gateway.call(method, path, headers=headers)
    assert [host.requests for host in hosts] == [0, 0, 0]


@pytest.mark.parametrize(("access", "requests"), [("token", [0, 0, 1]), ("off", [0, 0, 0])])
def test_landing_access_restricts_claims(
    hosts: list[FakeHost], tmp_path: Path, access: str, requests: list[int]
) -> None:
    gateway = Gateway(tmp_path / "closed", hosts, landing={"access": access})
    try:
        seen = []
        for path, headers in (("/spawn", {}), ("/api/spawn", {}), ("/api/spawn", {"Authorization": "token t"})):
            gateway.call("POST", path, headers=headers)
            seen.append(sum(host.requests for host in hosts))
    finally:
        gateway.close()
    assert seen == requests


def test_a_claim_that_does_not_fit_into_a_buffer_is_refused(gateway: Gateway, hosts: list[FakeHost]) -> None:
    for size in (haproxy.CLAIM_MAX_BYTES + 1, 100_000):
        assert gateway.call("POST", "/api/spawn", b"x" * size)[0] == 413
    assert gateway.call("POST", "/api/spawn", b"x" * haproxy.CLAIM_MAX_BYTES)[0] == 200


def test_requests_for_a_slot_go_to_its_host_only(gateway: Gateway, hosts: list[FakeHost]) -> None:
    for host in hosts:
        for _ in range(4):
            path = f"/user/{host.label}-0123456789ab/lab?token=x"
            assert gateway.call("GET", path) == (200, {"host": host.label, "path": path})
    for path in ("/user/zz-0123456789ab/lab", "/user/_status-1/", "/user/a/", "/user/"):
        assert gateway.call("GET", path) == (404, {"status service": path})


def test_an_asset_comes_from_any_host_that_has_its_image(gateway: Gateway, hosts: list[FakeHost]) -> None:
    one, other, unknown = (f"/assets/sha256-{digit * 64}/lab/main.js" for digit in "123")
    hosts[0].assets, hosts[1].assets = {one}, {other}
    hosts[2].used = hosts[2].capacity  # a full host serves its assets
    hosts[2].assets = {one}
    for _ in range(6):
        assert gateway.call("GET", one)[1]["host"] in ("a", "c")
        assert gateway.call("GET", other) == (200, {"host": "b", "path": other})
        assert gateway.call("GET", unknown)[0] == 404


def test_an_asset_is_requested_from_the_host_of_the_slot_that_needs_it(
    gateway: Gateway, hosts: list[FakeHost]
) -> None:
    asset = f"/assets/sha256-{'1' * 64}/lab/main.js"
    for host in hosts:
        host.assets = {asset}
    for label in "abcabc":
        page = {"Referer": f"https://nb.test/user/{label}-0123456789ab/lab/tree/x.ipynb"}
        assert gateway.call("GET", asset, headers=page)[1]["host"] == label
    hosts[0].assets = set()
    page = {"Referer": "https://nb.test/user/a-0123456789ab/lab"}
    assert gateway.call("GET", asset, headers=page)[1]["host"] in ("b", "c")
    for forged in ("https://nb.test/user/_status-1/", "https://nb.test/user/zz-1/", "x/user/a-1/"):
        assert gateway.call("GET", asset, headers={"Referer": forged})[1]["host"] in ("b", "c")


def test_a_dead_host_fails_no_asset(gateway: Gateway, hosts: list[FakeHost]) -> None:
    asset = f"/assets/sha256-{'1' * 64}/lab/main.js"
    for host in hosts:
        host.assets = {asset}
    hosts[0].router.shutdown()
    hosts[0].router.server_close()
    page = {"Referer": "https://nb.test/user/a-0123456789ab/lab"}
    assert {gateway.call("GET", asset, headers=page)[1]["host"] for _ in range(8)} == {"b", "c"}


def test_full_hosts_serve_their_users(gateway: Gateway, hosts: list[FakeHost]) -> None:
    for host in hosts:
        host.used = host.capacity
    time.sleep(1.5)
    assert gateway.call("GET", "/user/a-0123456789ab/lab")[1]["host"] == "a"


def test_requests_for_a_dead_host_get_an_error_at_once(gateway: Gateway, hosts: list[FakeHost]) -> None:
    hosts[0].router.shutdown()
    hosts[0].router.server_close()
    path = "/user/a-0123456789ab/lab"
    began = time.monotonic()
    assert gateway.call("GET", path) == (404, {"status service": path})
    assert time.monotonic() - began < 0.5
    assert Counter(gateway.claims(50)) == {200: 50}


def test_only_trusted_proxies_may_set_the_client_address(hosts: list[FakeHost], tmp_path: Path) -> None:
    forged = {"X-Forwarded-For": "203.0.113.9, 198.51.100.7", "X-Forwarded-Proto": "https", "X-Real-IP": "203.0.113.9",
           "X-Nbagent-Gateway": "1", "Forwarded": "for=203.0.113.9"}
    seen = []
    for trusted in ([], ["127.0.0.0/8"]):
        gateway = Gateway(tmp_path / f"trusts-{len(trusted)}", hosts, listen={"trusted_proxies": trusted})
        gateway.call("GET", "/user/a-0123456789ab/", headers=forged)
        gateway.close()
        seen.append({name.lower(): value for name, value in hosts[0].headers[-1].items()})
    for headers in seen:
        assert not {"x-real-ip", "x-nbagent-gateway", "forwarded"} & set(headers)
    assert [headers["x-forwarded-for"] for headers in seen] == ["127.0.0.1", "198.51.100.7"]
    assert [headers["x-forwarded-proto"] for headers in seen] == ["http", "https"]


@pytest.mark.parametrize(("sent", "scheme"), [("https,http", "https"), ("http, https", "http"), ("HTTPS", "https")])
def test_the_first_scheme_of_several_proxies_is_that_of_the_client(
    hosts: list[FakeHost], tmp_path: Path, sent: str, scheme: str
) -> None:
    gateway = Gateway(tmp_path / "listed", hosts, listen={"trusted_proxies": ["127.0.0.0/8"]})
    try:
        gateway.call("GET", "/user/a-0123456789ab/", headers={"X-Forwarded-Proto": sent})
        assert hosts[0].headers[-1]["x-forwarded-proto"] == scheme
    finally:
        gateway.close()


def test_cookies_of_other_services_on_the_domain_fit_or_are_named(gateway: Gateway, hosts: list[FakeHost]) -> None:
    many = "; ".join(f"service{number}={'x' * 4000}" for number in range(6))
    assert gateway.call("GET", "/user/a-0123456789ab/", headers={"Cookie": many})[0] == 200
    status, _ = gateway.call("GET", "/user/a-0123456789ab/", headers={"Cookie": many * 2})
    assert status == 400


def test_connections_of_an_address_are_bounded_before_anything_is_read(hosts: list[FakeHost], tmp_path: Path) -> None:
    for trusted, refused in (([], 10), (["127.0.0.0/8"], 0)):
        listen = {"client_connections": 20, "trusted_proxies": trusted}
        gateway = Gateway(tmp_path / f"bounded-{len(trusted)}", hosts, listen=listen)
        try:
            with contextlib.ExitStack() as stack:
                held = [connected(stack, gateway.port) for _ in range(30)]
                gateway.wait(lambda held=held, refused=refused: sum(map(is_refused, held)) == refused)
            gateway.wait(lambda gateway=gateway: gateway.call("GET", "/")[0] == 200)
        finally:
            gateway.close()


def connected(stack: contextlib.ExitStack, port: int) -> socket.socket | None:
    """A connection; None when HAProxy has reset it before connect(2) returned."""
    try:
        return stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
    except ConnectionError:
        return None


def is_refused(connection: socket.socket | None) -> bool:
    """Whether HAProxy closes a connection on which half a request is sent."""
    if connection is None:
        return True
    connection.setblocking(False)
    try:
        connection.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("name", REQUESTS)
def test_a_malformed_request_is_refused(gateway: Gateway, hosts: list[FakeHost], name: str) -> None:
    request = REQUESTS[name].replace(b"/claim", b"/user/a-0123456789ab/")
    status = status_of(socket.create_connection(("127.0.0.1", gateway.port), 3), request)
    if name in FORWARDED and status == 200:
        headers = {header.lower() for header in hosts[0].headers[-1]} if hosts[0].headers else set()
        assert not {"transfer-encoding", "content-length"} <= headers
    else:
        assert status is None or 400 <= status < 500 or status in (501, 505), status


def test_the_rate_of_claims_of_one_address_is_limited(hosts: list[FakeHost], tmp_path: Path) -> None:
    gateway = Gateway(tmp_path / "limited", hosts, landing={"rate": 5})
    try:
        assert Counter(gateway.claims(9)) == {200: 5, 429: 4}
        status, problem = gateway.call("POST", "/api/spawn")
        assert (status, problem["type"]) == (429, "urn:nbagent:problem:rate-limited")
        assert "<h1>" in gateway.call("GET", "/spawn", headers={"Accept": "text/html"})[1]
        assert gateway.call("GET", "/user/a-0123456789ab/lab")[0] == 200
    finally:
        gateway.close()


def test_the_rate_of_lent_slots_of_one_address_is_limited_apart_from_its_claims(
    hosts: list[FakeHost], tmp_path: Path
) -> None:
    gateway = Gateway(tmp_path / "lending", hosts, landing={"rate": 5})
    try:
        assert [gateway.call("POST", "/api/lend", b"", FORM)[0] for _ in range(9)] == [*[200] * 5, *[429] * 4]
        assert sum(len(host.headers) for host in hosts) == 5
        assert Counter(gateway.claims(6)) == {200: 5, 429: 1}
        # Another client, which is no person; the status service lends nothing.
        crawler = {**FORM, "User-Agent": "bot"}
        assert "status service" in gateway.call("POST", "/api/lend", b"", crawler, "127.0.0.2")[1]
        assert gateway.call("POST", "/api/lend", b"", FORM, "127.0.0.2")[0] == 200
    finally:
        gateway.close()


def test_requests_of_banned_addresses_are_refused(hosts: list[FakeHost], tmp_path: Path) -> None:
    many = [f"203.0.113.{number}/32" for number in range(120)]
    gateway = Gateway(tmp_path / "banning", hosts, ready=403, landing={"banned": [*many, "127.0.0.0/8"]})
    try:
        status, page = gateway.call("GET", "/user/a-0123456789ab/lab", headers={"Accept": "text/html"})
        assert status == 403 and "<h1>" in page
        status, problem = gateway.call("POST", "/api/spawn")
        assert (status, problem["status"]) == (403, 403)
    finally:
        gateway.close()
    assert not any(host.headers for host in hosts)


def test_the_log_has_the_client_and_no_token(gateway: Gateway, hosts: list[FakeHost]) -> None:
    gateway.call("GET", "/spawn/lab?token=secret")
    hosts[0].router.shutdown()
    hosts[0].router.server_close()
    gateway.call("GET", "/user/a-0123456789ab/lab?token=secret", headers={"Authorization": "token secret"})
    log = gateway.log.read_text()
    assert "claim client=127.0.0.1 method=GET path=/spawn/lab " in log and "secret" not in log
