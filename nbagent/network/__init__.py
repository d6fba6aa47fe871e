# SPDX-License-Identifier: BSD-3-Clause
"""The slots' network on the host: what is decided, and the service that does it."""
