"""The gateway of a fleet: HAProxy's configuration and hosts, and the service for the landing page and figures."""
