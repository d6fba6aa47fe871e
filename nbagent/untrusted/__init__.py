# SPDX-License-Identifier: BSD-3-Clause
"""Reading of archives, and writing below directories, whose content may be hostile.

Standard library only; Python 3.9 and up, because content/ uses it too.
"""
