"""The landing page: what people and tmpnb's clients see, on one host and in front of a fleet.

It knows a SlotBackend, which says how full it is and hands out slots; the host's API is one, and so is
the gateway's status service. It trusts nobody for an address and reaches nothing of the control
API.
"""
