# SPDX-License-Identifier: BSD-3-Clause
"""Builds image recipes to archives. Standard library only, and no other package of nbagent, because the hash of these
modules is part of the key of the build cache (recipe.py).
"""
