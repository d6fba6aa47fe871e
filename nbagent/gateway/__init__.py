# SPDX-License-Identifier: BSD-3-Clause
"""The gateway of a fleet: HAProxy's configuration and hosts, and the service for the landing page and figures."""
