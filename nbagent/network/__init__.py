"""The slots' network on the host: what is decided, and the service that does it."""
