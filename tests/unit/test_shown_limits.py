# SPDX-License-Identifier: BSD-3-Clause
"""The limit that jupyter-resource-usage shows follows the slot's, unless the image's configuration has another."""

import types

import pytest

from nbagent.zygote import shown_limits

SETTING = "jupyter_resource_usage_display_config"


@pytest.mark.parametrize(("present", "read"), [("1024", 1024), (None, 0)])
def test_the_limit_is_that_of_the_slot_at_each_request(monkeypatch, present, read):
    """A zygote has the variable of the pool when the extension reads it, a server by exec has none."""
    monkeypatch.setattr(shown_limits, "_apply", shown_limits._apply)
    if present is None:
        monkeypatch.delenv("MEM_LIMIT", raising=False)
    else:
        monkeypatch.setenv("MEM_LIMIT", present)
    usage, limits = types.SimpleNamespace(mem_limit=read), iter(["2048", "4096"])
    shown_limits.install({SETTING: usage})
    shown_limits.follow(lambda environment: environment.update(MEM_LIMIT=next(limits)))
    assert [usage.mem_limit(rss=1, pss=None) for _ in range(2)] == [2048, 4096]


@pytest.mark.parametrize(("read", "shown"), [(0.5, [2.0, 0.0]), (0.0, [0.0, 0.0]), (3.0, [3.0, 3.0])])
def test_the_quota_is_that_of_the_slot_unless_the_image_sets_another(monkeypatch, read, shown):
    """The extension reads it as a number after it has called mem_limit."""
    monkeypatch.setattr(shown_limits, "_apply", shown_limits._apply)
    monkeypatch.setattr(shown_limits, "_with_quota", None)
    monkeypatch.delenv("MEM_LIMIT", raising=False)
    monkeypatch.setenv("CPU_LIMIT", "0.5")
    usage, quotas = types.SimpleNamespace(mem_limit=0, cpu_limit=read), iter(["2", None])

    def apply(environment):
        if (quota := next(quotas)) is None:
            environment.pop("CPU_LIMIT")
        else:
            environment["CPU_LIMIT"] = quota

    shown_limits.install({SETTING: usage})
    shown_limits.follow(apply)
    assert [(usage.mem_limit(rss=1, pss=None), usage.cpu_limit)[1] for _ in range(2)] == shown


def test_a_configured_limit_and_a_server_without_the_extension_stay_as_they_are(monkeypatch):
    monkeypatch.setenv("MEM_LIMIT", "1024")
    usage = types.SimpleNamespace(mem_limit=512)
    shown_limits.install({SETTING: usage})
    shown_limits.install({})
    assert usage.mem_limit == 512
