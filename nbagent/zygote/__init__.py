# SPDX-License-Identifier: BSD-3-Clause
"""The programs that run inside an image, under its own Python; standard library and Jupyter only."""
