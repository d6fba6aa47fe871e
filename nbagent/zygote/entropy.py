"""What a fork would share and must not: every state that random numbers or secrets come out of.

The kernel's own generator behind os.urandom, secrets and uuid4 differs in every process, and the module random
seeds itself after a fork. The rest is renewed here: OpenSSL's generator, numpy's, every `random.Random` and numpy
generator that a library made on import, the names that tempfile and uuid1 count on from, and
the key by which processes of multiprocessing know each other.

Not for: the hash seed and the address layout, which a fork cannot change.

Standard library only, and whatever of numpy is loaded; Python 3.9 and up.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from typing import Any, List

_found: List[Any] = []


def find() -> None:
    """Finds the generators that there are, so that `reseed` has them at hand.

    In the zygote, before gc.freeze(): what is frozen the collector does not list any more.
    """
    numpy_random = sys.modules.get("numpy.random")
    kinds: Any = (random.Random,)
    if numpy_random is not None:
        kinds += (numpy_random.RandomState, numpy_random.Generator)
    _found[:] = [thing for thing in gc.get_objects() if isinstance(thing, kinds)]


def reseed() -> None:
    """Gives this process random states of its own. In the child, after a fork that leads to another user or kernel."""
    numpy_random = sys.modules.get("numpy.random")
    for generator in _found:
        if isinstance(generator, random.Random):
            generator.seed()
        elif numpy_random is not None:
            bits = getattr(generator, "bit_generator", None) or generator._bit_generator
            bits.state = type(bits)().state
    if numpy_random is not None:
        numpy_random.seed()
    if "ssl" in sys.modules:
        # OpenSSL seeds anew after a fork since 1.1.1; this holds for whatever library the image has.
        sys.modules["ssl"].RAND_add(os.urandom(32), 32.0)
    modules: Any = sys.modules
    if "uuid" in modules:
        modules["uuid"]._last_timestamp = None
    if "tempfile" in modules:
        modules["tempfile"]._name_sequence = None
        modules["tempfile"].tempdir = None  # TMPDIR may be another one here
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].current_process().authkey = os.urandom(32)
