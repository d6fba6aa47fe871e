# SPDX-License-Identifier: BSD-3-Clause
"""The operations of the control socket: one table of name → arguments → result, for the API and the supervisor.

A request is {"op": name, "args": {...}}, and its response {"ok": result} or {"error": NbagentError.to_wire()}. The
arguments get their types here, when the supervisor receives them; the results are the supervisor's and so are trusted.
A claim's arguments have the paths and sizes of its files; their bytes are in a sealed memfd, the descriptor "content"
beside the request, so that the supervisor neither decodes nor copies them.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from nbagent.core.claim_content import FILES_MAX_BYTES, File, FileBundle, checked_entries
from nbagent.core.documents import Claim, Drain, ImageStatus, Recycled, SlotStatus, Stats, Trial
from nbagent.wire import fields, memfd
from nbagent.wire.channel import Message

Options = Mapping[str, object]
# An Idempotency-Key of 255 characters with a prefix and an address; an IPv6 address with its zone.
KEY_MAX_CHARACTERS, CLIENT_MAX_CHARACTERS = 400, 64
# Ids of a trace and a span in hexadecimal, with a hyphen.
TRACE_MAX_CHARACTERS = 49
JsonObject = dict[str, object]


class Arguments(Protocol):
    """Arguments of an operation."""

    def save(self) -> JsonObject:
        """The arguments as JSON."""

    def descriptors(self) -> dict[str, int]:
        """Fresh descriptors beside the request; they are the caller's."""


class NoArguments(NamedTuple):
    """Arguments of an operation that takes none."""

    def save(self) -> JsonObject:
        return {}

    def descriptors(self) -> dict[str, int]:
        return {}

    @classmethod
    def restore(cls, args: JsonObject, request: Message) -> NoArguments:
        return cls()


class SlotArguments(NamedTuple):
    """The slot that an operation is for."""

    id: str

    def save(self) -> JsonObject:
        return {"id": self.id}

    def descriptors(self) -> dict[str, int]:
        return {}

    @classmethod
    def restore(cls, args: JsonObject, request: Message) -> SlotArguments:
        return cls(fields.text(args, "id"))


class ReleaseArguments(NamedTuple):
    """The slot to end, and the address of the client."""

    id: str
    client: str

    def save(self) -> JsonObject:
        return {"id": self.id, "client": self.client}

    def descriptors(self) -> dict[str, int]:
        return {}

    @classmethod
    def restore(cls, args: JsonObject, request: Message) -> ReleaseArguments:
        return cls(fields.text(args, "id"), fields.line(args, "client", CLIENT_MAX_CHARACTERS))


class LentArguments(NamedTuple):
    """A lent slot, its token, which shows that the client has it, and the address of the client."""

    id: str
    token: str
    client: str

    def save(self) -> JsonObject:
        return self._asdict()

    def descriptors(self) -> dict[str, int]:
        return {}

    @classmethod
    def restore(cls, args: JsonObject, request: Message) -> LentArguments:
        client = fields.line(args, "client", CLIENT_MAX_CHARACTERS)
        return cls(fields.text(args, "id"), fields.text(args, "token"), client)


class UpdateArguments(NamedTuple):
    """The slot, the options to change (core.model.UPDATE_FIELDS), and the address of the client."""

    id: str
    options: Options
    client: str

    def save(self) -> JsonObject:
        return {"id": self.id, "options": dict(self.options), "client": self.client}

    def descriptors(self) -> dict[str, int]:
        return {}

    @classmethod
    def restore(cls, args: JsonObject, request: Message) -> UpdateArguments:
        client = fields.line(args, "client", CLIENT_MAX_CHARACTERS)
        return cls(fields.text(args, "id"), fields.mapping(args, "options"), client)


