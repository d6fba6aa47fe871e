# SPDX-License-Identifier: BSD-3-Clause
"""Everything that knows systemd's D-Bus interface and protocols."""
