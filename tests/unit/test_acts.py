# SPDX-License-Identifier: BSD-3-Clause
"""The requests to a notebook server that keep a slot from being idle."""

from __future__ import annotations

import pytest

from nbagent.zygote.acts import is_act


@pytest.mark.parametrize(("method", "path", "status"), [
    ("PUT", "api/contents/note.txt", 200), ("POST", "api/sessions", 201), ("DELETE", "api/kernels/1", 204),
    ("PATCH", "api/contents/a", 200), ("POST", "login", 302), ("POST", "git/course/commit", 201),
    ("POST", "git/course/push", 200), ("POST", "api/contents/git/status", 201), ("POST", "proxy/8050/update", 200),
])
def test_acts(method: str, path: str, status: int) -> None:
    assert is_act(method, path, status, by_user=True)
    assert not is_act(method, path, status, by_user=False)


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "api/kernels", 200), ("HEAD", "lab", 200), ("OPTIONS", "api/contents", 204),
    ("POST", "no/such/page", 404), ("PUT", "api/contents/note.txt", 403), ("POST", "login", 401),
    ("POST", "api/sessions", 500), ("POST", "git/course/status", 200), ("POST", "git/status", 200),
    ("POST", "git/a/b/remote/fetch", 200), ("POST", "git/course/branch", 200),
])
def test_no_acts(method: str, path: str, status: int) -> None:
    assert not is_act(method, path, status, by_user=True)
