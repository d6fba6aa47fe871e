"""Everything that knows systemd's D-Bus interface and protocols."""
