# SPDX-License-Identifier: BSD-3-Clause
"""The slot: its id, its states and the moves between them, its limits, and the options of a claim.

Pure data. Times are seconds of CLOCK_BOOTTIME, because it goes on over a restart of the supervisor and does not jump
with the wall clock; a reboot ends every slot. `wall` converts one into the time of day.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from nbagent.core.claim_content import Content, parse_archive, parse_files
from nbagent.core.errors import IllegalMove, InvalidField
from nbagent.core.quantities import parse_duration, parse_integer, parse_quota, parse_size

T = TypeVar("T")

# 12 of 32 characters: 60 random bits. i, l, o and u are left out because they are easily misread.
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_ID = re.compile(r"[a-z0-9]{1,16}-[a-z0-9]{12}")
_PATH = re.compile(r"[A-Za-z0-9/._~%!$&'()*+,;=:@?#-]{1,2000}")
_CONTROL = re.compile(r"[\0-\x1f\x7f\ud800-\udfff]")

IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
IMAGE_NAME_EXPECTED = "a name of a-z, 0-9, '.', '_' and '-', at most 63 characters, the first a letter or digit"
ID_EXPECTED = "the id of a slot, LABEL-RANDOM, as its claim returned it"
PATH_EXPECTED = 'a path below the slot, such as "lab/tree/notebook.ipynb", without ".."'


class SlotState(enum.Enum):
    """The state of a slot."""

    STARTING = "starting"
    WARM = "warm"
    PREPARING = "preparing"
    CLAIMED = "claimed"
    STOPPING = "stopping"
    FAILED = "failed"
    GONE = "gone"


MOVES: Mapping[SlotState, frozenset[SlotState]] = {
    SlotState.STARTING: frozenset({SlotState.WARM, SlotState.STOPPING, SlotState.FAILED}),
    SlotState.WARM: frozenset({SlotState.PREPARING, SlotState.CLAIMED, SlotState.STOPPING, SlotState.FAILED}),
    # The network and content of a claim are on their way in; until then the slot is incomplete.
    SlotState.PREPARING: frozenset({SlotState.CLAIMED, SlotState.STOPPING, SlotState.FAILED}),
    SlotState.CLAIMED: frozenset({SlotState.STOPPING, SlotState.FAILED}),
    SlotState.STOPPING: frozenset({SlotState.GONE}),
    SlotState.FAILED: frozenset({SlotState.GONE}),
    SlotState.GONE: frozenset(),
}


@dataclass(frozen=True)
class Limits:
    """The limits of a slot's scope. `cpu_quota` is in processors (1.5: one and a half); None: no quota."""

    memory_bytes: int
    cpu_weight: int
    cpu_quota: float | None
    tasks: int

    def document(self) -> dict[str, object]:
        """The limits as JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Lowered:
    """The limits of a slot that its host has lowered for a time: `memory_bytes` is the limit at which the slot is held
    while the host's memory is short, and `cpu_part` the part of its CPU weight that it has while it gives way.
    """

    memory_bytes: int | None = None
    cpu_part: float = 1.0

    def of(self, limits: Limits) -> Limits:
        """The limits in force of a slot whose own are `limits`."""
        held_bytes = limits.memory_bytes if self.memory_bytes is None else self.memory_bytes
        return dataclasses.replace(
            limits,
            memory_bytes=min(limits.memory_bytes, held_bytes),
            cpu_weight=max(1, round(limits.cpu_weight * self.cpu_part)),
        )


@dataclass(frozen=True)
class Slot:
    """One slot; every change makes a new object.

    `path` and `query` are the target of the claim's link below the slot, from its image or the claim.
    `uid` is the slot's user id inside the range of its image, so on the host it is `id_base + uid`.
    `ends_s` is when PID 1 ends the scope, because systemd does not change RuntimeMaxSec= of a running scope.
    `addresses` are those of its interface, IPv4 and perhaps IPv6, and empty where it has none. `network` is a mode of
    the configuration, and decides whether the interface is open. `launch` is "fork" or "exec" once it has started, and
    `launch_reason` why it was not "fork" of a complete zygote. `lent_to` is the client of a slot that is lent and not
    yet claimed.
    """

    id: str
    image: str
    digest: str
    id_base: int
    uid: int
    state: SlotState
    limits: Limits
    token: str
    created_s: float
    ends_s: float = math.inf
    claimed_s: float | None = None
    ttl_s: float | None = None
    path: str = "lab"
    query: str = "token={token}"
    key: str | None = None
    fingerprint: str | None = None
    pid: int | None = None
    network: str = "none"
    addresses: tuple[str, ...] = ()
    reason: str = ""
    launch: str = ""
    launch_reason: str = ""
    lent_to: str | None = None

    @property
    def scope(self) -> str:
        """The unit that holds the slot's processes."""
        return f"nbagent-{self.id}.scope"

    @property
    def base_path(self) -> str:
        """The URL path below which the slot serves."""
        return f"/user/{self.id}/"

    @property
    def expires_s(self) -> float | None:
        """The end of a claimed slot's life; None before the claim."""
        return None if self.claimed_s is None or self.ttl_s is None else self.claimed_s + self.ttl_s

    def to(self, state: SlotState, **changes: Any) -> Slot:
        """The slot after a move. Raises IllegalMove when the table does not allow it."""
        if state not in MOVES[self.state]:
            raise IllegalMove(f"slot {self.id} is {self.state.value} and cannot become {state.value}")
        return dataclasses.replace(self, state=state, **changes)

    def save(self) -> dict[str, object]:
        """The slot as the content of its file."""
        saved = {**vars(self), "state": self.state.value, "limits": self.limits.document()}
        if self.lent_to is None:
            del saved["lent_to"]  # a version without the field refuses the record, and ends the slot
        return saved

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> Slot:
        """The slot of a file. Raises KeyError, TypeError or ValueError when it is not one."""
        fields = dict(saved)
        fields["state"] = SlotState(fields["state"])
        fields["limits"] = Limits(**fields["limits"])
        fields["addresses"] = tuple(fields.get("addresses", ()))
        return cls(**fields)

    def claim_document(self) -> dict[str, object]:
        """The response to the slot's claim, with its token. The API replaces `query` by `url`."""
        return {
            "slot": self.id,
            "path": self.base_path + self.path,
            "query": self.query.replace("{token}", self.token),
            "token": self.token,
            "image": self.image,
            "claimed_at": wall(self.claimed_s),
            "expires_at": wall(self.expires_s),
            "network": self.network,
            "limits": self.limits.document(),
        }

    def document(self, now_s: float) -> dict[str, object]:
        """The slot for every caller of the API, without its token."""
        return {
            "slot": self.id,
            "state": self.state.value,
            "image": self.image,
            "created_at": wall(self.created_s),
            "claimed_at": wall(self.claimed_s),
            "expires_at": wall(self.expires_s),
            "age_s": round(now_s - (self.created_s if self.claimed_s is None else self.claimed_s), 1),
            "launch": self.launch,
            "launch_reason": self.launch_reason,
            "network": self.network,
            "limits": self.limits.document(),
        }


