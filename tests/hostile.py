# SPDX-License-Identifier: BSD-3-Clause
"""Hostile and damaged archives: the documents of unit tests, and the seeds of `tests/fuzz`.

Each is small. Its header lies about a size, a time, a name or an owner, or its form is one that a reader could follow
for ever. `TARS` and `ZIPS` have the expected reason beside each.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from typing import Any

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def header(name: str = "x", kind: bytes = tarfile.REGTYPE, **fields: Any) -> bytes:
    """One header of 512 bytes, whose numbers may be negative or too large for the field."""
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)[:BLOCK]


def pax(records: dict[str, bytes | str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header with these records."""
    content = b""
    for key, value in records.items():
        rest = b" " + key.encode() + b"=" + (value if isinstance(value, bytes) else value.encode()) + b"\n"
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length += 1
        content += str(length).encode() + rest
    return header("pax", kind, size=len(content)) + padded(content)


def long_name(kind: bytes, content: bytes) -> bytes:
    return header("././@LongLink", kind, size=len(content)) + padded(content)


def old_sparse(parts: list[tuple[int, int]], real_size: int, stored: int) -> bytes:
    """A header of GNU's oldest sparse format, with at most four parts."""
    block = bytearray(header("sparse", tarfile.GNUTYPE_SPARSE, size=stored))
    for number, (offset, size) in enumerate(parts):
        block[386 + 24 * number:386 + 24 * number + 24] = base256(offset) + base256(size)
    block[483:495] = base256(real_size)
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base256(number: int, width: int = 12) -> bytes:
    return bytes([0xFF if number < 0 else 0x80]) + (number % (1 << (8 * (width - 1)))).to_bytes(width - 1, "big")


def sparse(size: str, parts: str, name: str = "sparse") -> bytes:
    """An entry of pax format 0.1 without stored bytes."""
    return pax({"GNU.sparse.map": parts, "GNU.sparse.size": size, "GNU.sparse.name": name}) + header(name)


def sparse_1_0(real_size: str, content: bytes) -> bytes:
    """An entry of pax format 1.0, whose parts are at the beginning of its content."""
    records: dict[str, bytes | str] = {
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": real_size, "GNU.sparse.name": "s",
    }
    return pax(records) + header("s", size=len(padded(content))) + padded(content)


def file(name: str, content: bytes = b"", **fields: Any) -> bytes:
    return header(name, size=len(content), **fields) + padded(content)


def link(kind: bytes, name: str, target: str) -> bytes:
    return header(name, kind, linkname=target)


HUGE = 200 << 20
DEEP = "d/" * 101 + "x"
# Row 7 of what an attacker tried: it raised the limit of 1 MiB by 200 MiB, and then used them.
NEGATIVE_SPARSE = sparse(str(-HUGE), "0,0", "a") + sparse(str(HUGE), "0,0", "b") + END

# One empty file, by xz --lzma2=dict=300MiB. It is here as text because its creation takes as much memory.
_XZ_DICTIONARY = base64.b64decode(
    "/Td6WFoAAATm1rRGAgAhASEAAABs7xnO4AX/ADBdADwAM1AYaImC7aeAafra44WtbewfLSHziq4ToKFPKjpJJvShUk07nR0aXTSv"
    "PrvHtQApsdGvtyFMRwABTIAMAAAA4BH/QLHEZ/sCAAAAAARZWg=="
)

