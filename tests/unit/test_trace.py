# SPDX-License-Identifier: BSD-3-Clause
"""The header traceparent of W3C's Trace Context."""

from __future__ import annotations

import pytest

from nbagent.web.trace import trace_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize("header", [f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00", f"01-{TRACE}-{SPAN}-01-later"])
def test_a_trace_is_that_of_the_header(header: str) -> None:
    assert trace_of({"traceparent": header}) == f"{TRACE}-{SPAN}"


@pytest.mark.parametrize("header", [
    "", TRACE, f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01\nNBAGENT_SLOT=x", f"00-{TRACE}-{SPAN}-1",
    f"00-{TRACE}{SPAN}-01",
])
def test_a_malformed_header_is_ignored(header: str) -> None:
    assert trace_of({"traceparent": header}) == ""
