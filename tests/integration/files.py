# SPDX-License-Identifier: BSD-3-Clause
"""Tries operations on files that programs make, each in a directory of its own; prints {name: result} as JSON.

    python3 files.py DIRECTORY

DIRECTORY has a directory `given` with a file `given/sub/file` of 6 bytes, `before`, which came with the image. A result
is what the operation returned, in values that do not depend on the place, or the name of its errno. test_files.py
compares the results in a slot with those of ext4. Standard library only; Python 3.9 and up.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import shutil
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import time

libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, AT_SYMLINK_FOLLOW, RENAME_NOREPLACE, RENAME_EXCHANGE, PUNCH_HOLE_KEEP_SIZE = -100, 0x400, 1, 2, 3
MEBIBYTE = 1 << 20
operations = []


def operation(function):
    operations.append(function)
    return function


def write(path, content=b"content"):
    with open(path, "wb") as file:
        file.write(content)


def read(path):
    with open(path, "rb") as file:
        return file.read().decode()


def called(name, *arguments):
    """A function of the C library; raises OSError."""
    result = getattr(libc, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def tree(top):
    """Makes a directory with two levels."""
    os.makedirs(f"{top}/sub/deep")
    write(f"{top}/sub/file")
    write(f"{top}/sub/deep/file")


@operation
def one_device_for_files_and_directories():
    tree("a")
    found = [os.lstat(at).st_dev for at in (".", "a", "a/sub", "a/sub/file", "given", "given/sub", "given/sub/file")]
    return len(set(found))


@operation
def ismount_of_a_directory():
    os.mkdir("a")
    return os.path.ismount("a")


@operation
def find_on_one_file_system():
    tree("a")
    given = os.path.isdir("given")
    found = subprocess.run(["find", "a", "given", "-xdev"], stdout=subprocess.PIPE, text=True, check=given).stdout
    return sorted(found.split())


@operation
def du_of_a_file():
    write("a", b"x" * MEBIBYTE)
    return int(subprocess.run(["du", "-k", "a"], stdout=subprocess.PIPE, text=True, check=True).stdout.split()[0])


@operation
def space_after_unlink():
    before = os.statvfs(".").f_bavail
    write("a", b"x" * 8 * MEBIBYTE)
    os.sync()
    used = before - os.statvfs(".").f_bavail >= 4 * MEBIBYTE // os.statvfs(".").f_frsize
    os.unlink("a")
    return used


@operation
def hard_link():
    write("a")
    os.mkdir("b")
    os.link("a", "b/a")
    write("a", b"changed")
    return os.stat("b/a").st_nlink, os.path.samefile("a", "b/a"), read("b/a")


@operation
def hard_link_of_a_file_of_the_image():
    os.link("given/sub/file", "a")
    with open("a", "r+b") as file:
        file.write(b"BE")
    return os.stat("a").st_nlink, os.path.samefile("a", "given/sub/file"), read("given/sub/file")


@operation
def temporary_file_without_a_name():
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(fd, b"content")
    source = f"/proc/self/fd/{fd}".encode()
    called("linkat", AT_FDCWD, source, AT_FDCWD, b"a", AT_SYMLINK_FOLLOW)
    os.close(fd)
    return read("a"), tempfile.TemporaryFile(dir=".").write(b"x")


@operation
def user_attributes():
    write("a")
    os.setxattr("a", "user.name", b"value")
    os.mkdir("b")
    os.setxattr("b", "user.name", b"value")
    os.setxattr("given/sub/file", "user.name", b"value")
    return os.getxattr("a", "user.name").decode(), [os.listxattr(name) for name in ("a", "b")]


@operation
def access_control_list():
    """POSIX ACL with an entry of another user."""
    write("a")
    entries = ((1, 6, -1), (2, 4, os.getuid() + 1), (4, 0, -1), (16, 4, -1), (32, 0, -1))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    os.setxattr("a", "system.posix_acl_access", acl)
    return len(os.getxattr("a", "system.posix_acl_access")), oct(os.stat("a").st_mode)


def other_process(code):
    """The output of another Python."""
    return subprocess.run([sys.executable, "-ISc", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


@operation
def flock():
    with open("a", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        again = "import fcntl\ntry: fcntl.flock(open('a'), 6)\n"
        return other_process(again + "except OSError as e: print(e.errno == 11)\nelse: print()")


@operation
def lock_of_a_range():
    with open("a", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 5)
        again = "import fcntl; f = open('a', 'r+')\nfcntl.lockf(f, 6, 5)\n"
        return other_process(again + "try: fcntl.lockf(f, 6, 1, 7)\nexcept OSError as e: print(e.errno in (11, 13))")


@operation
def lock_of_a_file_of_the_image():
    """A reader and a writer lock the same file."""
    with open("given/sub/file") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        again = "import fcntl\ntry: fcntl.flock(open('given/sub/file', 'r+'), 6)\n"
        return other_process(again + "except OSError as e: print(e.errno == 11)\nelse: print()")


@operation
def sparse_file():
    with open("a", "wb") as file:
        file.truncate(64 * MEBIBYTE)
        file.seek(32 * MEBIBYTE)
        file.write(b"x")
        file.flush()
        data = os.lseek(file.fileno(), 0, os.SEEK_DATA)
        hole = os.lseek(file.fileno(), data, os.SEEK_HOLE)
    return os.stat("a").st_size, os.stat("a").st_blocks * 512 <= 64 << 10, data, hole


@operation
def hole_in_a_file():
    with open("a", "wb") as file:
        file.write(b"x" * MEBIBYTE)
        file.flush()
        arguments = (ctypes.c_long(0), ctypes.c_long(512 << 10))
        called("fallocate", file.fileno(), PUNCH_HOLE_KEEP_SIZE, *arguments)
    return os.stat("a").st_size, os.stat("a").st_blocks * 512 <= 600 << 10


@operation
def allocated_file():
    with open("a", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, MEBIBYTE)
    return os.stat("a").st_size, os.stat("a").st_blocks * 512 >= MEBIBYTE


@operation
def times():
    write("a")
    os.utime("a", ns=(1_000_000_001, 1_500_000_000_123_456_789))
    os.chmod("a", 0o600)
    status = os.stat("a")
    return status.st_mtime_ns, status.st_atime_ns, time.time() - status.st_ctime < 60


@operation
def times_of_a_directory():
    os.mkdir("a")
    os.utime("a", ns=(0, 0))
    write("a/file")
    after_write = os.stat("a").st_mtime_ns > 0
    os.utime("a", ns=(0, 0))
    write("a/file", b"changed")
    return after_write, os.stat("a").st_mtime_ns


@operation
def times_of_a_file_of_the_image():
    before = os.stat("given/sub/file").st_mtime_ns
    os.chmod("given/sub/file", 0o600)
    return os.stat("given/sub/file").st_mtime_ns == before


@operation
def inotify():
    watch = called("inotify_init1", os.O_NONBLOCK)
    called("inotify_add_watch", watch, b".", 0xFFF)
    called("inotify_add_watch", watch, b"given/sub", 0xFFF)
    write("a")
    os.rename("a", "b")
    os.unlink("b")
    with open("given/sub/file", "ab") as file:
        file.write(b"x")
    os.mkdir("c")
    events, queue = [], os.read(watch, 65536)
    while queue:
        _, mask, _, length = struct.unpack("iIII", queue[:16])
        events.append((hex(mask), queue[16 : 16 + length].rstrip(b"\0").decode()))
        queue = queue[16 + length :]
    os.close(watch)
    return events


@operation
def inotify_of_a_file_of_the_image():
    watch = called("inotify_init1", os.O_NONBLOCK)
    called("inotify_add_watch", watch, b"given/sub/file", 0x2)
    with open("given/sub/file", "ab") as file:
        file.write(b"x")
    try:
        return len(os.read(watch, 4096)) > 0
    finally:
        os.close(watch)


@operation
def reader_of_a_file_of_the_image_sees_a_write():
    with open("given/sub/file", "rb", buffering=0) as reader:
        with open("given/sub/file", "r+b", buffering=0) as writer:
            writer.write(b"BEFORE")
        return reader.read().decode(), os.fstat(reader.fileno()).st_ino == os.stat("given/sub/file").st_ino


@operation
def shared_mapping():
    write("a", b"\0" * 8192)
    with open("a", "r+b") as file, mmap.mmap(file.fileno(), 8192) as first, mmap.mmap(file.fileno(), 8192) as second:
        first[4096:4099] = b"abc"
        first.flush()
        return second[4096:4099].decode()


@operation
def rename_a_file():
    write("a")
    write("b", b"other")
    os.rename("a", "b")
    return read("b"), os.path.exists("a")


@operation
def rename_a_new_directory():
    tree("a")
    os.rename("a", "b")
    os.mkdir("c")
    os.rename("b", "c/b")
    return sorted(os.listdir("c/b/sub"))


@operation
def move_a_new_directory_into_one_of_the_image():
    tree("a")
    os.rename("a", "given/a")
    return sorted(os.listdir("given/a/sub"))


@operation
def rename_a_directory_of_the_image():
    os.rename("given", "b")
    os.mkdir("c")
    os.rename("b/sub", "c/sub")
    return read("c/sub/file"), os.listdir("b")


@operation
def rename_over_a_directory():
    tree("a")
    os.mkdir("b")
    os.rename("a", "b")
    os.mkdir("a")
    try:
        os.rename("a", "b")
    except OSError as error:
        return errno.errorcode[error.errno]


@operation
def exchange():
    tree("a")
    write("b")
    called("renameat2", AT_FDCWD, b"a", AT_FDCWD, b"b", RENAME_EXCHANGE)
    return read("a"), os.listdir("b")


@operation
def rename_without_replacement():
    write("a")
    write("b")
    called("renameat2", AT_FDCWD, b"a", AT_FDCWD, b"b", RENAME_NOREPLACE)


@operation
def remove_a_new_tree():
    tree("a")
    shutil.rmtree("a")
    return os.path.exists("a")


@operation
def remove_a_tree_of_the_image():
    shutil.rmtree("given")
    os.mkdir("given")
    return os.listdir("given")


@operation
def remove_a_directory_of_the_image():
    os.unlink("given/sub/file")
    os.rmdir("given/sub")
    return os.listdir("given")


@operation
def unlink_an_open_file():
    with open("a", "w+b", buffering=0) as file:
        os.unlink("a")
        file.write(b"content")
        file.seek(0)
        return file.read().decode(), os.fstat(file.fileno()).st_nlink


@operation
def special_files():
    os.mkfifo("a")
    os.symlink("a", "b")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("c")
    return stat.S_ISFIFO(os.stat("b").st_mode), stat.S_ISSOCK(os.stat("c").st_mode)


@operation
def names():
    for name in ("n" * 255, "ü €", "new\nline", "\\", b"\xff\xfe"):
        write(name)
    write("A", b"upper")
    write("a", b"lower")
    return read("A"), len(os.listdir("."))


@operation
def name_of_256_bytes():
    write("n" * 256)


@operation
def modes():
    os.mkdir("a", 0o700)
    os.chmod("a", 0o2755)
    write("a/b")
    os.chmod("a/b", 0o4711)
    return [oct(os.stat(name).st_mode) for name in ("a", "a/b")]


@operation
def copy_within_the_kernel():
    write("a")
    with open("a", "rb") as source, open("b", "wb") as target:
        return os.copy_file_range(source.fileno(), target.fileno(), 7)


@operation
def direct_input_and_output():
    os.close(os.open("a", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))


@operation
def database():
    with sqlite3.connect("a.db") as connection:
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        connection.execute("CREATE TABLE t (x)")
        connection.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(100)])
        with sqlite3.connect("a.db") as other:
            return mode, other.execute("SELECT count(*) FROM t").fetchone()[0], connection.commit()


@operation
def execute_a_script():
    write("a", b"#!/bin/sh\necho ran\n")
    os.chmod("a", 0o755)
    return subprocess.run(["./a"], stdout=subprocess.PIPE, text=True, check=True).stdout


def main():
    os.umask(0o022)
    top = os.path.realpath(sys.argv[1])
    found, only = {}, sys.argv[2:]
    for function in operations:
        if only and function.__name__ not in only:
            continue
        # Each in a process of its own, in a directory of its own that is a part of the one that came with the image.
        if (child := os.fork()) == 0:
            os.chdir(f"{top}/{function.__name__}")
            try:
                result = function()
            except OSError as error:
                result = errno.errorcode[error.errno]
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
            with open(f"{top}/{function.__name__}.json", "w") as file:
                json.dump(result, file)
            os._exit(0)
        os.waitpid(child, 0)
        with open(f"{top}/{function.__name__}.json") as file:
            found[function.__name__] = json.load(file)
    print(json.dumps(found))


def give(top):
    """Makes what the image gives to each operation, as the builder of the image."""
    for function in operations:
        os.makedirs(f"{top}/{function.__name__}/given/sub")
        write(f"{top}/{function.__name__}/given/sub/file", b"before")


if __name__ == "__main__":
    if sys.argv[1] == "--give":
        give(sys.argv[2])
    else:
        main()
