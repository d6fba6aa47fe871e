# SPDX-License-Identifier: BSD-3-Clause
"""The generated part of the router's nginx configuration."""

from __future__ import annotations

import pytest

from nbagent.config import host_config, nginx_settings


def test_settings_do_not_depend_on_the_label() -> None:
    """Slots keep their ids when host.label changes, so the router must serve ids of every label."""
    one, two = (nginx_settings.nginx(host_config.parse({"host": {"label": label}})) for label in ("c07", "c08"))
    assert one == two


def test_the_landing_page_gets_as_many_requests_as_it_has_threads() -> None:
    settings = nginx_settings.nginx(host_config.parse({"api": {"workers": 2, "threads": 8}}))
    assert "max_conns=16;" in settings


def test_connections_of_an_address_are_limited() -> None:
    settings = nginx_settings.nginx(host_config.parse({"router": {"client_connections": 77}}))
    assert "limit_conn clients 77;" in settings


@pytest.mark.parametrize(("processors", "workers"), [(1, 1), (2, 2), (8, 8), (64, 8)])
def test_a_large_host_has_no_more_workers_than_its_users_need(processors: int, workers: int) -> None:
    assert nginx_settings.workers(processors) == f"worker_processes {workers};\n"
