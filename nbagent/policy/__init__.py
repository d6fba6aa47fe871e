# SPDX-License-Identifier: BSD-3-Clause
"""Pure decisions: state, time and settings in; actions out."""
