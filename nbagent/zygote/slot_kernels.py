# SPDX-License-Identifier: BSD-3-Clause
"""The kernels of a slot as its notebook server manages them: jupyter_server's classes with what a slot needs beside.

A change of a kernel's state is written to the activity page. The kernel's OOM killer takes kernels before the server,
and the cell whose kernel was ended by a signal has the reason in its output. Output for a page that is closed is
limited. An interrupt also frees a kernel that its debugger has stopped.

Imported by `notebook_server` only, which keeps jsonschema from an import before. Runs under an image's Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
from typing import Any, List, Optional, Set

from jupyter_client import manager
from jupyter_core.paths import jupyter_runtime_dir
from jupyter_server.services.kernels.connection import channels
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager, ServerKernelManager
from traitlets import Instance, default, observe

from nbagent.sandbox.spec import ACTIVITY_FD
from nbagent.wire import activity
from nbagent.zygote import full_storage, kernel_end, task_limit
from nbagent.zygote.kernel_watch import DELIMITER, PARENT, KernelWatch
from nbagent.zygote.output_buffer import OutputBuffer

# From 0 to 1000; makes the Linux OOM killer select a notebook's kernel before its server.
KERNEL_OOM_SCORE_ADJ = 500
# The request of the Debug Adapter Protocol that ends a session; threads that are stopped go on.
DISCONNECT = {
    "type": "request", "seq": 1 << 30, "command": "disconnect",
    "arguments": {"restart": False, "terminateDebuggee": False},
}
DEBUGGER_TIMEOUT_S = 3.0


class _WakeableAsyncio:
    """A stand-in for the module asyncio in Jupyter's modules that poll kernels; a state change ends their sleep early.

    jupyter_client sleeps 10 ms after each start and each end of a kernel, "to ensure tests can capture the state before
    done" (in_pending_state); jupyter_server polls every 50 ms whether a kernel has left its first state (nudge).
    """

    def __init__(self) -> None:
        self._sleepers: Set[asyncio.Future[None]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, delay: float, result: Any = None) -> Any:
        if delay <= 0.01:
            return await asyncio.sleep(0, result)
        woken = asyncio.get_running_loop().create_future()
        self._sleepers.add(woken)
        try:
            await asyncio.wait([woken], timeout=delay)
        finally:
            self._sleepers.discard(woken)
        return result

    def wake(self) -> None:
        """Ends all sleeps; called when the state of a kernel has changed."""
        for woken in self._sleepers:
            if not woken.done():
                woken.set_result(None)


_wakeable = _WakeableAsyncio()
manager.asyncio = channels.asyncio = _wakeable


class SlotKernelManager(ServerKernelManager):
    """A kernel manager that writes the kernel's activity to the activity page, and watches the kernel's messages."""

    watch = Instance(KernelWatch)
    oom_kills: Optional[int] = None  # at the kernel's start

    @default("watch")
    def _default_watch(self) -> KernelWatch:
        return KernelWatch(self._write_activity)

    # jupyter_server 2.21 lists a kernel before it has set this trait, which has no default; a request for the list of
    # kernels fails with status 500 then.
    @default("last_activity")
    def _default_last_activity(self) -> datetime.datetime:
        return datetime.datetime.now(datetime.timezone.utc)

    @observe("execution_state", "last_activity")
    def _write_activity(self, _change: Any = None) -> None:
        _wakeable.wake()
        activity.write(ACTIVITY_FD, busy(self.parent))

    def connect_iopub(self, identity: Optional[bytes] = None) -> Any:
        stream = super().connect_iopub(identity=identity)
        # The server's own, by which it reads the kernel's status, has no identity.
        return stream if identity else self.watch.iopub(stream)

    def connect_stdin(self, identity: Optional[bytes] = None) -> Any:
        return self.watch.reopened(identity) or self.watch.stdin(super().connect_stdin(identity=identity), identity)

    async def interrupt_kernel(self, *args: Any, **kwargs: Any) -> Any:
        if self.watch.stopped:
            await self._end_debugging()
        self.watch.reset()
        return await super().interrupt_kernel(*args, **kwargs)

    async def _end_debugging(self) -> None:
        """Ends the debugger's session, because a kernel that it has stopped does not react to a signal."""
        stream, replied = self.connect_control(), asyncio.get_running_loop().create_future()

        def note_reply(_parts: Any) -> None:
            if not replied.done():
                replied.set_result(None)

        stream.on_recv(note_reply)
        try:
            self.session.send(stream, "debug_request", DISCONNECT)
            await asyncio.wait([replied], timeout=DEBUGGER_TIMEOUT_S)
        finally:
            stream.close()

    async def _async_pre_start_kernel(self, **kwargs: Any) -> Any:
        self.watch.ended()
        self.oom_kills = kernel_end.oom_kills()
        command, options = await super()._async_pre_start_kernel(**kwargs)
        full_storage.spare_temporary(options["env"], jupyter_runtime_dir())
        return command, options

    # jupyter_client calls this after each start and restart, its automatic restart after an OOM kill included.
    async def _async_post_start_kernel(self, **kwargs: Any) -> None:
        await super()._async_post_start_kernel(**kwargs)
        if pid := getattr(self.provisioner, "pid", None):
            # Raised if the kernel has ended meanwhile; the files of a process that is not reaped yet belong to root.
            ended = (ProcessLookupError, FileNotFoundError, PermissionError)
            with contextlib.suppress(*ended), open(f"/proc/{pid}/oom_score_adj", "w") as file:
                file.write(str(KERNEL_OOM_SCORE_ADJ))

    async def shutdown_kernel(self, *args: Any, **kwargs: Any) -> Any:
        result = await super().shutdown_kernel(*args, **kwargs)
        self.execution_state = "dead"
        return result