def claim_link(claim: Mapping[str, object]) -> str:
    """The path that opens the slot of a claim document, with the query that its program needs, mostly its token."""
    path, mark, fragment = str(claim["path"]).partition("#")
    query = f"{'&' if '?' in path else '?'}{claim['query']}" if claim["query"] else ""
    return f"{path}{query}{mark}{fragment}"


@dataclass(frozen=True)
class Bounds:
    """The bounds of options: the operator's limits and the host's size."""

    memory_max_bytes: int
    ttl_max_s: float
    cpus: int
    networks: tuple[str, ...] = ("none",)
    archives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """The options of a claim or an update; None: unchanged, or the default."""

    image: str | None = None
    memory_bytes: int | None = None
    cpu_weight: int | None = None
    cpu_quota: float | None = None
    ttl_s: float | None = None
    path: str | None = None
    network: str | None = None
    content: Content = field(default_factory=Content)

    def limits(self, default: Limits) -> Limits:
        """`default` with the limits that the options set."""
        return Limits(
            memory_bytes=default.memory_bytes if self.memory_bytes is None else self.memory_bytes,
            cpu_weight=default.cpu_weight if self.cpu_weight is None else self.cpu_weight,
            cpu_quota=default.cpu_quota if self.cpu_quota is None else self.cpu_quota,
            tasks=default.tasks,
        )


CLAIM_FIELDS = ("image", "memory", "cpu_weight", "cpu_quota", "ttl", "path", "network", "files", "archive")
UPDATE_FIELDS = ("memory", "cpu_weight", "cpu_quota", "ttl")
MEMORY_MIN_BYTES = 64 << 20


