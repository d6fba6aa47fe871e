# SPDX-License-Identifier: BSD-3-Clause
"""Kernel facilities, one a file: thin wrappers, named as in the kernel's headers, that raise OSError."""
