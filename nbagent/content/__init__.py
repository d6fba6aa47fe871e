# SPDX-License-Identifier: BSD-3-Clause
"""Delivery of a claim's files and archives into a slot. Standard library only; Python 3.9 and up."""