TARS: dict[str, tuple[bytes, str]] = {
    "negative-sparse": (NEGATIVE_SPARSE, "invalid size"),
    "negative-old-sparse": (old_sparse([(0, 0)], -HUGE, 0) + END, "invalid size"),
    "huge-sparse": (sparse(str(1 << 60), "0,0") + END, "larger than"),
    "sparse-not-ordered": (sparse("100", "50,10,0,10") + END, "not in order"),
    "sparse-overlapping": (sparse("100", "0,50,10,20") + END, "not in order"),
    "sparse-negative-part": (sparse("100", "0,-5,90,1") + END, "not in order"),
    "sparse-negative-offset": (sparse("100", "-5,10") + END, "not in order"),
    "sparse-beyond-its-size": (sparse("10", "0,100") + END, "invalid size"),
    "sparse-of-many-parts": (sparse("90000", ",".join(f"{n},0" for n in range(10_001))) + END, "10001 parts"),
    "sparse-odd-map": (sparse("10", "0,1,2") + END, ""),
    "sparse-words-in-map": (sparse("10", "a,b") + END, "not a readable archive"),
    "sparse-size-is-no-number": (sparse("inf", "0,0") + END, "not a readable archive"),
    "sparse-1.0-negative": (sparse_1_0(str(-HUGE), b"1\n0\n0\n") + END, "invalid size"),
    "sparse-1.0-endless-map": (sparse_1_0("1", b"999999999\n0\n0\n") + END, "not a readable archive"),
    "sparse-1.0-no-number": (sparse_1_0("1", b"x\n") + END, "not a readable archive"),
    "sparse-1.0-number-without-end": (sparse_1_0("1", b"1" * 400) + END, "not a readable archive"),
    "sparse-stored-2^60": (old_sparse([(0, 0)], 0, 1 << 60) + END, "larger than"),
    "time-inf": (pax({"mtime": "inf"}) + file("x") + END, "has the time inf"),
    "time-minus-inf": (pax({"mtime": "-inf"}) + file("x") + END, "has the time -inf"),
    "time-nan": (pax({"mtime": "nan"}) + file("x") + END, "has the time nan"),
    "time-1e999": (pax({"mtime": "1e999"}) + file("x") + END, "has the time inf"),
    "size-negative": (header("x", size=-512) + END, ""),
    "size-2^60": (header("x", size=1 << 60) + END, "larger than"),
    "size-2^80": (header("x", size=1 << 80) + END, "larger than"),
    "size-in-pax-negative": (pax({"size": "-512"}) + file("x") + END, ""),
    "size-in-pax-2^60": (pax({"size": str(1 << 60)}) + file("x") + END, "larger than"),
    "size-of-a-link": (header("x", tarfile.SYMTYPE, linkname="y", size=1 << 60) + b"y" * 600 + END, "damaged"),
    "size-of-an-unknown-type": (header("x", b"Z", size=1 << 60) + END, "larger than"),
    "owner-negative": (file("x", uid=-1) + END, "owner"),
    "owner-2^40": (file("x", gid=1 << 40) + END, "owner"),
    "owner-in-pax": (pax({"uid": str(1 << 63)}) + file("x") + END, "owner"),
    "device": (header("x", tarfile.CHRTYPE, devmajor=1, devminor=3) + END, "device|neither file"),
    "fifo": (header("x", tarfile.FIFOTYPE) + END, "device|neither file"),
    "hard-link-outside": (link(tarfile.LNKTYPE, "x", "../../etc/passwd") + END, '"\\.\\."'),
    "hard-link-to-itself": (link(tarfile.LNKTYPE, "x", "x") + END, "does not exist|No such file"),
    "hard-link-to-directory": (header("d", tarfile.DIRTYPE) + link(tarfile.LNKTYPE, "x", "d") + END,
                               "not a file|may not"),
    "hard-link-to-nothing": (link(tarfile.LNKTYPE, "x", "") + END, "to the root|neither file"),
    "link-empty": (link(tarfile.SYMTYPE, "x", "") + END, "expected 1 to"),
    "link-long": (long_name(tarfile.GNUTYPE_LONGLINK, b"a/" * 3000) + link(tarfile.SYMTYPE, "x", "y") + END,
                  "expected 1 to"),
    "link-with-nul": (pax({"linkpath": b"a\0b"}) + link(tarfile.SYMTYPE, "x", "y") + END, "expected 1 to"),
    "through-a-loop": (link(tarfile.SYMTYPE, "a", "b") + link(tarfile.SYMTYPE, "b", "a") + file("a/x", b"1") + END,
                       "is a link|too many"),
    "name-up": (file("a/../../x", b"1") + END, '"\\.\\."'),
    "name-with-nul": (pax({"path": b"a\0b"}) + file("x") + END, "NUL"),
    "name-of-300-bytes": (pax({"path": "n" * 300}) + file("x") + END, "longer than"),
    "name-of-5000-bytes": (pax({"path": "12345678/" * 90 + "n" * 255 + "/" + "m" * 255 + ("/" + "k" * 255) * 14})
                           + file("x") + END, "deep|longer than"),
    "name-deep": (pax({"path": DEEP}) + file("x") + END, "deep"),
    "name-very-deep": (long_name(tarfile.GNUTYPE_LONGNAME, b"d/" * 400_000) + file("x") + END, "deep"),
    "name-empty": (pax({"path": ""}) + file("x") + END, ""),
    "root-is-a-file": (file(".", b"1") + END, "root of the archive"),
    "long-names-repeated": (long_name(tarfile.GNUTYPE_LONGNAME, b"n") * 2000 + file("x") + END,
                            "extended|not a readable"),
    "pax-repeated": (pax({"a": "b"}) * 400 + file("x") + END, "not a readable archive"),
    "pax-2-MiB": (pax({"comment": "x" * (2 << 20)}) + file("x") + END, "extended header|larger than"),
    "pax-claims-2^40": (header("pax", tarfile.XHDTYPE, size=1 << 40) + END, ""),
    "pax-negative": (header("pax", tarfile.XHDTYPE, size=-512) + END, ""),
    "pax-length-0": (header("pax", tarfile.XHDTYPE, size=8) + padded(b"0 a=bbb\n") + file("x") + END, ""),
    "pax-length-99999": (header("pax", tarfile.XHDTYPE, size=12) + padded(b"99999 a=bbb\n") + file("x") + END, ""),
    "pax-digits": (header("pax", tarfile.XHDTYPE, size=5120) + b"1" * 5120 + file("x") + END, ""),
    "pax-at-the-end": (pax({"path": "y"}) + END, ""),
    "global-keys": (b"".join(pax({f"k{n}": "v"}, tarfile.XGLTYPE) + file(f"x{n}") for n in range(102)) + END,
                    "global headers|entries"),
    "global-size": (pax({"k": "v" * 70_000}, tarfile.XGLTYPE) + file("x") + END, "global headers"),
    "damaged-header": (file("x", b"1") + b"\1" * BLOCK + END, "damaged"),
    "cut-in-content": (file("x", b"1" * 2000)[:1000], "not a readable archive"),
    "cut-in-header": (header("x")[:300], "not a readable archive"),
    "without-end": (file("x", b"1"), "damaged or ends"),
    "concatenated": ((file("x", b"1") + END) * 2, "damaged or ends"),
    "gzip-bomb": (gzip.compress(file("x", bytes(3 << 20)) + END), "larger than"),
    "bzip2-bomb": (bz2.compress(file("x", bytes(3 << 20)) + END), "larger than"),
    "xz-bomb": (lzma.compress(file("x", bytes(3 << 20)) + END), "larger than"),
    "gzip-in-gzip": (gzip.compress(gzip.compress(file("x") + END)), "not a readable archive"),
    "gzip-members-without-end": (gzip.compress(b"") * 500, "not a readable archive"),
    "gzip-cut": (gzip.compress(file("x", b"1" * 5000) + END)[:-9], "not a readable archive"),
    "gzip-garbage-behind": (gzip.compress(file("x") + END) + b"garbage", "not a readable archive"),
    "xz-garbage-behind": (lzma.compress(file("x") + END) + b"garbage", "not a readable archive"),
    "xz-dictionary-of-300-MiB": (_XZ_DICTIONARY, "[Mm]emory usage limit"),
    "empty": (b"", "not a readable archive|damaged"),
}

