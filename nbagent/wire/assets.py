# SPDX-License-Identifier: BSD-3-Clause
"""The parts of JupyterLab that the router serves at an image's own address.

A slot's environment has the variable, with the address of the image's files and then the parts that are there.
"""

from __future__ import annotations

VARIABLE = "NBAGENT_ASSETS"
PROGRAM, EXTENSIONS = "lab", "lab-extensions"
# Below it, the router serves the web assets of an image by its digest.
ROUTER_PATH = "/assets/"
