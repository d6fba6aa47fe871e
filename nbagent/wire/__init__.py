# SPDX-License-Identifier: BSD-3-Clause
"""Communication between nbagent's processes: channels, failures, the control socket, a slot's activity page."""
