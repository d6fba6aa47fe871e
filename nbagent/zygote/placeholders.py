# SPDX-License-Identifier: BSD-3-Clause
"""The strings of a process that contain placeholders: found once in all its objects, and filled after each fork.

Only strings in dicts, lists and attributes are found; those in tuples, sets, closures and __slots__ cannot be replaced.

Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import gc
import re
import sys
from typing import Any, Dict, List, Tuple

# The referents of that many objects are searched at once, because few objects have a placeholder: 90 ms for 200,000
# objects instead of 165, beside the search of dicts and lists.
_AT_ONCE = 64


class PlaceholderSubstitution:
    """The places in the objects of this process where the strings `names` are, whole or as a part of a string.

    gc.get_objects() has neither the attributes of an object that has no __dict__ yet, nor a dict with strings only,
    because CPython does not track it. So the search covers all that these objects refer to.
    """

    def __init__(self, *names: str, without: Any = None) -> None:
        """Searches all objects but the dict `without`, where the names themselves are."""
        self._names = names
        self._found: List[Tuple[Any, Any]] = []
        search = re.compile("|".join(map(re.escape, names))).search
        found: Dict[int, Any] = {}

        def visit(known: Any) -> None:
            if id(known) in found or known is without or known is found:
                return
            items: Any = known.items() if isinstance(known, dict) else enumerate(known)
            keys = [key for key, value in items if isinstance(value, str) and search(value)]
            if keys:
                found[id(known)] = known
                self._found += [(known, key) for key in keys]

        def inspect(known: Any) -> None:
            if isinstance(known, (dict, list)):
                visit(known)
            elif any(isinstance(value, str) and search(value) for value in gc.get_referents(known)):
                attributes = _attributes(known)
                if attributes is not None:
                    visit(attributes)

        # CPython 3.12.0 to 3.12.5 destroys the freed objects of this module's free list again when get_referents() has
        # listed them; then the list is a circle, in which each later collection stays (python/cpython#122695).
        objects = [known for known in gc.get_objects() if known is not sys.modules.get("_asyncio")]
        for start in range(0, len(objects), _AT_ONCE):
            some = objects[start:start + _AT_ONCE]
            referents = gc.get_referents(*some)
            for untracked in [value for value in referents if type(value) is dict and not gc.is_tracked(value)]:
                visit(untracked)
            if search("\0".join([value for value in referents if isinstance(value, str)])):
                for known in some:
                    inspect(known)

    def fill(self, *values: str) -> None:
        """Replaces the names by `values`, in the same order."""
        for known, key in self._found:
            text = known[key]
            for name, value in zip(self._names, values):  # noqa: B905  strict= is of 3.10
                text = text.replace(name, value)
            known[key] = text


def _attributes(known: Any) -> Any:
    """The __dict__ of an object, without a call of its own methods; None if it has none."""
    try:
        attributes = object.__getattribute__(known, "__dict__")
    except (AttributeError, TypeError):
        return None
    return attributes if type(attributes) is dict else None
