"""The control API: an HTTP face of the supervisor, without state and without privilege.

It knows the supervisor only by its control socket, so any number of its processes may run, and
any of them may be killed at any moment. `routes` is the table of all that is served; the
registration in `app` and the description in `openapi` both come from it.
"""
