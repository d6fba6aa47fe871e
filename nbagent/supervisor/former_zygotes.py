# SPDX-License-Identifier: BSD-3-Clause
"""The zygotes that a former supervisor has left, by the connections that systemd has kept (`fd_store`).

One that is ready describes itself; a description that is late, malformed or of another protocol ends it. One that is
still starting cannot respond yet, so `zygote_starter` waits for it. `zygotes` adopts both, or ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Mapping
from typing import NamedTuple

from nbagent.core.model import now
from nbagent.image.store import Image
from nbagent.runtime.zygote_service import PROTOCOL
from nbagent.supervisor import fd_store
from nbagent.supervisor.zygote_identity import unit_of
from nbagent.wire import fields
from nbagent.wire.aio import receive
from nbagent.wire.channel import Channel
from nbagent.wire.failure import StepFailed
from nbagent.wire.fields import MalformedMessage

# The response of a zygote service that outlived the former supervisor, whose last requests it may still be serving. A
# new supervisor accepts no claim before it.
DESCRIBE_TIMEOUT_S = 5.0
_AGE_MAX_S, _FORKS_MAX = 10 ** 9, 10 ** 12


class Begun(NamedTuple):
    """A zygote that a former supervisor was starting."""

    instance: str
    channel: Channel


class Description(NamedTuple):
    """The description of a zygote: `identity` is as `zygote_identity.identity` made it when the zygote was started.

    `is_outdated`: libraries of the host that its service has loaded were replaced since, as by a security update.
    """

    identity: Mapping[str, object]
    is_outdated: bool

    @classmethod
    def read(cls, body: Mapping[str, object]) -> Description:
        """The description in a message. Raises MalformedMessage."""
        return cls(fields.mapping(body, "identity"), body.get("outdated") is True)

    def suits(self, image: Image) -> bool:
        """Whether this supervisor can start slots of the image by it."""
        return self.identity.get("protocol") == PROTOCOL and self.identity.get("digest") == image.digest


class Kept(NamedTuple):
    """A zygote of a former supervisor that is ready."""

    instance: str
    channel: Channel
    described: Description
    born_s: float
    forks: int


class FormerZygotes:
    """At most one zygote for each image: the youngest that is ready, otherwise one that is starting."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}
        self._begun: dict[str, Begun] = {}

    async def find(self, kept: Mapping[str, int], begun: Mapping[str, int]) -> None:
        """Takes over the connections: `kept` to zygotes that are ready, `begun` to those that are starting."""
        found = await asyncio.gather(*(_describe(instance, fd) for instance, fd in kept.items()))
        for zygote in sorted(filter(None, found), key=lambda zygote: zygote.born_s):
            name = _image_of(zygote.instance)
            # One that was about to be replaced when the former supervisor ended.
            if (former := self._kept.get(name)) is not None:
                _end(former)
            self._kept[name] = zygote
        for instance, fd in begun.items():
            starting, name = Begun(instance, _channel(fd)), _image_of(instance)
            if name in self._kept or name in self._begun:
                _end(starting)
            else:
                self._begun[name] = starting

    def units(self) -> set[str]:
        """The units of these zygotes."""
        return {unit_of(zygote.instance) for zygote in self._all()}

    def take_kept(self, image: Image) -> Kept | None:
        """The zygote that is ready and runs on this image, if there is one; from now on it is the caller's."""
        kept = self._kept.get(image.name)
        if kept is None or not kept.described.suits(image):
            return None
        return self._kept.pop(image.name)

    def take_begun(self, name: str) -> Begun | None:
        """The zygote of this image that is starting, if there is one; from now on it is the caller's."""
        return self._begun.pop(name, None)

    def end(self) -> None:
        """Ends those that were not taken."""
        for zygote in self._all():
            _end(zygote)
        self._kept.clear()
        self._begun.clear()

    def _all(self) -> list[Kept | Begun]:
        return [*self._kept.values(), *self._begun.values()]


async def _describe(instance: str, fd: int) -> Kept | None:
    """The zygote of a former supervisor; None, with its connection closed, when it cannot be adopted."""
    channel, token = _channel(fd), secrets.token_hex(8)
    with contextlib.suppress(OSError, TimeoutError, StepFailed, MalformedMessage):
        channel.send({"describe": token})
        async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
            while (response := await receive(channel)) is not None:
                with response:
                    response.raise_failure()
                    # A supervisor that was killed may have left the response to its own request.
                    if response.body.get("described") != token:
                        continue
                    described = Description.read(response.body)
                    if described.identity.get("protocol") != PROTOCOL:
                        break
                    age_s = fields.integer(response.body, "age_s", 0, _AGE_MAX_S)
                    forks = fields.integer(response.body, "forks", 0, _FORKS_MAX)
                    return Kept(instance, channel, described, now() - age_s, forks)
    channel.close()
    fd_store.forget(instance)
    return None


def _channel(fd: int) -> Channel:
    channel = Channel.from_fd(fd)
    channel.socket.setblocking(False)
    return channel


def _image_of(instance: str) -> str:
    return instance.partition(":")[0]


def _end(zygote: Kept | Begun) -> None:
    zygote.channel.close()
    fd_store.forget(zygote.instance)
