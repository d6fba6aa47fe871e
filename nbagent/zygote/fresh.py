"""What a fork would share and must not: the states of random generators.

`secrets`, `uuid`, `ssl` and the functions of the module `random` differ after a fork by themselves: the kernel's
generator is the source of the first two, OpenSSL looks at its pid, and Python seeds the third anew. Generators that
somebody has made, and numpy's, do not. Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import gc
import random
import sys
from typing import List


class Generators:
    """The generators that there are before a fork; `renew` seeds them after it."""

    def __init__(self) -> None:
        own = type(random._inst)
        self.found: List[random.Random] = [
            found for found in gc.get_objects()
            if isinstance(found, own) and not isinstance(found, random.SystemRandom)
        ]

    def renew(self) -> None:
        """Gives each a state of its own, from the kernel's."""
        for generator in self.found:
            generator.seed()
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is not None:
            numpy_random.seed()
