# SPDX-License-Identifier: BSD-3-Clause
"""The messages of a kernel show whether it waits for a person; and the reasons why kernels end."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from nbagent.zygote import kernel_end
from nbagent.zygote.kernel_watch import KernelWatch


class Stream:
    """The part of a ZMQStream that the watch uses."""

    def __init__(self) -> None:
        self.callback: Any = None
        self.sent: list[Any] = []
        self.is_closed = False

    def on_recv(self, callback: Any, copy: bool = True) -> None:
        self.callback = callback

    def send_multipart(self, parts: Any, **_options: Any) -> None:
        self.sent.append(parts)

    def close(self, linger: int | None = None) -> None:
        self.is_closed = True


class Kernel:
    """A watch with the server's own stream and a page's stream to it; `page` has the messages that the page got."""

    def __init__(self) -> None:
        self.changes: list[bool] = []
        self.watch = KernelWatch(lambda: self.changes.append(self.watch.waits))
        self.iopub = self.watch.iopub(Stream())
        self.iopub.on_recv(lambda parts: None)
        self.page: list[Any] = []
        self.stdin = self.open(b"page")

    def open(self, identity: bytes) -> Any:
        stream = self.watch.reopened(identity) or self.watch.stdin(Stream(), identity)
        stream.on_recv(self.page.append)
        return stream

    def publish(self, kind: str, content: dict[str, Any], request: str, request_kind: str = "execute_request") -> None:
        self.iopub.callback(message(b"topic", kind, content, request, request_kind))

    def status(self, state: str, request: str, request_kind: str = "execute_request") -> None:
        self.publish("status", {"execution_state": state}, request, request_kind)

    def ask(self, request: str, stream: Any = None) -> None:
        (stream or self.stdin).callback(message(b"page", "input_request", {}, request, "execute_request"))


def message(topic: bytes, kind: str, content: dict[str, Any], request: str, request_kind: str) -> list[bytes]:
    parts = ({"msg_type": kind}, {"msg_id": request, "msg_type": request_kind}, {}, content)
    return [topic, b"<IDS|MSG>", b"signature", *(json.dumps(part).encode() for part in parts)]


def test_a_kernel_waits_from_its_request_for_input_to_the_reply() -> None:
    kernel = Kernel()
    kernel.status("busy", "1")
    kernel.ask("1")
    assert kernel.watch.waits and len(kernel.page) == 1
    kernel.stdin.send_multipart([b"reply"])
    assert not kernel.watch.waits and kernel.stdin.sent == [[b"reply"]]
    assert kernel.changes == [True, False]


def test_a_wait_ends_with_its_own_request_only() -> None:
    kernel = Kernel()
    # The status of the request before may be read after the request for input, because they are on two sockets.
    kernel.ask("2")
    kernel.status("busy", "1")
    kernel.status("idle", "1")
    kernel.status("busy", "2")
    kernel.status("idle", "info", "kernel_info_request")
    assert kernel.watch.waits
    kernel.status("idle", "2")
    assert not kernel.watch.waits


def test_a_wait_ends_with_an_interrupt_and_with_the_kernel() -> None:
    for end in ("reset", "ended"):
        kernel = Kernel()
        kernel.ask("1")
        getattr(kernel.watch, end)()
        assert not kernel.watch.waits


def test_a_kernel_waits_while_its_debugger_has_stopped_it() -> None:
    kernel = Kernel()
    kernel.status("busy", "1")
    kernel.publish("debug_event", {"event": "stopped"}, "1")
    assert kernel.watch.stopped and kernel.watch.waits
    kernel.publish("debug_event", {"event": "continued"}, "1")
    assert not kernel.watch.waits
    kernel.publish("debug_event", {"event": "stopped"}, "1")
    kernel.status("idle", "1")
    assert not kernel.watch.waits and kernel.changes == [True, False, True, False]


def test_a_request_for_input_after_the_page_was_closed_is_seen() -> None:
    kernel = Kernel()
    stream = kernel.stdin
    kernel.status("busy", "1")
    stream.on_recv(None)
    stream.close()
    assert not stream.is_closed
    kernel.ask("1", stream)
    assert kernel.watch.waits and kernel.page == []
    kernel.status("idle", "1")
    assert stream.is_closed and not kernel.watch.waits


def test_a_page_that_opens_again_has_its_former_stream() -> None:
    kernel = Kernel()
    stream = kernel.stdin
    kernel.status("busy", "1")
    stream.close()
    assert kernel.open(b"another") is not stream and kernel.open(b"page") is stream
    kernel.ask("1", stream)
    assert len(kernel.page) == 1
    kernel.status("idle", "1")
    assert not stream.is_closed
    stream.close()
    assert stream.is_closed


def test_streams_are_closed_with_an_idle_kernel_and_when_it_ends() -> None:
    kernel = Kernel()
    kernel.stdin.close()
    assert kernel.stdin.is_closed
    kernel.status("busy", "1")
    stream = kernel.open(b"page")
    stream.close()
    kernel.watch.ended()
    assert stream.is_closed


def test_the_request_that_a_kernel_executes_is_known() -> None:
    kernel = Kernel()
    kernel.status("busy", "1")
    kernel.publish("stream", {"text": '"status"'}, "1")
    kernel.status("busy", "info", "kernel_info_request")
    assert kernel.watch.request["msg_id"] == "1"


@pytest.mark.parametrize("parts", [
    [], [b"<IDS|MSG>"], [b"t", b"<IDS|MSG>", b"s", b'"status"'], [b"t", b"<IDS|MSG>", b"s", b'{"debug_event"', b"x"],
    [b"t", b"<IDS|MSG>", b"s", b'{"msg_type": "status"}', b"[]", b"{}", b"\xff"],
])
def test_malformed_messages_change_nothing(parts: list[bytes]) -> None:
    kernel = Kernel()
    kernel.iopub.callback(parts)
    kernel.stdin.callback(parts)
    assert not kernel.watch.waits and kernel.page == [parts]


def test_a_kernel_that_was_not_ended_by_a_signal_has_no_reason() -> None:
    assert kernel_end.reason(None, 0) is None and kernel_end.reason(0, 0) is None and kernel_end.reason(1, 0) is None


@pytest.mark.parametrize(("number", "before", "kills", "found"), [
    (signal.SIGBUS, 0, 0, r"SIGBUS: the storage .* had no room .*/dev/shm.* \d+ MiB"),
    (signal.SIGKILL, 2, 3, r"SIGKILL, because this notebook reached its memory limit of 512 MiB\. Load less"),
    (signal.SIGKILL, 2, 2, r"SIGKILL\.$"),
    (signal.SIGKILL, None, None, r"SIGKILL, probably because this notebook reached its memory limit of 512 MiB"),
    (signal.SIGSEGV, 0, 0, r"SIGSEGV, which is a fault"),
    (signal.SIGTERM, 0, 0, r"SIGTERM\.$"),
    (signal.SIGRTMIN + 9, 0, 0, r"signal \d+\.$"),
])
def test_reasons(
    number: int, before: int | None, kills: int | None, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEM_LIMIT", str(512 << 20))
    path = tmp_path / "memory.events"
    if kills is not None:
        path.write_text(f"low 0\nmax 7\noom 9\noom_kill {kills}\n")
    reason = kernel_end.reason(-number, before, str(path)) or ""
    assert reason.startswith("The kernel was ended by ")
    assert re.search(found, reason), reason
