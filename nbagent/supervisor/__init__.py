# SPDX-License-Identifier: BSD-3-Clause
"""The privileged part: owns pool, slots and policy, in one loop."""
