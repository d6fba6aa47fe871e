# SPDX-License-Identifier: BSD-3-Clause
"""The content of a claim: files and their paths, URLs, and the prefixes that allow them."""

from __future__ import annotations

import base64

import pytest

from nbagent.core import urls
from nbagent.core.claim_content import (
    FILES_MAX,
    FILES_MAX_BYTES,
    File,
    checked_entries,
    parse_archive,
    parse_files,
)
from nbagent.core.errors import BadRequest, InvalidField
from nbagent.core.model import CLAIM_FIELDS, Bounds, parse_options

ALLOWED = ("https://data.example.org/courses/", "http://[::1]:8080")


def test_files_are_text_or_base64():
    given = {"a.ipynb": "{}", "deep/er/b.bin": {"base64": "AAEC/w=="}, "ä ü/€.txt": "ü"}
    assert parse_files(given) == (
        File("a.ipynb", b"{}"), File("deep/er/b.bin", b"\x00\x01\x02\xff"), File("ä ü/€.txt", "ü".encode())
    )


@pytest.mark.parametrize("path", [
    "", "/etc/passwd", "../x", "a/../b", "a/..", "./a", "a/./b", "a//b", "a/", "a\0b", "\ud800", "x" * 256,
    "/".join(["d" * 200] * 6),
])
def test_a_path_outside_the_home_directory_is_refused_by_name(path):
    with pytest.raises(InvalidField) as refused:
        parse_files({"good": "", path: "x"})
    assert refused.value.details["field"] == "files"
    assert refused.value.details["value"].startswith(repr(path)[:20])
    assert "path" in refused.value.details["expected"]


@pytest.mark.parametrize("data", [
    None, 7, [], {}, {"base64": 1}, {"base64": "AA"}, {"base64": "A A="}, {"base64": "AAEC\n"}, {"base64": "ä"},
    {"base64": "", "text": ""}, {"text": "x"}, "\udc80",
])
def test_data_that_is_neither_text_nor_base64_is_refused(data):
    with pytest.raises(InvalidField) as refused:
        parse_files({"a": data})
    assert "'a'" in str(refused.value) and refused.value.details["expected"]


@pytest.mark.parametrize("value", [
    None, "x", [], {f"f{i}": "" for i in range(FILES_MAX + 1)}, {"a": "x" * FILES_MAX_BYTES, "b": "x"},
    {"a": "ä" * (FILES_MAX_BYTES // 2 + 1)},
])
def test_too_many_and_too_large_are_refused_with_the_bound(value):
    with pytest.raises(InvalidField) as refused:
        parse_options({"files": value}, CLAIM_FIELDS, Bounds(1 << 30, 60, 1))
    assert str(FILES_MAX_BYTES) in refused.value.details["expected"]
    assert len(refused.value.details["value"]) <= 80


def test_the_largest_allowed_content_is_accepted():
    data = {"base64": base64.b64encode(bytes(FILES_MAX_BYTES // FILES_MAX)).decode()}
    given = {f"{number}": data for number in range(FILES_MAX)}
    assert len(parse_files(given)) == FILES_MAX


def test_one_path_cannot_be_a_file_and_a_directory():
    with pytest.raises(InvalidField, match="not both"):
        parse_files({"a": "", "a/b": ""})


@pytest.mark.parametrize("url", [
    "https://data.example.org/courses", "https://data.example.org/courses/one.tar.gz",
    "https://data.example.org:443/courses/a/b.zip?version=2", "HTTPS://Data.Example.ORG/courses//x",
    "https://data.example.org/%63ourses/x", "http://[::1]:8080/x",
])
def test_a_url_below_an_allowed_one_is_allowed(url):
    assert parse_archive(url, ALLOWED) == url


@pytest.mark.parametrize("url", [
    "http://data.example.org/courses/x", "https://data.example.org/", "https://data.example.org/courses-evil/x",
    "https://data.example.org/courses/../private", "https://data.example.org/courses/%2e%2e/private",
    "https://data.example.org/courses/..%2fprivate", "https://data.example.org/courses/..;a=b/private",
    "https://data.example.org/courses/%2E./private", "https://data.example.org/courses/..%5cprivate",
    "https://data.example.org/courses\\..\\private", "https://data.example.org:8443/courses/x",
    "https://data.example.org.evil.example/courses/x", "https://evil.example/https://data.example.org/courses/x",
    "https://data.example.org@evil.example/courses/x", "https://user:word@data.example.org/courses/x",
    "https://evil.example#@data.example.org/courses/x", "https://data.example.org/courses/x#y",
    "https://evil.example\\@data.example.org/courses/x", "//data.example.org/courses/x", "courses/x", "",
    "file:///courses/x", "ftp://data.example.org/courses/x", "https:data.example.org/courses/x",
    "https://data.example.org:x/courses/x", "https://data.example.org:99999/courses/x", "https://[::1/courses",
    "https://data.example.org/courses/\n", "https://data.example.org/cour\tses/x", "https://data.example.org/courses/ä",
    " https://data.example.org/courses/x", "https://dаta.example.org/courses/x",
    "https://data.example.org%2eevil.example/courses/x", "https://data.example.org/courses/%00",
    "https://data.example.org/courses/" + "x" * 2000,
    "http://[::1]:8081/x", "http://127.0.0.1:8080/x", None, 7, ["https://data.example.org/courses/x"],
])
def test_a_url_that_only_looks_allowed_is_refused(url):
    with pytest.raises(ValueError, match="URL"):
        parse_archive(url, ALLOWED)


def test_no_archive_is_allowed_unless_the_operator_configures_a_prefix():
    with pytest.raises(InvalidField, match=r"claims\.archives"):
        parse_options({"archive": "https://data.example.org/x.zip"}, CLAIM_FIELDS, Bounds(1 << 30, 60, 1))


def test_loopback_is_known_in_every_spelling_of_an_address():
    for host in ("127.0.0.1", "127.9.9.9:1", "[::1]"):
        assert urls.parse(f"http://{host}/").is_loopback()
    for host in ("localhost.example", "10.0.0.1", "[::2]", "127.1"):
        assert not urls.parse(f"http://{host}/").is_loopback()


@pytest.mark.parametrize(("files", "size"), [
    (None, 0), ({}, 0), ([["a", 1]], 2), ([["a"]], 0), ([["a", -1], ["b", 1]], 0), ([["a", True]], 1),
    ([["a", 1.0]], 1), ([["../a", 0]], 0), ([[7, 0]], 0), ([[f"f{number}", 0] for number in range(FILES_MAX + 1)], 0),
])
def test_entries_that_do_not_describe_the_bytes_are_refused(files, size):
    with pytest.raises(BadRequest):
        checked_entries(files, size)


def test_entries_are_paths_and_sizes():
    assert checked_entries([["a", 1], ["b/c", 0]], 1) == (("a", 1), ("b/c", 0))
