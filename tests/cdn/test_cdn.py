# SPDX-License-Identifier: BSD-3-Clause
"""Assets behind a real edge and from real object storage: `make test-cdn`.

The edge is Varnish, the storage OpenStack Swift by its own API and by S3's, the browser Chromium. Varnish and rclone
are unpacked into the cache and not installed, because Varnish would start a service.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import brotli
import pytest
from openstack import Swift, swift

import browser
import product
from testhost_driver import Host

TOP = Path(__file__).resolve().parents[2]
UNPACKED = ("libjemalloc2", "libvarnishapi3", "rclone", "varnish")
BROTLI = ("python3-brotli",)
SETTINGS = "[pool]\nwarm = 2\n"
IMMUTABLE = "public, max-age=31536000, immutable"
# No cookies, and nothing but assets: the whole configuration of an edge, as packaging/docs/cdn.md describes it.
VCL = """vcl 4.1;
backend default { .host = "127.0.0.1"; .port = "%d"; }
sub vcl_recv {
    if (req.url !~ "^/assets/") { return (synth(404)); }
    unset req.http.Cookie;
}
"""
TRANSFERRED = "return performance.getEntriesByType('resource').map(entry => [entry.name, entry.transferSize])"


@pytest.fixture(scope="session")
def packages() -> dict[str, Path]:
    """Packages of Debian, in the cache."""
    names = (*UNPACKED, *BROTLI)
    command = ["apt-get", "download", "--print-uris", *names]
    uris = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    cache = product.CACHE
    kept = cache / f"cdn-{hashlib.sha256(uris.stdout.encode()).hexdigest()[:16]}"
    if not kept.is_dir():
        with tempfile.TemporaryDirectory(prefix=".cdn-", dir=cache) as directory:
            subprocess.run(["apt-get", "-q", "download", *names], check=True, cwd=directory, capture_output=True)
            Path(directory, "tree").mkdir()
            for package in Path(directory).glob("*.deb"):
                if package.name.split("_")[0] in UNPACKED:
                    subprocess.run(["dpkg-deb", "-x", str(package), f"{directory}/tree"], check=True)
            Path(directory).chmod(0o755)
            Path(directory).rename(kept)
            Path(directory).mkdir()
    return {"tree": kept / "tree", **{path.name.split("_")[0]: path for path in kept.glob("*.deb")}}


@pytest.fixture(scope="session")
def host(packages: dict[str, Path]) -> Iterator[Host]:
    """A host with nbagent, and Debian's modules for Brotli."""
    built = product.build(product.say)
    with Host.up(name=f"cdn-{os.getpid()}") as made:
        product.add(made, [packages[name] for name in BROTLI])
        product.install(made, built, SETTINGS)
        yield made


@pytest.fixture(scope="session")
def digest(host: Host) -> str:
    return host.run(["readlink", "/var/lib/nbagent/images/names/minimal"]).stdout.strip().rpartition("/")[2]


@pytest.fixture(scope="session")
def router(host: Host) -> int:
    """The router's port on this machine."""
    return host.forward(product.ROUTER_PORT, 0)


def use_assets_url(host: Host, url: str) -> None:
    """Makes new slots and the landing page use an address of assets."""
    host.run(["tee", "/etc/nbagent/conf.d/60-assets.toml"], input=f'[router]\nassets_url = "{url}"\n')
    host.run(["systemctl", "reload", "nbagent.service", "nbagent-api.service"])
    api = product.Api(host, product.ROUTER_PORT)
    wait(lambda: str(api.get("/api/stats").json()["assets"]).startswith(url), "the setting on the landing page")
    product.Api(host).delete("/api/pool")
    product.wait_warm(host)


def wait(what: Callable[[], Any], for_what: str) -> Any:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        if found := what():
            return found
        time.sleep(0.2)
    raise AssertionError(f"no {for_what} within 60 s")


