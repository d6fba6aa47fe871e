# SPDX-License-Identifier: BSD-3-Clause
"""Typed reads from JSON that another process sent.

The sender may be an image's code, so every value is checked here once, where it comes in: a field that is missing, of
another type or out of bounds raises MalformedMessage. Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

import json
from typing import Dict, List, Mapping, Type, TypeVar

T = TypeVar("T")


class MalformedMessage(ValueError):
    """A message that the protocol does not allow; the text names the fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"malformed message: {fault}")


def decode(payload: bytes) -> Dict[str, object]:
    """The JSON object in `payload`. Raises MalformedMessage."""
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"not JSON: {error}") from None
    return _checked("the message", document, dict, "an object")


def text(fields: Mapping[str, object], name: str) -> str:
    """A string. Raises MalformedMessage."""
    return _checked(repr(name), fields.get(name), str, "a string")


def line(fields: Mapping[str, object], name: str, limit: int) -> str:
    """A string of at most `limit` characters, all of them printable, for journal entries. Raises MalformedMessage."""
    value = text(fields, name)
    if len(value) > limit or not value.isprintable():
        raise MalformedMessage(f"{name!r} is not text of at most {limit} printable characters")
    return value


def texts(fields: Mapping[str, object], name: str) -> List[str]:
    """A list of strings. Raises MalformedMessage."""
    values = _checked(repr(name), fields.get(name), list, "a list of strings")
    for value in values:
        _checked(repr(name), value, str, "a list of strings")
    return values


def integer(fields: Mapping[str, object], name: str, low: int, high: int) -> int:
    """An integer from `low` to `high`. Raises MalformedMessage, also for true, 1.0 and 1e999."""
    value = fields.get(name)
    if type(value) is not int or not low <= value <= high:
        raise MalformedMessage(f"{name!r} is not an integer from {low} to {high}")
    return value


def mapping(fields: Mapping[str, object], name: str) -> Dict[str, object]:
    """An object. Raises MalformedMessage."""
    return _checked(repr(name), fields.get(name), dict, "an object")


def _checked(name: str, value: object, kind: Type[T], expected: str) -> T:
    if not isinstance(value, kind):
        raise MalformedMessage(f"{name} is {type(value).__name__}, expected {expected}")
    return value
