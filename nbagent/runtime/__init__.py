# SPDX-License-Identifier: BSD-3-Clause
"""Processes of a slot and of a zygote service. Standard library only; Python 3.9 and up."""