class Edge:
    """Varnish in front of the router."""

    def __init__(self, tree: Path, directory: Path, port: int, backend: int, rules: str = "") -> None:
        self.port, self.directory, self.tree = port, directory, tree
        self.environment = {**os.environ, "LD_LIBRARY_PATH": f"{tree}/usr/lib/x86_64-linux-gnu"}
        (directory / "edge.vcl").write_text(VCL % backend + rules)
        command = [f"{tree}/usr/sbin/varnishd", "-F", "-n", str(directory / "run"), "-a", f"127.0.0.1:{port}",
                   "-T", "none", "-f", str(directory / "edge.vcl"), "-s", "malloc,64m", "-j", "none"]
        with (directory / "log").open("w") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        wait(self.answers, f"answer of Varnish, see {directory}/log")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answers(self) -> bool:
        try:
            return self.get("/").status == 404
        except OSError:
            assert self.process.poll() is None, (self.directory / "log").read_text()
            return False

    def get(self, path: str, **headers: str) -> product.Answer:
        return request(self.port, path, headers)

    def requests_of_host(self) -> int:
        """The number of requests that the edge has sent to the host."""
        return self._count("MAIN.backend_req")

    def requests_of_browsers(self) -> int:
        """The number of requests that the edge has received."""
        return self._count("MAIN.client_req")

    def _count(self, name: str) -> int:
        command = [f"{self.tree}/usr/bin/varnishstat", "-n", str(self.directory / "run"), "-j", "-f", name]
        stats = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=self.environment).stdout)
        return int(stats["counters"][name]["value"])

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def request(port: int, path: str, headers: Mapping[str, str]) -> product.Answer:
    """A request of 127.0.0.1; the path is sent unchanged."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path, headers=dict(headers))
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return product.Answer(answer.status, found, answer.read())
    finally:
        connection.close()


@pytest.fixture
def edge(packages: dict[str, Path], router: int, tmp_path: Path) -> Iterator[Edge]:
    """A cold edge."""
    made = Edge(packages["tree"], tmp_path, 18090, router)
    yield made
    made.stop()


@contextmanager
def notebook(host: Host, router: int) -> Iterator[tuple[browser.Page, dict[str, int]]]:
    """The page of a new slot in a browser with an empty profile, and the bytes of each asset by its address."""
    claim = product.Api(host).claim()
    with tempfile.TemporaryDirectory() as directory, browser.chromium(Path(directory)) as page:
        page.open(f"http://127.0.0.1:{router}{claim['path']}?token={claim['token']}")
        page.see(".jp-Launcher")
        entries = page.driver.execute_script(TRANSFERRED)
        yield page, {name: size for name, size in entries if "/assets/sha256-" in name}
    product.Api(host).delete(f"/slots/{claim['slot']}")


def origins(assets: Mapping[str, int]) -> set[str]:
    return {f"{url.scheme}://{url.netloc}" for url in map(urlsplit, assets)}


def test_a_second_slot_in_a_second_browser_costs_the_host_no_request(host: Host, router: int, edge: Edge) -> None:
    use_assets_url(host, edge.url)
    with notebook(host, router) as (page, assets):
        assert len(assets) > 20 and origins(assets) == {edge.url}
        assert page.complaints() == []
    before = edge.requests_of_host()
    assert before >= 20
    with notebook(host, router) as (_, again):
        assert set(again) >= set(assets)
    assert edge.requests_of_host() - before <= len(set(again) - set(assets))


def test_the_landing_page_loads_ahead_from_the_edge(host: Host, router: int, edge: Edge, digest: str) -> None:
    use_assets_url(host, edge.url)
    ahead = {f"{edge.url}/assets/{digest}/{path}" for path in edge.get(f"/assets/{digest}/ahead.json").json()}
    with tempfile.TemporaryDirectory() as directory, browser.chromium(Path(directory)) as page:
        page.without_prerendering()
        page.open(f"http://127.0.0.1:{router}/")
        page.wait(lambda driver: ahead <= {name for name, _ in driver.execute_script(TRANSFERRED)}, "the files ahead")
        before = edge.requests_of_browsers()
        assert before >= len(ahead)
        page.see("button")[0].click()
        page.see(".jp-Launcher")
        found = {name for name, _ in page.driver.execute_script(TRANSFERRED) if name.startswith(edge.url)}
        assert len(ahead & found) > 0.9 * len(ahead)
        assert edge.requests_of_browsers() - before <= len(found - ahead)
        assert page.complaints() == []


def test_an_edge_serves_ranges_conditions_and_encodings_and_keeps_no_error(edge: Edge, digest: str) -> None:
    script = f"/assets/{digest}/{edge.get(f'/assets/{digest}/ahead.json').json()[0]}"
    packed, plain = edge.get(script, **{"Accept-Encoding": "gzip"}), edge.get(script)
    assert gzip.decompress(packed.body) == plain.body and "Accept-Encoding" in packed.headers["vary"]
    assert packed.headers["cache-control"] == plain.headers["cache-control"] == IMMUTABLE
    once = edge.requests_of_host()
    part = edge.get(script, Range="bytes=10-19")
    assert (part.status, part.body) == (206, plain.body[10:20])
    unchanged = edge.get(script, **{"If-None-Match": packed.headers["etag"], "Accept-Encoding": "gzip"})
    assert (unchanged.status, unchanged.body) == (304, b"")
    assert edge.get(script, Range=f"bytes={len(plain.body)}-").status == 416
    assert edge.get(script).status == 200
    assert edge.requests_of_host() == once
    for path in (f"/assets/sha256-{'0' * 64}/lab/main.js", f"/assets/{digest}/../image.json", f"/assets/{digest}/lab"):
        before = edge.requests_of_host()
        answers = [edge.get(path) for _ in range(2)]
        assert [answer.status for answer in answers] == [404, 404], path
        assert edge.requests_of_host() == before + 2, path


def test_a_page_comes_from_the_host_when_the_edge_is_down(host: Host, router: int, edge: Edge) -> None:
    use_assets_url(host, edge.url)
    edge.stop()
    with notebook(host, router) as (page, assets):
        loaded = {name: size for name, size in assets.items() if size}
        assert len(loaded) > 20 and origins(loaded) == {f"http://127.0.0.1:{router}"}
        assert all("ERR_CONNECTION_REFUSED" in complaint for complaint in page.complaints())


@pytest.mark.parametrize("rules", [
    "unset resp.http.Content-Encoding;", 'set resp.http.Content-Type = "text/html";',
    'set resp.http.Content-Type = "application/octet-stream";',
])
def test_a_page_comes_from_the_host_when_the_edge_spoils_its_scripts(
    packages: dict[str, Path], host: Host, router: int, tmp_path: Path, rules: str
) -> None:
    edge = Edge(packages["tree"], tmp_path, 18092, router, f"sub vcl_deliver {{ {rules} }}\n")
    try:
        use_assets_url(host, edge.url)
        with notebook(host, router) as (_, assets):
            served = [name for name in assets if name.startswith(f"http://127.0.0.1:{router}/")]
            assert len(served) > 20
    finally:
        edge.stop()


def test_a_page_loads_from_an_edge_that_removes_headers(
    packages: dict[str, Path], host: Host, router: int, tmp_path: Path
) -> None:
    removed = ("Access-Control-Allow-Origin", "Cache-Control", "Cross-Origin-Resource-Policy", "ETag", "Vary")
    rules = "".join(f"unset resp.http.{name}; " for name in removed)
    edge = Edge(packages["tree"], tmp_path, 18093, router, f"sub vcl_deliver {{ {rules}}}\n")
    try:
        use_assets_url(host, edge.url)
        with notebook(host, router) as (page, assets):
            assert len(assets) > 20 and edge.url in origins(assets)
            assert page.complaints() == []
    finally:
        edge.stop()


def test_the_router_serves_brotli_beside_gzip(router: int, digest: str) -> None:
    path = f"/assets/{digest}/{request(router, f'/assets/{digest}/ahead.json', {}).json()[1]}"
    plain, small, smaller = (request(router, path, {"Accept-Encoding": accepted})
                             for accepted in ("identity", "gzip, deflate", "gzip, deflate, br"))
    assert plain.body == gzip.decompress(small.body) == brotli.decompress(smaller.body)
    assert (small.headers["content-encoding"], smaller.headers["content-encoding"]) == ("gzip", "br")
    assert len(smaller.body) < 0.9 * len(small.body)
    assert all("Accept-Encoding" in answer.headers.get("vary", "") for answer in (plain, small, smaller))
    assert len({answer.headers["etag"] for answer in (plain, small, smaller)}) == 3


# --- object storage ---


@pytest.fixture(scope="session")
def storage() -> Iterator[Swift]:
    # In /var/tmp, because the object server needs extended attributes, which a tmpfs may lack.
    with tempfile.TemporaryDirectory(prefix="nbagent-swift-", dir="/var/tmp") as name, swift(Path(name)) as found:
        yield found


class Publisher:
    """`nbagent image assets publish` on this machine, with a copy of the host's store without the image's files."""

    def __init__(self, host: Host, digest: str, tree: Path, directory: Path) -> None:
        self.store, self.digest = directory / "images", digest
        (self.store / digest).mkdir(parents=True)
        for name in ("static", "image.json"):
            host.copy_out(f"/var/lib/nbagent/images/{digest}/{name}", self.store / digest / name)
        (self.store / "names").mkdir()
        (self.store / "names/minimal").symlink_to(f"../{digest}")
        self.environment = {name: value for name, value in os.environ.items() if name != "AWS_CA_BUNDLE"}
        # Unit tests that run at the same time check that /tmp has no new files.
        path = f"{tree}/usr/bin:{os.environ['PATH']}"
        self.environment |= {"TMPDIR": str(directory), "PATH": path, "PYTHONPATH": str(TOP)}

    def run(self, storage: Swift, target: str, *options: str, user: str = "tester") -> subprocess.CompletedProcess[str]:
        script = "import sys; from nbagent.cli import main; sys.exit(main())"
        return subprocess.run(
            [sys.executable, "-c", script, "image", "assets", "publish", "minimal", target, "--json",
             "--store", str(self.store), *options],
            env=self.environment | storage.remotes(user), capture_output=True, text=True, check=False)

    def publish(self, storage: Swift, target: str, *options: str) -> dict[str, Any]:
        done = self.run(storage, target, *options)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))


@pytest.fixture(scope="session")
def publisher(
    host: Host, digest: str, packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Publisher:
    return Publisher(host, digest, packages["tree"], tmp_path_factory.mktemp("publisher"))


@pytest.mark.parametrize("target", ["swift:by-swift", "s3:by-s3"])
def test_published_assets_have_types_encodings_and_cache_headers(
    publisher: Publisher, storage: Swift, digest: str, target: str
) -> None:
    bucket = target.partition(":")[2]
    storage.make_public(bucket)
    first = publisher.publish(storage, target)
    assert first["uploaded"] == first["files"] > 200
    again = publisher.publish(storage, target)
    assert (again["uploaded"], again["files"]) == (0, first["files"])
    base = f"{urlsplit(storage.public_url(bucket)).path}/assets/{digest}"
    paths = request(urlsplit(storage.url).port or 0, f"{base}/ahead.json", {}).json()
    static = publisher.store / digest / "static"
    font = next(static.rglob("*.woff2")).relative_to(static)
    for path, type_, encoding in (
        (paths[0].partition("?")[0], "javascript", "gzip"), ("favicon.ico", "icon", "gzip"), (str(font), "woff2", None),
    ):
        found = request(urlsplit(storage.url).port or 0, f"{base}/{path}", {})
        assert found.status == 200 and type_ in found.headers["content-type"], path
        assert found.headers.get("content-encoding") == encoding, path
        assert found.headers["cache-control"] == IMMUTABLE, path
        body = gzip.decompress(found.body) if encoding else found.body
        assert body == (static / path).read_bytes()
    # An upload that was interrupted is continued; images that the store does not have are removed when asked.
    storage.call("DELETE", f"{bucket}/assets/{digest}/{paths[0].partition('?')[0]}")
    storage.call("PUT", f"{bucket}/assets/sha256-{'1' * 64}/lab/main.1.js", {"Content-Length": "0"})
    storage.call("PUT", f"{bucket}/other/file", {"Content-Length": "0"})
    continued = publisher.publish(storage, target, "--remove-unused")
    assert (continued["uploaded"], continued["removed"]) == (1, [f"sha256-{'1' * 64}"])
    assert storage.call("HEAD", f"{bucket}/other/file") == 200


def test_a_target_that_is_full_or_not_ours_is_named(publisher: Publisher, storage: Swift) -> None:
    storage.make_public("small", **{"X-Container-Meta-Quota-Bytes": "1000"})
    storage.make_public("theirs")
    for target, user in (("swift:small", "tester"), ("s3:small", "tester"), ("swift:theirs", "guest"),
                         ("s3:theirs", "guest"), ("nowhere:x", "tester")):
        done = publisher.run(storage, target, user=user)
        assert done.returncode == 69, (target, done.stdout, done.stderr)
        assert f"{target} does not take the assets" in done.stderr and "Traceback" not in done.stderr


def test_a_page_loads_from_the_storage_and_from_the_host_what_is_not_there(
    publisher: Publisher, storage: Swift, host: Host, router: int
) -> None:
    storage.make_public("page")
    use_assets_url(host, storage.public_url("page"))
    with notebook(host, router) as (page, assets):
        loaded = {name: size for name, size in assets.items() if size}
        assert len(loaded) > 20 and origins(loaded) >= {f"http://127.0.0.1:{router}"}
        assert page.driver.execute_script("return document.scripts.length") > 1
    publisher.publish(storage, "swift:page")
    with notebook(host, router) as (page, assets):
        assert len(assets) > 20 and origins(assets) == {storage.url}
        assert page.complaints() == []
