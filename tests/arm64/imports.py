# SPDX-License-Identifier: BSD-3-Clause
"""Imports every module of nbagent; prints a line for each that cannot be imported, and their number."""

import importlib
import pkgutil

import nbagent

count = 0
for module in pkgutil.walk_packages(nbagent.__path__, "nbagent."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
        count += 1
    except Exception as error:
        print(f"{module.name}: {error!r}")
print(f"{count} modules")
