# SPDX-License-Identifier: BSD-3-Clause
"""The sandbox and limits of a zygote by the present settings, and its identity, which has their hash.

A supervisor compares the identity of a former supervisor's zygote with that of a new one (`former_zygotes`).
"""

from __future__ import annotations

import hashlib
import json
import os

import nbagent
from nbagent.config.host_config import HostConfig
from nbagent.core.model import Limits
from nbagent.image.store import Image
from nbagent.runtime.zygote_service import PROTOCOL
from nbagent.sandbox.spec import SandboxSpec
from nbagent.supervisor.sandbox_specs import default_limits, zygote_spec

CPU_WEIGHT = 100


def unit_of(instance: str) -> str:
    """The unit of the zygote and its service; `instance` is IMAGE:GENERATION."""
    return f"nbagent-zygote@{instance}.service"


def sandbox(settings: HostConfig, image: Image, *, quick: bool) -> SandboxSpec:
    """The sandbox of a new zygote. A `quick` one has no warm-up."""
    return zygote_spec(image, settings.slots.storage_bytes, default_limits(settings.slots), quick=quick)


def limits(settings: HostConfig) -> Limits:
    """The limits of a zygote's unit."""
    return Limits(settings.pool.zygote_memory, CPU_WEIGHT, None, settings.slots.tasks)


def identity(settings: HostConfig, image: Image, *, quick: bool) -> dict[str, object]:
    """The facts that a zygote is made of; when a new one would have others, the zygote is replaced.

    `code` is the time at which the package was installed, because two builds can have one version.
    """
    made_of = [
        sandbox(settings, image, quick=quick).save(), image.preload, image.extensions_after_fork,
        limits(settings).document(),
    ]
    return {
        "protocol": PROTOCOL,
        "digest": image.digest,
        "version": nbagent.__version__,
        "code": os.stat(nbagent.__file__).st_ctime_ns,
        "made_of": hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest(),
    }
