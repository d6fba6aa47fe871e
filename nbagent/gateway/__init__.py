"""The landing page of a fleet: HAProxy's configuration, the hosts in it, and a service that tells how they do."""
