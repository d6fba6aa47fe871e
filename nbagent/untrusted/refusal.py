# SPDX-License-Identifier: BSD-3-Clause
"""The error of everything that is refused because of its content. Standard library only; Python 3.9 and up."""

from __future__ import annotations


class Refused(Exception):
    """Content that may not be used: it is damaged, too large or hostile. The text names the reason for its sender."""


def shown(text: str, most: int = 80) -> str:
    """`text` from an untrusted source in quotes, for a message: printable, and at most about `most` characters."""
    return ascii(text) if len(text) <= most else ascii(text[:most]) + "..."


def plain(text: str, most: int = 80) -> str:
    """`text` as it is when it can be shown; otherwise as `shown`."""
    return text if len(text) <= most and text.isprintable() else shown(text, most)
