# SPDX-License-Identifier: BSD-3-Clause
"""Deletes the trees that the supervisor has retired: python3 -I -m nbagent.image, as nbagent-sweep.service."""

from __future__ import annotations

from nbagent.image.store import ImageStore

if __name__ == "__main__":
    ImageStore().sweep()
