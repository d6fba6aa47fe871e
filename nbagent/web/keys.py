# SPDX-License-Identifier: BSD-3-Clause
"""The Idempotency-Key of a request: a claim that is sent again with the same key gets the same slot."""

from __future__ import annotations

import re

from nbagent.core.errors import InvalidField

HEADER = "Idempotency-Key"
KEY_EXPECTED = "1 to 255 visible ASCII characters"
_KEY = re.compile(r"[!-~]{1,255}")


def check_key(key: str | None) -> str | None:
    """`key`, or None when the request has none. Raises InvalidField when it is malformed.

    A key of a caller never contains a space, so services prefix a word and a space to form keys of their own.
    """
    if key is None or _KEY.fullmatch(key):
        return key
    raise InvalidField(field=HEADER, value=key[:80], expected=KEY_EXPECTED)
