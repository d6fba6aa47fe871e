# SPDX-License-Identifier: BSD-3-Clause
"""The units service and the supervisor's side of it, over a real socket with a manager that records its calls."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import socket
import threading
import time

import pytest

from nbagent.core import paths
from nbagent.core.model import Limits
from nbagent.supervisor.systemd import Systemd
from nbagent.systemd import bus
from nbagent.systemd.job import JobFailed
from nbagent.units import requests
from nbagent.units.__main__ import serve
from nbagent.wire.channel import Channel
from nbagent.wire.failure import StepFailed

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="the units service serves root only")
SCOPE, ZYGOTE = "nbagent-c07-x8q2m4k9w1ze.scope", "nbagent-zygote@minimal:0a1b2c.service"
LIMITS = Limits(1 << 30, 100, 0.25, 256)
UNITS = {10: "nbagent-launch.service", 11: ZYGOTE, 12: "ssh.service", 13: "nbagent.service", 14: SCOPE, 15: ""}


RESULTS = {"scopes": [SCOPE], "zygotes": [SCOPE], "scope_limits": LIMITS, "main_pid": 4711}


class Manager:
    """Records the calls; `error` is raised by each, after `blocks_s`, for which nothing else is done."""

    def __init__(self):
        self.calls, self.error, self.blocks_s, self.host_stops = [], None, 0.0, False

    def is_stopping(self):
        return self.host_stops

    def __getattr__(self, name):
        def record(*arguments, **settings):
            self.calls.append((name, *arguments, *settings.values()))
            time.sleep(self.blocks_s)
            if self.error is not None:
                raise self.error
            return RESULTS.get(name)

        async def record_later(*arguments, **settings):
            return record(*arguments, **settings)

        return record_later if name in ("start", "stop", "start_scope", "attach") else record


class Service:
    """The service in a thread with an event loop of its own."""

    def __init__(self, path):
        self.manager, self.notified = Manager(), []
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(path))
        self.listener.listen()
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.thread.start()
        self.ready.wait(10)

    async def _run(self):
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        serving = asyncio.ensure_future(serve(self.manager, self.listener, self.stop, notify=self.notified.append))
        self.ready.set()
        await serving

    def end(self):
        """As SIGTERM does; returns at once."""
        self.loop.call_soon_threadsafe(self.stop.set)

    def close(self):
        self.manager.host_stops = False
        if self.thread.is_alive():
            self.end()
            self.thread.join()
        self.listener.close()


@pytest.fixture
def service(tmp_path, monkeypatch):
    path = tmp_path / "units.sock"
    monkeypatch.setattr(paths, "UNITS_SOCKET", path)
    monkeypatch.setattr(requests.cgroup, "unit_of_process", lambda pid: UNITS[pid])
    service = Service(path)
    yield service
    service.close()


async def test_every_call_arrives_with_its_arguments(service):
    with contextlib.closing(Systemd()) as systemd:
        await systemd.start_scope(SCOPE, [10, 11], "Notebook slot", LIMITS, runtime_max_s=60, stop_timeout_s=3.5)
        await systemd.attach(SCOPE, [11])
        await systemd.set_limits(SCOPE, dataclasses.replace(LIMITS, cpu_quota=None))
        await systemd.set_swap(SCOPE, 0)
        await systemd.set_cpu_weight(ZYGOTE, 1)
        await systemd.start(ZYGOTE)
        await systemd.start("nbagent-dns.service", anew=True)
        await systemd.stop(SCOPE, at_once=True)
        await systemd.stop(ZYGOTE)
        assert await systemd.scopes() == await systemd.zygotes() == [SCOPE]
        assert await systemd.is_stopping() is False
        assert service.manager.calls == [
            ("start_scope", SCOPE, [10, 11], "Notebook slot", LIMITS, 60.0, 3.5), ("attach", SCOPE, [11]),
            ("set_limits", SCOPE, Limits(1 << 30, 100, None, 256)), ("set_swap", SCOPE, 0),
            ("set_cpu_weight", ZYGOTE, 1),
            ("start", ZYGOTE, False), ("start", "nbagent-dns.service", True), ("stop", SCOPE, True),
            ("stop", ZYGOTE, False), ("scopes",), ("zygotes",),
        ]


@pytest.mark.parametrize("name", [
    "ssh.service", "nbagent.service", "nbagent-launch.service", "nbagent-slots.slice", "nbagent-../x.scope",
    "init.scope", "nbagent-zygote@x.service", "nbagent-zygote@minimal:0.service.d", "nbagent-x.scope\n", "",
])
async def test_a_unit_that_is_not_a_slots_is_refused(service, name):
    with contextlib.closing(Systemd()) as systemd:
        for call in (
            lambda: systemd.start(name), lambda: systemd.stop(name, at_once=True), lambda: systemd.attach(name, [10]),
            lambda: systemd.start_scope(name, [10], "x", LIMITS, runtime_max_s=1, stop_timeout_s=1),
            lambda: systemd.set_limits(name, LIMITS), lambda: systemd.set_swap(name, 1),
            lambda: systemd.set_cpu_weight(name, 1),
        ):
            with pytest.raises(PermissionError, match="does not belong to a slot"):
                await call()
        assert service.manager.calls == []


async def test_a_scope_is_not_started_by_its_name(service):
    with contextlib.closing(Systemd()) as systemd:
        with pytest.raises(PermissionError):
            await systemd.start(SCOPE)
        assert service.manager.calls == []


async def test_limits_are_of_scopes_and_zygotes_and_main_processes_of_zygotes(service):
    with contextlib.closing(Systemd()) as systemd:
        await systemd.set_limits(ZYGOTE, LIMITS)
        assert await systemd.scope_limits(SCOPE) == LIMITS
        assert await systemd.main_pid(ZYGOTE) == 4711
        for call in (lambda: systemd.scope_limits(ZYGOTE), lambda: systemd.main_pid("ssh.service")):
            with pytest.raises(PermissionError, match="does not belong to a slot"):
                await call()


async def test_a_scope_may_have_limits_that_nbagent_never_sets(service, monkeypatch):
    """By `systemctl set-property`: infinity, and CPUWeight=idle, which is 0."""
    found = Limits(bus.INFINITY, 0, None, bus.INFINITY)
    monkeypatch.setitem(RESULTS, "scope_limits", found)
    with contextlib.closing(Systemd()) as systemd:
        assert await systemd.scope_limits(SCOPE) == found


@pytest.mark.parametrize("pid", [12, 13, 14, 15])
async def test_a_process_that_was_not_forked_for_a_slot_gets_into_no_scope(service, pid):
    """Whatever gets into a scope is killed with it."""
    with contextlib.closing(Systemd()) as systemd:
        with pytest.raises(PermissionError, match="not forked for a slot"):
            await systemd.start_scope(SCOPE, [10, pid], "x", LIMITS, runtime_max_s=1, stop_timeout_s=1)
        with pytest.raises(PermissionError, match="not forked for a slot"):
            await systemd.attach(SCOPE, [pid])
        assert service.manager.calls == []


async def test_memory_is_reclaimed_from_the_cgroup_of_a_process_in_the_scope(service, monkeypatch):
    with contextlib.closing(Systemd()) as systemd:
        written = []
        monkeypatch.setattr(requests.cgroup, "of_process", lambda pid: requests.cgroup.Cgroup("m", "m", "m"))
        monkeypatch.setattr(
            requests.cgroup.Cgroup, "reclaim", lambda group, size: written.append((group, size)) or True
        )
        assert await systemd.reclaim(SCOPE, 14, 4096) is True
        for pid in (10, 12):
            with pytest.raises(ProcessLookupError, match="is not in"):
                await systemd.reclaim(SCOPE, pid, 4096)
        assert [size for _, size in written] == [4096]
        await systemd.prime()


async def test_at_a_shutdown_of_the_host_the_service_ends_after_the_supervisor(service):
    service.manager.host_stops = True
    with contextlib.closing(Systemd()) as systemd:
        await systemd.prime()
        service.end()
        assert await systemd.is_stopping() is True
        await systemd.stop(SCOPE)
        await asyncio.sleep(0.05)
        assert await systemd.is_stopping() is True and service.notified == ["EXTEND_TIMEOUT_USEC=5000000"]
    await asyncio.to_thread(service.thread.join, 5)
    assert not service.thread.is_alive()


async def test_otherwise_the_service_ends_before_the_supervisor(service):
    with contextlib.closing(Systemd()) as systemd:
        await systemd.prime()
        service.end()
        await asyncio.to_thread(service.thread.join, 5)
        assert not service.thread.is_alive() and service.notified == []


async def test_failures_keep_their_kind(service):
    with contextlib.closing(Systemd()) as systemd:
        service.manager.error = JobFailed("job 7 ended as timeout")
        with pytest.raises(JobFailed, match="job 7 ended as timeout"):
            await systemd.start(ZYGOTE)
        await systemd.stop(ZYGOTE)
        service.manager.error = FileNotFoundError(2, "no such unit")
        with pytest.raises(FileNotFoundError, match="no such unit"):
            await systemd.attach(SCOPE, [10])
        # As nbagent.systemd.bus raises it.
        service.manager.error = FileNotFoundError("it has no main process")
        with pytest.raises(FileNotFoundError, match="it has no main process"):
            await systemd.main_pid(ZYGOTE)
        service.manager.error = ValueError("unexpected")
        with pytest.raises(OSError, match="unexpected"):
            await systemd.set_swap(SCOPE, 0)


async def test_a_request_without_a_response_fails_after_a_time_and_other_tasks_run_meanwhile(service, monkeypatch):
    monkeypatch.setattr("nbagent.supervisor.systemd.TIMEOUT_S", 0.2)
    service.manager.blocks_s = 0.6
    with contextlib.closing(Systemd()) as systemd:
        waiting = asyncio.ensure_future(systemd.set_limits(SCOPE, LIMITS))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        with pytest.raises(TimeoutError, match=r"set_limits: no response within 0\.2 s"):
            await waiting


@pytest.mark.parametrize(("number", "op", "is_repeated"), [
    (errno.ENOTCONN, "set_limits", True), (errno.ENOTCONN, "start_scope", True),
    (errno.ECONNRESET, "set_limits", True), (errno.ECONNRESET, "start_scope", False),
])
async def test_requests_go_on_while_pid_1_executes_itself(service, number, op, is_repeated):
    service.manager.error = OSError(number, "the connection to systemd ended")
    with contextlib.closing(Systemd()) as systemd:
        arguments = ([10], "x", LIMITS) if op == "start_scope" else (LIMITS,)
        settings = {"runtime_max_s": 1, "stop_timeout_s": 1} if op == "start_scope" else {}
        request = asyncio.ensure_future(getattr(systemd, op)(SCOPE, *arguments, **settings))
        await asyncio.sleep(0.15)
        service.manager.error = None
        if is_repeated:
            await request
            assert len(service.manager.calls) > 1
        else:
            with pytest.raises(ConnectionResetError, match="the connection to systemd ended"):
                await request


async def test_a_process_that_is_added_while_its_scope_starts_is_added_after_the_start(service):
    with contextlib.closing(Systemd()) as systemd:
        started = asyncio.ensure_future(
            systemd.start_scope(SCOPE, [10], "x", LIMITS, runtime_max_s=1, stop_timeout_s=1)
        )
        # Both in one turn of the loop, as when the zygote's processes are forked already.
        await asyncio.gather(started, systemd.attach(SCOPE, [11]))
    assert [call[0] for call in service.manager.calls] == ["start_scope", "attach"]


@pytest.mark.parametrize("payload", [
    b"{", b"[]", b"{}", b'{"op": 7}', b'{"op": "start"}', b'{"op": "attach", "unit": "%s", "pids": [true]}',
    b'{"op": "attach", "unit": "%s", "pids": [1]}', b'{"op": "attach", "unit": "%s", "pids": 7}',
    b'{"op": "set_limits", "unit": "%s", "limits": {"memory_bytes": 1e999, "cpu_weight": 1, "tasks": 1}}',
    b'{"op": "set_limits", "unit": "%s", "limits": {"memory_bytes": 1, "cpu_weight": 1, "tasks": 1, "cpu_quota": NaN}}',
    b"x" * 60_000,
])
def test_a_malformed_request_calls_nothing(service, payload):
    with Channel.unconnected() as channel:
        channel.socket.connect(str(paths.UNITS_SOCKET))
        channel.socket.send(payload.replace(b"%s", SCOPE.encode()))
        with channel.receive() as response, pytest.raises(StepFailed):
            response.raise_failure()
    assert service.manager.calls == []


async def test_a_stop_is_repeated_when_the_service_restarts_and_a_start_of_a_scope_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "UNITS_SOCKET", tmp_path / "units.sock")
    with contextlib.closing(Systemd()) as systemd:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with listener:
            listener.bind(str(paths.UNITS_SOCKET))
            listener.listen()
            ended = []

            def end():
                for _ in range(4):
                    connection, _ = listener.accept()
                    ended.append(connection.recv(4096))
                    connection.close()

            thread = threading.Thread(target=end)
            thread.start()
            with pytest.raises(OSError, match="ended without a response"):
                await systemd.stop(SCOPE)
            assert len(ended) == 3
            with pytest.raises(OSError, match="ended without a response"):
                await systemd.start_scope(SCOPE, [10], "x", LIMITS, runtime_max_s=1, stop_timeout_s=1)
            thread.join()
        assert len(ended) == 4


async def test_a_cancelled_start_of_a_scope_waits_until_the_processes_are_there(service):
    with contextlib.closing(Systemd()) as systemd:
        gate = threading.Event()
        service.manager.start_scope = lambda *_, **__: asyncio.to_thread(gate.wait, 10)
        starting = asyncio.ensure_future(
            systemd.start_scope(SCOPE, [10], "x", LIMITS, runtime_max_s=1, stop_timeout_s=1)
        )
        await asyncio.sleep(0.05)
        starting.cancel()
        await asyncio.sleep(0.05)
        assert not starting.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await starting


@pytest.mark.parametrize(("text", "expected"), [
    ("[err -2]: b'Unit a.scope not found.'", "Unit a.scope not found."),
    ("System.Error.ENOSPC[err -28]: No space left on device\nThis is DBusBaseError, a joke", "No space left on device"),
    ("b'org.freedesktop.systemd1.Masked'[err -2]: b\"Unit 'a' is masked.\"", "Unit 'a' is masked."),
    ("b'System.Error.EIO'[err -5]: ", "System.Error.EIO"),
    ("no reply", "no reply"),
])
def test_an_error_of_systemd_has_its_message_only(text, expected):
    assert bus._text(Exception(text)) == f"systemd: {expected}"