def parse_options(given: Mapping[str, object], allowed: tuple[str, ...], bounds: Bounds) -> Options:
    """Options from untrusted JSON or a query string. Raises InvalidField with the field and the expected value."""
    for name in given:
        if name not in allowed:
            raise InvalidField(
                f"unknown field {name!r}; known are {', '.join(allowed)}",
                field=name, expected=f"one of {', '.join(allowed)}",
            )
    return Options(
        image=_field(given, "image", _image),
        memory_bytes=_field(given, "memory", lambda v: _memory(v, bounds)),
        cpu_weight=_field(given, "cpu_weight", _weight),
        cpu_quota=_field(given, "cpu_quota", lambda v: parse_quota(v, bounds.cpus)),
        ttl_s=_field(given, "ttl", lambda v: _ttl(v, bounds)),
        path=_field(given, "path", _path),
        network=_field(given, "network", lambda v: _network(v, bounds)),
        content=Content(
            files=_field(given, "files", parse_files) or (),
            archive=_field(given, "archive", lambda v: parse_archive(v, bounds.archives)),
        ),
    )


def _field(given: Mapping[str, object], name: str, parse: Callable[[object], T]) -> T | None:
    if name not in given:
        return None
    try:
        return parse(given[name])
    except ValueError as error:
        shown = repr(given[name])
        raise InvalidField(
            field=name, value=shown if len(shown) <= 80 else shown[:77] + "...", expected=str(error)
        ) from None


def _image(value: object) -> str:
    if isinstance(value, str) and IMAGE_NAME.fullmatch(value):
        return value
    raise ValueError("the name of an image on this host; GET /images lists them")


def _memory(value: object, bounds: Bounds) -> int:
    size_bytes = parse_size(value)
    if MEMORY_MIN_BYTES <= size_bytes <= bounds.memory_max_bytes:
        return size_bytes
    raise ValueError(f"a size from {MEMORY_MIN_BYTES} to {bounds.memory_max_bytes} bytes")


def _weight(value: object) -> int:
    expected = "a whole number from 1 to 10000"
    try:
        weight = parse_integer(value)
    except ValueError:
        raise ValueError(expected) from None
    if 1 <= weight <= 10000:
        return weight
    raise ValueError(expected)


def _ttl(value: object, bounds: Bounds) -> float:
    ttl_s = parse_duration(value)
    if 1 <= ttl_s <= bounds.ttl_max_s:
        return ttl_s
    raise ValueError(f"a time from 1 second to {bounds.ttl_max_s:g} seconds")


def _network(value: object, bounds: Bounds) -> str:
    if isinstance(value, str) and value in bounds.networks:
        return value
    names = " or ".join(f'"{name}"' for name in bounds.networks)
    raise ValueError(f"{names}, from network.allow of this host's configuration")


def _path(value: object) -> str:
    if isinstance(value, str) and not _CONTROL.search(value):
        # Encoded as browsers do it, because names of notebooks have blanks, and a query of GET /claim is decoded.
        path = quote(value.removeprefix("/"), safe="/%!$&'()*+,;=:@?#")
        segments = unquote(path.partition("?")[0]).split("/")
        if _PATH.fullmatch(path) and not path.startswith("/") and ".." not in segments:
            return path
    raise ValueError(PATH_EXPECTED)


def new_id(label: str) -> str:
    """A new slot id: the host's label and 60 random bits."""
    # 256 is a multiple of 32, so every character is equally likely.
    return f"{label}-" + "".join(_ALPHABET[byte % 32] for byte in secrets.token_bytes(12))


def new_token() -> str:
    """A new token: 256 random bits, 43 URL-safe characters."""
    return secrets.token_urlsafe(32)


def is_slot_id(text: str) -> bool:
    """Whether `text` is a well-formed slot id, of this or another host."""
    return _ID.fullmatch(text) is not None


def now() -> float:
    """Seconds of CLOCK_BOOTTIME."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wall(boot_s: float | None) -> str | None:
    """RFC 3339 UTC of a CLOCK_BOOTTIME instant, to the second."""
    if boot_s is None:
        return None
    return _written(int(time.time() - now() + boot_s))


# Cached, because a list of a thousand slots has three thousand times in it, and the same ones in each list.
@functools.lru_cache(4096)
def _written(unix_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_s))
