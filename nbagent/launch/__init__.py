# SPDX-License-Identifier: BSD-3-Clause
"""The launch service: processes that make or enter the namespaces of a slot, and descriptors of running slots."""
