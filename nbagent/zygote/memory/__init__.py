# SPDX-License-Identifier: BSD-3-Clause
"""The memory that a zygote shares with its forks. Only the module `sharing` is used from outside."""
