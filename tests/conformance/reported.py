# SPDX-License-Identifier: BSD-3-Clause
"""The trials of public bug reports, by name. Each module of trials registers its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from notebook import Notebook


class Report(NamedTuple):
    numbers: tuple[str, ...]
    function: Callable[[Notebook], Any]


REPORTS: dict[str, Report] = {}


def reports(*numbers: str) -> Callable[[Callable[[Notebook], Any]], Callable[[Notebook], Any]]:
    """Registers a function as the trial of these reports."""
    def register(function: Callable[[Notebook], Any]) -> Callable[[Notebook], Any]:
        REPORTS[function.__name__] = Report(numbers, function)
        return function
    return register
