# SPDX-License-Identifier: BSD-3-Clause
"""The landing page: pages for people and tmpnb's public API, on one host and in front of a fleet.

It gets figures and slots from a SlotBackend: the host's API implements one, the gateway's status service
another. It trusts no address and has no access to the control API.
"""
