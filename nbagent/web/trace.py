# SPDX-License-Identifier: BSD-3-Clause
"""The trace of a request: a claim's entry in the journal has the ids of the caller's traceparent header.

The header is that of W3C's Trace Context, as OpenTelemetry sends it. Spans are made of the journal's entries by
nbagent.cli.traces. As the recommendation requires, a malformed header is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

HEADER = "traceparent"
# Later versions may append fields; the version ff is invalid, as are ids of zeros.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<parent>(?!0{16})[0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?"
)


def trace_of(headers: Mapping[str, str]) -> str:
    """The ids of the trace and of the caller's span as TRACE-SPAN, "" without a valid header."""
    match = _TRACEPARENT.fullmatch(headers.get(HEADER, ""))
    return f"{match['trace']}-{match['parent']}" if match else ""
