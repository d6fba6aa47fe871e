# SPDX-License-Identifier: BSD-3-Clause
"""The units service: starts, changes and ends the units of slots and zygotes by systemd, and no others."""
