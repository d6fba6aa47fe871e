#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
"""The lower bound of a slot: a bare fork. Runs inside an image's root, under its own Python; prints JSON.

Imports the modules of a notebook server with a kernel, as a zygote does, and forks children that do nothing.
Milliseconds from fork() until a byte of the child arrives; private KiB of a child, its PSS, its page tables, and the
decrease of MemAvailable for each.
"""

import gc
import importlib
import json
import os
import re
import time

COUNT = 200


def kib(text, name):
    return int(re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)[1])


def read(path):
    with open(path) as file:
        return file.read()


def main():
    gc.disable()
    for name in ("jupyterlab.labapp", "ipykernel.kernelapp", "IPython.core.completer", "debugpy"):
        importlib.import_module(name)
    gc.freeze()
    stay, leave = os.pipe()
    heard, say = os.pipe()
    children, took_ms = [], []
    before = kib(read("/proc/meminfo"), "MemAvailable")
    for _ in range(COUNT):
        began_s = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            os.close(leave)
            os.write(say, b".")
            os.read(stay, 1)
            os._exit(0)
        os.read(heard, 1)
        took_ms.append(1000 * (time.perf_counter() - began_s))
        children.append(pid)
    time.sleep(0.5)
    taken = (before - kib(read("/proc/meminfo"), "MemAvailable")) / COUNT
    rollups = [read(f"/proc/{pid}/smaps_rollup") for pid in children]
    private = sum(kib(text, "Private_Clean") + kib(text, "Private_Dirty") for text in rollups) / COUNT
    pss = sum(kib(text, "Pss") for text in rollups) / COUNT
    tables = sum(kib(read(f"/proc/{pid}/status"), "VmPTE") for pid in children) / COUNT
    rss = kib(read("/proc/self/status"), "VmRSS")
    os.close(leave)
    for pid in children:
        os.waitpid(pid, 0)
    print(json.dumps({"count": COUNT, "took_ms": took_ms, "rss": rss, "private": private, "pss": pss,
                      "page_tables": tables, "taken": taken}))


if __name__ == "__main__":
    main()
