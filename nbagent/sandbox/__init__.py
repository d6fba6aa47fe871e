# SPDX-License-Identifier: BSD-3-Clause
"""A slot's root filesystem and namespaces as a plan of ordered steps."""