@dataclass(frozen=True)
class ClaimArguments:
    """The options of a claim (core.model.CLAIM_FIELDS), its Idempotency-Key, the address of the client, and its trace.

    In the API the option "files" is a tuple of File; in the supervisor it is a FileBundle, whose descriptor belongs to
    the request.
    """

    options: Options
    key: str
    client: str
    trace: str = ""

    def save(self) -> JsonObject:
        options = {name: value for name, value in self.options.items() if name != "files"}
        args: JsonObject = {"options": options, "key": self.key, "client": self.client, "trace": self.trace}
        if files := self._files():
            entries = [[file.path, len(file.data)] for file in files]
            digest = hashlib.sha256(json.dumps(entries).encode())
            for file in files:
                digest.update(file.data)
            args["files"] = {"entries": entries, "digest": digest.hexdigest()}
        return args

    def descriptors(self) -> dict[str, int]:
        files = self._files()
        return {"content": memfd.create("nbagent-content", (file.data for file in files))} if files else {}

    @classmethod
    def restore(cls, args: JsonObject, request: Message) -> ClaimArguments:
        options = {**fields.mapping(args, "options")}
        if "files" in options or ("files" in args) != ("content" in request.fds):
            raise fields.MalformedMessage("files are not beside the descriptor 'content'")
        if "files" in args:
            sent = fields.mapping(args, "files")
            fd = request.fds["content"]
            entries = checked_entries(sent.get("entries"), memfd.size(fd, FILES_MAX_BYTES))
            options["files"] = FileBundle(entries, fields.text(sent, "digest"), fd)
        return cls(
            options, fields.line(args, "key", KEY_MAX_CHARACTERS), fields.line(args, "client", CLIENT_MAX_CHARACTERS),
            # An API of an earlier version sends none.
            fields.line(args, "trace", TRACE_MAX_CHARACTERS) if "trace" in args else "",
        )

    def _files(self) -> tuple[File, ...]:
        files = self.options.get("files", ())
        if not isinstance(files, tuple):
            raise TypeError("files must be parsed before a claim is sent (claim_content.parse_files)")
        return files


# With a space in it, so that it is never an Idempotency-Key of a caller.
OWN_KEY_PREFIX = "own "
# Of the key of a page with a button, which a visitor may press twice.
LANDING_KEY_PREFIX = "landing "


def own_key() -> str:
    """A key for a claim without an Idempotency-Key, so that a repeated request never takes two slots."""
    return OWN_KEY_PREFIX + secrets.token_hex(16)


A = TypeVar("A", bound=Arguments)
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class Operation(Generic[A, R_co]):
    """One line of the table. `restore` makes typed arguments from untrusted JSON; it raises MalformedMessage.

    `is_repeatable`: the client sends the request again when the supervisor ended before it responded. The socket is
    systemd's, so the second connection waits until the new supervisor has adopted every slot.
    """

    name: str
    restore: Callable[[JsonObject, Message], A]
    result: type[R_co]
    is_repeatable: bool = field(default=True, kw_only=True)


CLAIM = Operation("claim", ClaimArguments.restore, Claim)
LEND = Operation("lend", ClaimArguments.restore, Claim, is_repeatable=False)
KEEP = Operation("keep", LentArguments.restore, Claim)
GIVE_BACK = Operation("give_back", LentArguments.restore, SlotStatus)
SLOTS = Operation("slots", NoArguments.restore, list[SlotStatus])
SLOT = Operation("slot", SlotArguments.restore, SlotStatus)
UPDATE = Operation("update", UpdateArguments.restore, SlotStatus)
# A repetition finds no slot if the supervisor ended after it had begun to end the slot.
RELEASE = Operation("release", ReleaseArguments.restore, SlotStatus)
DRAIN = Operation("drain", NoArguments.restore, Drain)
UNDRAIN = Operation("undrain", NoArguments.restore, Drain)
RECYCLE_POOL = Operation("recycle_pool", NoArguments.restore, Recycled, is_repeatable=False)
TRY_START = Operation("try_start", NoArguments.restore, Trial, is_repeatable=False)
STATS = Operation("stats", NoArguments.restore, Stats)
IMAGES = Operation("images", NoArguments.restore, list[ImageStatus])

OPERATIONS = (
    CLAIM, LEND, KEEP, GIVE_BACK, SLOTS, SLOT, UPDATE, RELEASE, DRAIN, UNDRAIN, RECYCLE_POOL, TRY_START, STATS, IMAGES,
)
