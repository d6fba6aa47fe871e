# SPDX-License-Identifier: BSD-3-Clause
"""The failure of a job of systemd, for callers that do not use D-Bus themselves."""

from __future__ import annotations


class JobFailed(Exception):
    """A job's result is not `done` but timeout, failed, canceled, dependency or skipped."""