class SlotKernels(AsyncMappingKernelManager):
    """A manager of kernels that starts none for which the slot has no tasks left, and keeps a limited amount of output
    for pages that are closed.
    """

    _starting = 0  # kernels that are not in the list yet

    async def start_kernel(self, **options: Any) -> Any:
        if options.get("kernel_id") not in self:  # otherwise it runs
            kernels = (self.get_kernel(kernel_id).provisioner for kernel_id in self.list_kernel_ids())
            pids = [pid for kernel in kernels if (pid := getattr(kernel, "pid", None))]
            task_limit.check_room(ACTIVITY_FD, pids, self._starting)
        self._starting += 1
        try:
            return await super().start_kernel(**options)
        finally:
            self._starting -= 1

    def start_buffering(self, kernel_id: str, *arguments: Any) -> None:
        super().start_buffering(kernel_id, *arguments)
        session = self.get_kernel(kernel_id).session

        def note(dropped: int, parts: List[bytes]) -> List[bytes]:
            text = f"{dropped} messages of output were dropped, because the page was closed.\n"
            request = json.loads(parts[parts.index(DELIMITER) + PARENT])
            message = session.msg("stream", content={"name": "stderr", "text": text}, parent=request)
            return list(session.serialize(message, ident=b"stream"))

        if kernel_id in self._kernel_buffers:
            self._kernel_buffers[kernel_id]["buffer"] = OutputBuffer(note)


class SlotKernelConnection(channels.ZMQChannelsWebsocketConnection):
    """The connection of a page to a kernel. If a signal has ended the kernel, the cell gets the reason as an output."""

    def on_kernel_restarted(self) -> None:
        self._explain()
        super().on_kernel_restarted()

    def on_restart_failed(self) -> None:
        self._explain()
        super().on_restart_failed()

    def _explain(self) -> None:
        kernel = self.kernel_manager
        status = getattr(getattr(kernel.provisioner, "process", None), "returncode", None)
        if not isinstance(kernel, SlotKernelManager) or (text := kernel_end.reason(status, kernel.oom_kills)) is None:
            return
        if (iopub := self.channels.get("iopub")) is not None and not iopub.closed():
            iopub.flush()  # so that the reason follows the last output
        self.write_stderr(text, kernel.watch.request)


def busy(kernels: Any) -> int:
    """The number of busy kernels of a MappingKernelManager; one that waits for a person is not."""
    managers = (kernels.get_kernel(kernel_id) for kernel_id in kernels.list_kernel_ids())
    return sum(
        getattr(manager, "execution_state", None) == "busy" and not (
            isinstance(manager, SlotKernelManager) and manager.watch.waits) for manager in managers
    )
