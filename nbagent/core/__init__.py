# SPDX-License-Identifier: BSD-3-Clause
"""Values and errors that every layer uses. Pure: nothing in this package does I/O except `events.emit`."""
