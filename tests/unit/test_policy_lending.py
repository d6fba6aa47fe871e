# SPDX-License-Identifier: BSD-3-Clause
"""The rule by which a slot is lent to a visitor of the landing page."""

from __future__ import annotations

import dataclasses

import pytest

from nbagent.policy import admission, lending
from nbagent.policy.lending import Stock

EMPTY = admission.Host(
    capacity=100, live=8, starts=admission.Cost(0, 0), starts_max=2, memory_available_bytes=8 << 30,
    memory_reserve_bytes=1 << 30, draining=False,
)
PLENTY = Stock(warm=8, wanted=8, lent=0, lent_to_client=0)


def test_a_host_with_plenty_of_room_lends():
    assert lending.obstacle(EMPTY, PLENTY) is None


@pytest.mark.parametrize(("host", "stock", "reason"), [
    ({"draining": True}, {}, "draining"),
    ({"live": 50}, {}, "50 of 100 slots are in use"),
    ({"live": 1, "capacity": 1}, {}, "1 of 1 slots are in use"),
    ({"memory_available_bytes": 1 << 30}, {}, "memory is low"),
    ({"pressure": admission.Pressure(memory=100), "kept_bytes": 7 << 30}, {}, "wait for memory"),
    ({}, {"warm": 4}, "only 4 of 8 warm slots"),
    ({}, {"warm": 0, "wanted": 0}, "only 0 of 0 warm slots"),
    ({}, {"lent": 10}, "10 slots are lent"),
    ({}, {"lent_to_client": lending.CLIENT_MAX}, "to this client"),
])
def test_a_host_lends_only_what_it_has_plenty_of(host, stock, reason):
    found = lending.obstacle(dataclasses.replace(EMPTY, **host), dataclasses.replace(PLENTY, **stock))
    assert found is not None and reason in found


def test_a_pool_of_one_lends_it_and_a_small_host_lends_one():
    assert lending.obstacle(dataclasses.replace(EMPTY, capacity=4, live=1), Stock(1, 1, 0, 0)) is None
    assert lending.obstacle(dataclasses.replace(EMPTY, capacity=4, live=1), Stock(1, 1, 1, 0)) is not None


@pytest.mark.parametrize(("client", "network"), [
    ("192.0.2.7", "192.0.2.7"), ("::ffff:192.0.2.7", "192.0.2.7"), ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
    ("fe80::1%eth0", "fe80::/64"), ("unknown", "unknown"),
])
def test_the_64_of_an_ipv6_address_is_one_client(client, network):
    assert lending.client_network(client) == network
