# SPDX-License-Identifier: BSD-3-Clause
"""The control API: HTTP for the calls of the supervisor, without state and without privilege.

It reaches the supervisor only by the control socket, so any number of its processes may run, and
each may be killed at any moment. `routes` is the table of all routes; `app` registers it with Flask
and `openapi` describes it.
"""
