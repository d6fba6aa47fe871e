# SPDX-License-Identifier: BSD-3-Clause
"""Delivers the content of a claim into a slot that has no owner yet, by a process inside the slot
(nbagent.content.deliver).

Its response comes from inside the slot and is untrusted: the channel bounds and checks it, and only text is shown.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from nbagent.config.host_config import HostConfig
from nbagent.content.deliver import ENTER, UNPACK, Order
from nbagent.core.claim_content import FILES_MAX, Content, FileBundle
from nbagent.core.errors import ArchiveFailed, ContentFailed, NbagentError, StartFailed
from nbagent.core.model import Slot
from nbagent.launch.requests import CONTENT
from nbagent.supervisor import launch_service
from nbagent.supervisor.crash_points import Point, reach
from nbagent.supervisor.launcher import has_ended, pid_of
from nbagent.supervisor.network import direct
from nbagent.supervisor.sandbox_specs import apparmor_profile, syscall_filter
from nbagent.wire import fields
from nbagent.wire.aio import receive
from nbagent.wire.channel import Channel, Message
from nbagent.wire.failure import Failure, StepFailed
from nbagent.wire.fields import MalformedMessage

_TEXT_MAX_CHARACTERS = 300
# The process in the slot has less time than the supervisor waits, so that the reason is its own where it has one.
_HEAD_START_S = 1.0
_ENTRIES_MAX = 1 << 40


class Injected(NamedTuple):
    """How many files of the claim, and entries of its archive, are in the slot now."""

    files: int
    entries: int


async def inject(
    slot: Slot, pidfd: int, content: Content, config: HostConfig, join_scope: Callable[[int], Awaitable[None]]
) -> Injected:
    """Delivers `content` into the slot whose first process is `pidfd`; `join_scope` moves a pid into its scope.

    Raises ContentFailed, ArchiveFailed or StartFailed. The slot must not be handed out then.
    """
    tries = launch_service.TRIES
    while True:
        tries -= 1
        try:
            return await _inject(slot, pidfd, content, config, join_scope)
        except StartFailed as error:
            # Its process ends with the launch service as long as it is not in the slot's scope.
            if error.details != _ended().details or not tries:
                raise


async def _inject(
    slot: Slot, pidfd: int, content: Content, config: HostConfig, join_scope: Callable[[int], Awaitable[None]]
) -> Injected:
    control, peer = Channel.pair()
    timeout_s = config.claims.timeout
    with control:
        try:
            with peer:
                control.send({"order": _order(slot, content, config).save()}, _descriptors(pidfd, content))
                process = await launch_service.spawn(CONTENT, peer.fileno())
        except (OSError, StepFailed, MalformedMessage) as error:
            raise StartFailed.at(*Failure.of(error, ENTER)) from error
        with process:
            try:
                await join_scope(pid_of(process.pidfd, slot))
                process.release()
            except (OSError, StartFailed) as error:
                if has_ended(process.pidfd) or isinstance(error, BrokenPipeError):
                    raise _ended() from error
                raise StartFailed.at(*Failure.of(error, ENTER)) from error
            reach(Point.CONTENT_STARTED)
            try:
                async with asyncio.timeout(timeout_s + _HEAD_START_S):
                    return await _result(control, content)
            except TimeoutError:
                text = f"content was not delivered within {timeout_s:g} s"
                if content.archive is None:
                    # A megabyte of files takes milliseconds, so that the host is busy.
                    raise StartFailed.at(ENTER, errno.ETIMEDOUT, text) from None
                raise ArchiveFailed(text) from None
            except OSError as error:
                raise StartFailed.at(*Failure.of(error, ENTER)) from error


def _ended() -> StartFailed:
    """The error of a process that ended before it delivered anything, which is no fault of the content."""
    return StartFailed.at(ENTER, errno.ESRCH, "the process that delivers the content ended before it could begin")


def _descriptors(pidfd: int, content: Content) -> dict[str, int]:
    files = content.files
    if files and not isinstance(files, FileBundle):
        raise TypeError("the supervisor has the files of a claim in a bundle")
    return {"init": pidfd} | ({"content": files.fd} if isinstance(files, FileBundle) else {})


def _order(slot: Slot, content: Content, config: HostConfig) -> Order:
    if slot.pid is None:
        raise ContentFailed(f"slot {slot.id} has no process")
    files, settings, network = content.files, config.claims, config.network
    return Order(
        uid=slot.uid,
        pid=slot.pid,
        syscall_filter=syscall_filter(),
        files=list(files.entries) if isinstance(files, FileBundle) else [],
        archive=content.archive,
        allowed=list(settings.archives),
        archive_bytes=settings.archive_max,
        archive_entries=settings.archive_entries,
        timeout_s=settings.timeout,
        proxy=str(network.proxy) if network.proxy is not None else None,
        direct=direct(network),
        apparmor=apparmor_profile(),
    )


async def _result(control: Channel, content: Content) -> Injected:
    try:
        response = await receive(control)
        if response is None:
            raise _ended()
        if "begun" in response.body:
            response.close()
            response = await receive(control)
        if response is None:
            raise _failure(content)(
                "the process that delivers the content was killed, most likely because the slot's memory ran out"
            )
        with response:
            injected = _injected(response)
        # The process is in the slot until its end of the channel is closed; then only the slot's own are.
        second = await receive(control)
    except MalformedMessage as error:
        raise ContentFailed(f"the slot's response is malformed: {error}") from None
    except StepFailed as error:
        raise _reported(error.failure) from error
    if second is not None:
        second.close()
        raise ContentFailed("the slot sent more than one response")
    return injected


def _injected(response: Message) -> Injected:
    response.raise_failure()
    return Injected(
        fields.integer(response.body, "files", 0, FILES_MAX),
        fields.integer(response.body, "entries", 0, _ENTRIES_MAX),
    )


def _reported(failure: Failure) -> NbagentError:
    text = failure.text[:_TEXT_MAX_CHARACTERS]
    if failure.step == ENTER:
        return StartFailed.at(ENTER, failure.errno, text)
    return ArchiveFailed(text) if failure.step == UNPACK else ContentFailed(text)


def _failure(content: Content) -> type[ContentFailed]:
    return ContentFailed if content.archive is None else ArchiveFailed
