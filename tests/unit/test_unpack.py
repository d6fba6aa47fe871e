# SPDX-License-Identifier: BSD-3-Clause
"""The delivery of content inside a slot: files below one directory, downloads from real web servers, archives."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import ssl
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nbagent.content import download
from nbagent.content.beneath_writer import BeneathWriter
from nbagent.content.unpack import UnpackLimits, unpack
from nbagent.untrusted.refusal import Refused

LIMITS = UnpackLimits(1 << 20, 20)


@pytest.fixture
def top(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "beside").mkdir()
    return tmp_path


@pytest.fixture
def home(top):
    with BeneathWriter(str(top / "home")) as home:
        yield home
    assert os.listdir(top / "beside") == [], "written outside of the home directory"


def tar(*members, kind=tarfile.PAX_FORMAT):
    """A tar archive of (name, content, fields of TarInfo)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, content, fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(*members):
    """A .zip of (name, content, mode)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = mode << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def tree(top):
    return sorted(str(path.relative_to(top)) for path in top.rglob("*"))


NOISE = random.Random(1).randbytes(300_000)
GOOD = tar(
    ("course", b"", {"type": tarfile.DIRTYPE, "mode": 0o700}),
    ("course/one.ipynb", NOISE, {"mode": 0o4755, "uid": 0, "gid": 0}),
    ("/deep/er/two.txt", b"2", {"mode": 0o622}),
    ("course/link", b"", {"type": tarfile.SYMTYPE, "linkname": "../deep/er/two.txt"}),
    ("course/hard", b"", {"type": tarfile.LNKTYPE, "linkname": "course/one.ipynb"}),
)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress],
                         ids=["tar", "gz", "bz2", "xz"])
def test_a_tar_archive_is_unpacked_with_every_compression(home, top, pack):
    assert unpack(io.BytesIO(pack(GOOD)), home, LIMITS) == 5
    course = top / "home/course"
    assert (course / "one.ipynb").read_bytes() == (course / "hard").read_bytes() == NOISE
    assert (course / "link").read_bytes() == b"2"
    assert stat.S_IMODE((course / "one.ipynb").stat().st_mode) == 0o755
    assert stat.S_IMODE((top / "home/deep/er/two.txt").stat().st_mode) == 0o644
    assert (course / "one.ipynb").stat().st_uid == os.getuid()


def test_a_zip_archive_is_unpacked(home, top):
    archive = zipped(("a/", b"", 0o40755), ("a/b.py", NOISE, 0o100755), ("a/c", b"b.py", 0o120777), ("d", b"", 0))
    assert unpack(io.BytesIO(archive), home, LIMITS) == 4
    assert (top / "home/a/c").read_bytes() == NOISE
    assert stat.S_IMODE((top / "home/a/b.py").stat().st_mode) == 0o755


@pytest.mark.parametrize(("archive", "reason"), [
    (tar(("../beside/x", b"1", {})), "has \"..\""),
    (tar(("a/../../beside/x", b"1", {})), "has \"..\""),
    (tar(("l", b"", {"type": tarfile.SYMTYPE, "linkname": "../beside"})), "outside"),
    (tar(("l", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc"})), "outside"),
    (tar(("a/l", b"", {"type": tarfile.SYMTYPE, "linkname": "x/../../../beside"})), "outside"),
    (tar(("h", b"", {"type": tarfile.LNKTYPE, "linkname": "../beside/x"})), "has \"..\""),
    (tar(("h", b"", {"type": tarfile.LNKTYPE, "linkname": "nowhere"})), "h: No such file"),
    (tar(("out/x", b"1", {})), "leads out"),
    (tar(("d/x", b"1", {}), ("d", b"1", {})), "a directory has this name"),
    (tar(("f", b"1", {}), ("f/x", b"1", {})), "a part of the path is a file"),
    (tar(("n", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})), "neither file"),
    (tar(("n", b"", {"type": tarfile.FIFOTYPE})), "neither file"),
    (tar((".", b"1", {})), "root of the archive"),
    (zipped(("../beside/x", b"1", 0)), "has \"..\""),
    (zipped(("l", b"../beside", 0o120777), ("l/x", b"1", 0)), "outside"),
    (zipped(("out/x", b"1", 0)), "leads out"),
    (tar(*((f"{i}", b"", {}) for i in range(21))), "more than 20 entries"),
    (zipped(*((f"{i}", b"", 0) for i in range(21))), "more than 20 entries"),
    (gzip.compress(tar(("bomb", bytes(2 << 20), {}))), "larger than 1048576 bytes when unpacked"),
    (zipped(("bomb", bytes(2 << 20), 0)), "larger than 1048576 bytes when unpacked"),
    (tar(("x", b"", {"pax_headers": {"comment": "x" * (2 << 20)}})), "larger than"),
    (GOOD[:200_000], "not a readable archive"),
    (GOOD[:1000], "not a readable archive"),
    (gzip.compress(GOOD)[:-100], "not a readable archive"),
    (gzip.compress(GOOD)[:-8] + b"\0" * 8, "not a readable archive"),
    (bz2.compress(GOOD)[:1000] + b"x" * 1000, "not a readable archive"),
    (lzma.compress(GOOD)[:-100], "not a readable archive"),
    (GOOD[:512] + b"x" * 512 + GOOD[1024:], "not a readable archive"),
    (zipped(("a", NOISE, 0))[:-100], "not a readable archive"),
    (b"<!DOCTYPE html><p>Log in" + b" " * 2000, "not a readable archive"),
    (b"", "not a readable archive"),
], ids=lambda value: value if isinstance(value, str) else "archive")
def test_a_hostile_or_damaged_archive_is_refused_with_the_reason(home, top, archive, reason):
    (top / "home/out").symlink_to("../beside")
    with pytest.raises(Refused, match=reason):
        unpack(io.BytesIO(archive), home, LIMITS)


def test_a_sparse_file_counts_with_its_written_bytes(home):
    sparse = tar(("s", b"1", {"pax_headers": {
        "GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40), "GNU.sparse.name": "s"}}))
    with pytest.raises(Refused, match="larger than 1048576 bytes when unpacked"):
        unpack(io.BytesIO(sparse), home, LIMITS)


def test_a_link_that_stays_inside_is_followed_on_the_way_and_replaced_at_the_end(home, top):
    (top / "home/real").mkdir()
    (top / "home/real/old").write_text("old")
    (top / "home/way").symlink_to("real")
    (top / "home/end").symlink_to("real/old")
    (top / "home/far").symlink_to("../beside/x")
    home.write(("way", "x"), [b"1"])
    home.write(("end",), [b"new"])
    home.write(("far",), [b"new"])
    assert (top / "home/real/x").read_text() == "1"
    assert (top / "home/real/old").read_text() == "old"
    assert not (top / "home/end").is_symlink() and (top / "home/far").read_text() == "new"


@pytest.mark.parametrize(("path", "reason"), [
    ("out/x", "leads out"), ("root/x", "leads out"), ("loop/x", "too many"), ("none/x", "something else"),
    ("file/x", "is a file"), ("full", "a directory"), ("proc/x", "leads out"),
])
def test_a_path_that_cannot_be_written_is_refused_with_the_reason(home, top, path, reason):
    inside = top / "home"
    for name, target in (("out", "../beside"), ("root", "/"), ("loop", "loop"), ("none", "nowhere"),
                         ("proc", "/proc/self/cwd")):
        (inside / name).symlink_to(target)
    (inside / "file").touch()
    (inside / "full").mkdir()
    with pytest.raises(Refused, match=reason):
        home.write(tuple(path.split("/")), [b"1"])


class Site(BaseHTTPRequestHandler):
    """A web server with redirects, errors, a short response and one that never comes."""

    made = b""

    def do_GET(self):
        where = {
            "/ok/a.tar": None, "/ok/there": "/ok/a.tar", "/ok/here": "a.tar", "/ok/round": "/ok/round",
            "/ok/out": "/private", "/ok/user": "http://u:p@127.0.0.1/ok/", "/ok/dots": "/ok/%2e%2e/private",
            "/ok/nowhere": "",
        }.get(self.path, self.path)
        if self.path == "/ok/short":
            self.respond(200, GOOD[:100_000], length=len(GOOD))
        elif self.path == "/ok/silent":
            self.server.released.wait(30)
        elif self.path == "/ok/made":
            self.respond(200, self.made)
        elif where is None:
            self.respond(200, GOOD)
        elif where == self.path:
            self.respond(302 if "round" in where else 404, b"", where)
        else:
            self.respond(307, b"", where)

    def respond(self, status, body, location=None, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if location is not None:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.released = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(url, site, home):
    with download.get(url, [f"{site}/ok/"], ssl.create_default_context()) as body:
        return unpack(body, home, LIMITS)


@pytest.mark.parametrize("path", ["/ok/a.tar", "/ok/there", "/ok/here"])
def test_an_archive_is_fetched_and_redirects_are_followed(site, home, path):
    assert fetched(site + path, site, home) == 5


@pytest.mark.parametrize(("path", "reason"), [
    ("/ok/nothing", "the server responded 404 Not Found"), ("/ok/out", "/private, which this host does not allow"),
    ("/ok/user", "not a valid URL"), ("/ok/dots", "not a valid URL"),
    ("/ok/round", "more than 5 times"), ("/ok/short", "bytes too early"), ("/ok/nowhere", "more than 5 times"),
    ("/ok/silent", "timed out"),
])
def test_a_failed_download_names_the_server_and_the_reason(site, home, path, reason, monkeypatch):
    monkeypatch.setattr(download, "SILENCE_S", 0.5 if "silent" in path else 30)
    with pytest.raises(Refused, match=reason):
        fetched(site + path, site, home)


ALONE = """
import ssl, sys
from nbagent.content import download, unpack
from nbagent.content.beneath_writer import BeneathWriter
url, certificate, path = sys.argv[1:]
context = ssl.create_default_context(cafile=certificate)
loaded = set(sys.modules)
sys.path.clear()
sys.path_importer_cache.clear()
with BeneathWriter(path) as home, download.get(url, [url], context) as body:
    entries = unpack.unpack(body, home, unpack.UnpackLimits(1 << 20, 20))
