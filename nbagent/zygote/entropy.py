# SPDX-License-Identifier: BSD-3-Clause
"""Reseeds every generator of random numbers and secrets whose state a fork would share.

The kernel's generator behind os.urandom, secrets and uuid4 needs no reseeding, and the module random reseeds its
global generator after a fork. `reseed` covers the rest: OpenSSL's generator, numpy's, every `random.Random` and numpy
generator that a library created on import, the counters behind the names of tempfile and uuid1, and
the authentication key of multiprocessing.

The seed of str hashes and the address layout are not covered, because they cannot change after exec(2).

Standard library only, and numpy where it is loaded; Python 3.9 and up.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from typing import Any, List

_generators: List[Any] = []


def find_generators() -> None:
    """Collects the existing generators for `reseed`.

    Called in the zygote before gc.freeze(), because gc.get_objects() does not list frozen objects.
    """
    numpy_random = sys.modules.get("numpy.random")
    classes: Any = (random.Random,)
    if numpy_random is not None:
        classes += (numpy_random.RandomState, numpy_random.Generator)
    _generators[:] = [obj for obj in gc.get_objects() if isinstance(obj, classes)]


def reseed() -> None:
    """Gives this process random states of its own. For a child that becomes another slot's server or a kernel."""
    numpy_random = sys.modules.get("numpy.random")
    for generator in _generators:
        if isinstance(generator, random.Random):
            generator.seed()
        elif numpy_random is not None:
            bits = getattr(generator, "bit_generator", None) or generator._bit_generator
            bits.state = type(bits)().state
    if numpy_random is not None:
        numpy_random.seed()
    if "ssl" in sys.modules:
        # OpenSSL reseeds itself after a fork since 1.1.1; this call also covers other libraries behind the module ssl.
        sys.modules["ssl"].RAND_add(os.urandom(32), 32.0)
    modules: Any = sys.modules
    if "uuid" in modules:
        modules["uuid"]._last_timestamp = None
    if "tempfile" in modules:
        modules["tempfile"]._name_sequence = None
        modules["tempfile"].tempdir = None  # TMPDIR may differ in this process
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].current_process().authkey = os.urandom(32)
