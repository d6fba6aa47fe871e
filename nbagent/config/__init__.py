# SPDX-License-Identifier: BSD-3-Clause
"""Settings: how one is declared and read (schema), those of a host, and what nginx needs of them."""
