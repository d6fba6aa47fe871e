# SPDX-License-Identifier: BSD-3-Clause
"""Public bug reports about notebooks on servers of others, tried on slots and on a plain `jupyter lab`.

Each function repeats the steps of a report, as a user's page does them, and fails where the complaint is true. Its
value has to be the same in a slot as with the plain server. packaging/docs/conformance.md lists the reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import reported_files  # noqa: F401 - registers its trials
import reported_kernels  # noqa: F401 - as above
import reported_programs  # noqa: F401 - as above
import suite
from acts import user_of
from reported import REPORTS

# Of functions whose value differs by design, each with the reason.
DIFFERENCES: dict[str, str] = {}
# In make test: those whose complaint was once true of slots, and some more, in two seconds.
SOME = (
    "a_terminal_has_job_control", "terminals_and_notebooks_have_the_same_programs",
    "a_terminal_shows_its_former_output_to_a_page_that_is_reloaded", "a_directory_with_broken_links_is_listed",
    "files_of_unusual_names_are_saved_renamed_and_downloaded", "output_arrives_after_a_lost_connection",
)


class Outcome(NamedTuple):
    """The result of one function: `value` is what it returned, `error` is empty if it returned."""

    value: Any
    error: str


def run(server: suite.Server, names: tuple[str, ...] = ()) -> dict[str, Outcome]:
    """Does what the reports say; the outcomes by the names of the functions."""
    user, found = user_of(server), {}
    for name in names or REPORTS:
        try:
            found[name] = Outcome(REPORTS[name].function(user), "")
        except Exception as error:
            found[name] = Outcome(None, f"{type(error).__name__}: {str(error)[:1500]}")
        for kernel in user.get("api/kernels"):
            user.router.call("DELETE", f"{user.base}api/kernels/{kernel['id']}", headers=user.headers)
    return found


def faults(plain: Mapping[str, Outcome], other: Mapping[str, Outcome]) -> dict[str, str]:
    """The functions that fail with a server, or return another value than with the plain one."""
    found = {}
    for name, outcome in other.items():
        differs = not plain[name].error and outcome.value != plain[name].value
        if name not in DIFFERENCES and (outcome.error or differs):
            found[name] = outcome.error or f"{outcome.value} instead of {plain[name].value}"
    return found


def table(results: Mapping[str, Mapping[str, Outcome]]) -> str:
    """The outcomes by server, as text."""
    lines = [f"{'public reports':60}" + "".join(f"{kind:>8}" for kind in results)]
    for name, report in REPORTS.items():
        row = "".join(f"{'fails' if found[name].error else 'ok':>8}" for found in results.values())
        lines.append(f"{', '.join(report.numbers):60}{row}  {name}")
    for kind, found in results.items():
        lines += [f"{kind}: {name}: {outcome.error}" for name, outcome in found.items() if outcome.error]
    return "\n".join(lines)