print(entries, *sorted(set(sys.modules) - loaded))
"""


@pytest.fixture
def secure_site(tmp_path):
    """A server at https://localhost, and its certificate."""
    files = [str(tmp_path / name) for name in ("certificate", "key")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", files[0], "-keyout", files[1]],
        check=True, capture_output=True,
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    with context.wrap_socket(server.socket, server_side=True) as server.socket:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"https://localhost:{server.server_address[1]}", files[0]
        server.shutdown()
        thread.join()
    server.server_close()


@pytest.mark.parametrize(("name", "archive"), [
    ("gz", gzip.compress(GOOD)), ("bz2", bz2.compress(GOOD)), ("xz", lzma.compress(GOOD)),
    ("zip", zipped(*((f"{i}", b"", 0) for i in range(4)), ("x", b"1", 0)).replace(b"x", b"\x81")),
], ids=lambda value: value if isinstance(value, str) else "")
def test_download_and_unpacking_import_no_module_inside_the_slot(secure_site, home, top, monkeypatch, name, archive):
    url, certificate = secure_site
    monkeypatch.setattr(Site, "made", archive)
    argv = [sys.executable, "-c", ALONE, f"{url}/ok/made", certificate, str(top / "home")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("5\n", "")


def test_an_unreachable_server_is_named(site, home):
    with pytest.raises(Refused, match=r"127\.0\.0\.1: "):
        fetched("http://127.0.0.1:1/ok/x", "http://127.0.0.1:1", home)
