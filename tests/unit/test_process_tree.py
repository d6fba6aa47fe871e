# SPDX-License-Identifier: BSD-3-Clause
"""A server's children for psutil, in real processes."""

import json
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
# The parent is a fork server: of a server, which prints, and of a kernel with a child of its own.
TREE = """
import json, os, subprocess, sys, psutil
from nbagent.zygote import process_tree
def names(process, **options):
    return sorted(child.cmdline()[-1] for child in process.children(**options))
kernel = subprocess.Popen(["sh", "-c", "sleep 61 & wait", "kernel"])
while names(psutil.Process(kernel.pid)) != ["61"]:
    pass
own, server = os.pipe(), os.fork()
if server:
    os.waitpid(server, 0)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    sys.exit()
mine = subprocess.Popen(["sleep", "62"])
while names(psutil.Process()) != ["62"]:
    pass
before = names(psutil.Process(), recursive=True)
process_tree.adopt_kernels()
found = [before, names(psutil.Process()), names(psutil.Process(), recursive=True), names(psutil.Process(kernel.pid))]
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, json.dumps(names(psutil.Process())).encode())
    os._exit(0)
print(json.dumps([*found, json.loads(os.read(reader, 999))]), flush=True)
mine.kill()
"""


def test_the_kernels_are_children_of_the_server_with_their_descendants():
    command = [sys.executable, "-c", TREE]
    done = subprocess.run(command, cwd=TOP, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == [["62"], ["62", "kernel"], ["61", "62", "kernel"], ["61"], []]
