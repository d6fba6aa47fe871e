"""The privileged part: owns pool, slots and policy, in one loop."""