# Documents with unusual values that are valid.
VALID_TARS: dict[str, bytes] = {
    "time-negative": file("x", mtime=-5) + END,
    "time-1e30": pax({"mtime": "1e30"}) + file("x") + END,
    "name-with-newline": file("a\nb", b"1") + END,
    "name-not-utf-8": pax({"hdrcharset": "BINARY", "path": b"\xff\xfe"}) + file("x") + END,
    "sparse": sparse_1_0("5000", b"2\n1000\n3\n4000\n2\n".ljust(512, b"\0") + b"abcde") + END,
    "xz-twice": lzma.compress(file("x", b"1")) + bytes(8) + lzma.compress(END),
    "global": pax({"comment": "0123"}, tarfile.XGLTYPE) + file("x") + END,
    "directory-with-size": header("d", tarfile.DIRTYPE, size=100) + END,
}


def zipped(name: str = "x", content: bytes = b"1", mode: int = 0o100644, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.compress_type, info.external_attr = method, mode << 16
        archive.writestr(info, content)
    return buffer.getvalue()


def patched(archive: bytes, magic: bytes, at: int, value: bytes) -> bytes:
    """`archive` with other bytes at an offset from the last occurrence of `magic`."""
    start = archive.rindex(magic) + at
    return archive[:start] + value + archive[start + len(value):]


_CENTRAL, _END = b"PK\1\2", b"PK\5\6"
_BOMB = zipped(content=bytes(3 << 20))
ZIPS: dict[str, tuple[bytes, str]] = {
    "bomb": (_BOMB, "larger than"),
    "bomb-that-claims-1-byte": (patched(_BOMB, _CENTRAL, 24, struct.pack("<I", 1)), ""),
    "list-of-4-GiB": (patched(zipped(), _END, 12, struct.pack("<I", 0xFFFFFFF0)), "readable"),
    "list-at-4-GiB": (patched(zipped(), _END, 16, struct.pack("<I", 0xFFFFFFF0)), "readable"),
    "header-elsewhere": (patched(zipped(), _CENTRAL, 42, struct.pack("<I", 0x7FFFFFFF)), "readable"),
    "unknown-method": (patched(zipped(), _CENTRAL, 10, struct.pack("<H", 99)), "readable"),
    "encrypted": (patched(zipped(), _CENTRAL, 8, struct.pack("<H", 1)), "readable"),
    "bad-lzma": (patched(zipped(method=zipfile.ZIP_LZMA), b"PK\3\4", 31, b"\xff" * 9), "readable"),
    "bad-checksum": (patched(zipped(), _CENTRAL, 16, b"abcd"), "readable"),
    "link-outside": (zipped("l", b"../beside", 0o120777), "outside"),
    "link-long": (zipped("l", b"a/" * 3000, 0o120777), "expected 1 to"),
    "link-not-utf-8": (zipped("l", b"\xff\xff", 0o120777), "readable"),
    "link-with-nul": (zipped("l", b"a\0b", 0o120777), "expected 1 to"),
    "name-up": (zipped("../x"), '"\\.\\."'),
    "name-deep": (zipped(DEEP), "deep"),
    "name-long": (zipped("n" * 300), "longer than"),
    "cut": (zipped()[:-30], "readable"),
    "only-magic": (b"PK\3\4", "readable"),
}
