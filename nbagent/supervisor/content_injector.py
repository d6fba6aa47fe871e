"""Brings content into a slot that nobody has yet, by a process that enters it (nbagent.content.deliver).

What comes back is the slot's own word: it is bounded, parsed strictly, and shown as text and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import subprocess
from collections.abc import Callable
from typing import NamedTuple

from nbagent.config.host_config import ClaimSettings
from nbagent.content.deliver import Order
from nbagent.core.claim_content import Content
from nbagent.core.errors import ArchiveFailed, ContentFailed, NbagentError, StartFailed
from nbagent.core.model import Slot
from nbagent.supervisor import scoped_process
from nbagent.supervisor.aio import readable
from nbagent.supervisor.launcher import syscall_filter

_ANSWER_MAX_BYTES = 8192
_TEXT_MAX_CHARACTERS = 300
# The slot is given less time than we wait, so that the reason is its own where it has one.
_HEAD_START_S = 1.0


class Injected(NamedTuple):
    """What is in the slot now: files of the claim, and entries of its archive."""

    files: int
    entries: int


async def inject(
    slot: Slot, pidfd: int, content: Content, settings: ClaimSettings, join_scope: Callable[[int], None]
) -> Injected:
    """Brings `content` into the slot whose first process is `pidfd`; `join_scope` puts a pid into its scope.

    Raises ContentFailed, ArchiveFailed or StartFailed. The slot is then in no state to be handed out.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs, open(os.memfd_create("nbagent-order", os.MFD_CLOEXEC), "w+") as order:
            json.dump(_order(slot, content, settings).save(), order)
            order.flush()
            order.seek(0)
            passed = (theirs.fileno(), pidfd, order.fileno())
            try:
                process = scoped_process.spawn_blocked("nbagent.content.deliver", passed, subprocess.DEVNULL)
            except OSError as error:
                raise StartFailed(f"enter: {error}", step="enter", errno=error.errno or 0) from error
        try:
            join_scope(process.pid)
            scoped_process.release(process)
            async with asyncio.timeout(settings.timeout + _HEAD_START_S):
                answer = await _packet(ours)
                # Only when the last process of it has ended is the slot nobody's but its own.
                if answer and await _packet(ours):
                    raise ContentFailed("the slot answers twice")
        except TimeoutError:
            raise _failure(content)(f"not there after {settings.timeout:g} s") from None
        except OSError as error:
            raise StartFailed(f"enter: {error}", step="enter", errno=error.errno or 0) from error
        finally:
            scoped_process.kill(process)
    return _result(answer, content)


def _order(slot: Slot, content: Content, settings: ClaimSettings) -> Order:
    assert slot.pid is not None
    return Order(
        uid=slot.uid,
        pid=slot.pid,
        syscall_filter=syscall_filter(),
        files=[[file.path, base64.b64encode(file.data).decode()] for file in content.files],
        archive=content.archive,
        allowed=list(settings.archives),
        archive_bytes=settings.archive_max,
        archive_entries=settings.archive_entries,
        timeout_s=settings.timeout,
    )


async def _packet(connection: socket.socket) -> bytes:
    """One packet, b"" when no process holds the other end. Descriptors beside it are not accepted."""
    await readable(connection.fileno())
    try:
        return connection.recv(_ANSWER_MAX_BYTES)
    except ConnectionResetError:
        return b""


def _result(answer: bytes, content: Content) -> Injected:
    if not answer:
        raise _failure(content)("what brought it was ended, most likely as the slot's memory ran out")
    try:
        document = json.loads(answer)
        if "failed" in document:
            raise _reported(document["failed"]["part"], str(document["failed"]["text"]))
        return Injected(int(document["done"]["files"]), int(document["done"]["entries"]))
    except (ValueError, RecursionError, KeyError, TypeError):
        raise ContentFailed("the slot's answer is none") from None


def _reported(part: str, text: str) -> NbagentError:
    shown = "".join(c if c.isprintable() else "?" for c in text[:_TEXT_MAX_CHARACTERS])
    if part == "enter":
        return StartFailed(f"enter: {shown}", step="enter")
    return ArchiveFailed(shown) if part == "archive" else ContentFailed(shown)


def _failure(content: Content) -> type[ContentFailed]:
    return ContentFailed if content.archive is None else ArchiveFailed
