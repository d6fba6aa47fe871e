# SPDX-License-Identifier: BSD-3-Clause
"""The events that nbagent writes to the journal: each has a MESSAGE_ID, a priority and fields.

Every kind of event is one member of `Event`. packaging/nbagent.catalog holds the explanation that
`journalctl -x` prints for it; tests/unit/test_catalog.py checks that the two lists are equal. An
entry about a slot has the field `NBAGENT_SLOT=`, so `journalctl NBAGENT_SLOT=ID` prints all of them.

Callers emit an event after it happened, never before.
"""

from __future__ import annotations

import enum
import functools
import re
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nbagent.core.journald import Journal

# Control characters, line and paragraph separators, changes of the writing direction, and surrogates, which UTF-8 lacks.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Priority(enum.IntEnum):
    """syslog(3) priorities, for `journalctl -p`."""

    ERR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6
    DEBUG = 7


class Kind(NamedTuple):
    """MESSAGE_ID, priority and text of an event; `text` is a %-format with named fields."""

    message_id: str
    priority: Priority
    text: str


class Event(enum.Enum):
    """Every kind of journal entry that nbagent writes."""

    AGENT_READY = Kind("6521035b3ff04feb88c92548b5542e9e", Priority.INFO, "agent %(label)s is ready: %(adopted)s slots adopted, capacity %(capacity)s")
    AGENT_STOPPING = Kind("9e9a4cdd7d2243fe995221b82bc11189", Priority.INFO, "agent stops; claimed slots keep running")
    CONFIG_RELOADED = Kind("3dcb1e358e8b4b0cb75d342c7280efa8", Priority.INFO, "configuration reloaded")
    CONFIG_REFUSED = Kind("69271e7b1f9e464aa828cd161b9e5d20", Priority.ERR, "configuration not reloaded: %(text)s")
    SLOT_STARTING = Kind("af5ca35bdfcc4e77b18755ac1e49e4a2", Priority.INFO, "slot %(slot)s starts from image %(image)s")
    SLOT_WARM = Kind("e8cd4fce160c4598b8e4b61949266185", Priority.INFO, "slot %(slot)s is warm after %(took_ms)s ms")
    SLOT_CLAIMED = Kind("12ed30e6088e42ccb653d32788675081", Priority.INFO, "slot %(slot)s claimed by %(client)s for %(ttl_s)s s")
    SLOT_LENT = Kind("29acb44752aa39b3e983a5fe06cd0793", Priority.INFO, "slot %(slot)s lent to %(client)s for %(ttl_s)s s")
    SLOT_RETURNED = Kind("c389bd7cd2bb5fb4ab2f3d737a93015a", Priority.INFO, "lent slot %(slot)s removed: %(text)s")
    CONTENT_DELIVERED = Kind("be7eb579348a41f392980cecde64f025", Priority.INFO, "content of the claim delivered to slot %(slot)s after %(took_ms)s ms: %(text)s")
    SLOT_NOT_PREPARED = Kind("60ac41d29c47403b95636687bf284c72", Priority.NOTICE, "slot %(slot)s ended because the claim's content or network could not be set up: %(text)s")
    SLOT_UPDATED = Kind("b4e6291587384e9886220ed915f4aeb4", Priority.INFO, "slot %(slot)s updated by %(client)s: %(text)s")
    SLOT_RELEASED = Kind("6fb33426e020411d89d2f6e11b0cbac0", Priority.INFO, "slot %(slot)s released by %(client)s")
    SLOT_CULLED = Kind("7b77b27db7374acea5de2983df49b061", Priority.INFO, "slot %(slot)s removed: %(text)s")
    SLOT_RETIRED = Kind("1f61a98eeded4c2ea0743b04de07916b", Priority.INFO, "unclaimed slot %(slot)s retired: %(text)s")
    SLOT_FAILED = Kind("b49d6bb6c9ef467498f1854733208a44", Priority.WARNING, "slot %(slot)s did not start: %(text)s")
    SLOT_DIED = Kind("02082d84e50e471fa3bcbd8a66cef216", Priority.WARNING, "slot %(slot)s ended unexpectedly: %(text)s")
    SLOT_OOM = Kind("eeba48b5bb434bbf8ee339305b2c1dda", Priority.WARNING, "slot %(slot)s ran out of memory: %(text)s")
    SLOT_TASKS_REFUSED = Kind("c15ff9ed3706454ab8d676f69ba81e37", Priority.NOTICE, "slot %(slot)s is at its limit of processes and threads: TasksMax=%(tasks)s")
    SLOT_STORAGE_FULL = Kind("d3ae5651de5d48468d4d58578c7b0622", Priority.NOTICE, "slot %(slot)s has no storage left: %(text)s")
    SLOT_HELD = Kind("c230449bad1c49b2a4e62fdec2ade38b", Priority.NOTICE, "slot %(slot)s may not grow: its limit is %(text)s")
    SLOT_FREED = Kind("5b461a180a48421486f3c45ba1993199", Priority.INFO, "slot %(slot)s may grow again: its limit is %(text)s")
    SLOT_NOT_HELD = Kind("52d97d74e811412ba4d330c41e9c1d7b", Priority.WARNING, "failed to change the memory limit of slot %(slot)s, which grows while the host's memory is short: %(text)s")
    SLOT_GIVES_WAY = Kind("dd43bfca03704e9d92e5ae1af0eb51ec", Priority.INFO, "slot %(slot)s computes while no processor of the host is free: its CPUWeight= is %(text)s until it rests")
    SLOT_WEIGHT_KEPT = Kind("8864f5673c044336ae3ad70b118cd0bc", Priority.WARNING, "failed to change the CPU weight of slot %(slot)s: %(text)s")
    SLOT_OUTPUT_DROPPED = Kind("5bfc573930c940edb49bc630c883030f", Priority.WARNING, "slot %(slot)s exceeds the log rate limit: %(lines)s lines dropped, %(bytes)s bytes")
    SLOT_COMPRESSED = Kind("a7cce4919dbf4fd1ab1668e620950dbb", Priority.DEBUG, "memory of slot %(slot)s compressed in %(took_ms)s ms: %(before)s bytes before, %(after)s bytes after, %(swapped)s bytes in zram")
    SLOT_KILLED = Kind("07264f1dabc849c28a0039a0d392c6aa", Priority.NOTICE, "slot %(slot)s did not end within %(wait_s)s s of SIGTERM; its remaining processes were killed")
    SLOT_STOP_FAILED = Kind("c0a1e7f4d82b49c5b6135f9e70d48a2c", Priority.WARNING, "slot %(slot)s was not stopped, next attempt in %(wait_s)s s: %(text)s")
    SLOT_GONE = Kind("5d228306df004b76b0638734c77a88c0", Priority.INFO, "slot %(slot)s removed after %(age_s)s s; processor time used: %(cpu_s)s s, most memory at one time: %(peak_bytes)s bytes")
    SLOT_ADOPTED = Kind("bcd85f62197b418f81d82c0888bae142", Priority.INFO, "slot %(slot)s adopted in state %(state)s")
    SLOT_LIMITS_MENDED = Kind("7f3e0c5ab1d84a6c9b72d81e4f6a05c3", Priority.WARNING, "limits of slot %(slot)s set to those of its record: %(text)s")
    SLOT_LIMITS_RESTORED = Kind("3a113b1b2b454a428820668a7dca5e48", Priority.INFO, "slot %(slot)s has its own limits again: %(text)s")
    SLOT_REMOVED = Kind("cf8fcf24e7a74f40bbaf5dec8f193e38", Priority.NOTICE, "remains of slot %(slot)s removed: %(text)s")
    POOL_BACKOFF = Kind("d21e37092c564cc08c0ee12c91d1c333", Priority.WARNING, "pool %(image)s pauses for %(wait_s)s s after %(failures)s failed starts")
    HOST_FULL = Kind("57891dcfb3fc4e91ac0219ef96c2537c", Priority.NOTICE, "claim refused: %(text)s")
    ZYGOTE_READY = Kind("c5f0b8c1b9a04d52a3d6c1b7f0d2a9e4", Priority.INFO, "zygote %(zygote)s of image %(image)s is ready after %(took_ms)s ms")
    ZYGOTE_ADOPTED = Kind("5e0f7d1c9b3a4682a4d7f2c80b16e395", Priority.INFO, "zygote %(zygote)s of image %(image)s adopted; it has forked %(forks)s slots")
    ZYGOTE_ENDED = Kind("0f4b7f2d6a5e4c0f9d1f3f7a1c8e5b26", Priority.WARNING, "zygote %(zygote)s failed; %(meanwhile)s until the next one is ready: %(text)s")
    ZYGOTE_LEFT_OUT = Kind("72c55a31cf2e44a494e977140c97a9da", Priority.WARNING, "zygote %(zygote)s of image %(image)s: %(text)s")
    ZYGOTE_OUTPUT_DROPPED = Kind("41b7c9be2f6d4f0d8a5e93c07d1b6e84", Priority.WARNING, "zygote %(zygote)s exceeds the log rate limit: %(lines)s lines dropped, %(bytes)s bytes")
    ZYGOTE_REPLACED = Kind("a2d97c3b4e1f45a8b6f09c5d7e8a1b34", Priority.INFO, "zygote %(zygote)s replaced: %(text)s")
    DRAIN_STARTED = Kind("875ce81d14eb45779076bc769de73b84", Priority.NOTICE, "drain started: the host refuses new claims, claimed slots keep running")
    DRAIN_ENDED = Kind("d8588f3fa3c24bd6b15c944b6a5ea6f6", Priority.NOTICE, "drain ended: the host accepts claims again")
    IMAGE_UNREADABLE = Kind("0bc63350b4844358b8076fa893514ce8", Priority.WARNING, "image %(image)s skipped: cannot be read: %(text)s")
    IMAGE_REMOVED = Kind("76a3d4bb762d4e53947351833104a45f", Priority.INFO, "image %(digest)s removed from the store: no slot uses it")
    SYSTEMD_LOST = Kind("9a70c5d2b1e84f3795f6a0d48e2c17b3", Priority.WARNING, "the connection to systemd ended; it is opened again")
    ENTRIES_LOST = Kind("3d1c9b74e05a4f2f9a6e8b7d50c2f418", Priority.WARNING, "%(count)s journal entries of this service were lost, because journald did not read them")
    HEALTH_LOST = Kind("d2b5f0a8c4714e9da36f7e1c95b80d42", Priority.WARNING, "%(part)s fails, so this host offers fewer slots: %(text)s")
    HEALTH_RESTORED = Kind("8f9c1e5a3d6047b2b4e8a7c60d15f293", Priority.NOTICE, "%(part)s works again")
    RESOURCE_LOW = Kind("328aa0983cb4452480f723b397ba263e", Priority.WARNING, "%(resource)s of this host are nearly used up: %(free)s of %(limit)s are left")
    RESOURCE_RESTORED = Kind("7d88f57286d643aa9c35fdd9b992375d", Priority.NOTICE, "%(resource)s of this host suffice again: %(free)s of %(limit)s are left")
    NETWORK_FAILED = Kind("941fcad1b56e411ca4f64dcb31e8503c", Priority.WARNING, "failed to set up the slot network: %(text)s")
    NETWORK_RESTORED = Kind("c56a026931784bdfb4bbe6f67097d3fa", Priority.WARNING, "nftables table inet nbagent was changed by another program; restored")
    NETWORK_REPAIRED = Kind("8c0cfee49b7d46e99ad3eb0ffbab620f", Priority.WARNING, "slot network restored after a change by another program: %(text)s")
    DNS_PUBLISHED = Kind("f5e34eec98d34b0aac9f762fe89f29aa", Priority.INFO, "records of %(name)s published: %(text)s")
    DNS_WITHDRAWN = Kind("3054e0a53eec4436873ace4c59051623", Priority.NOTICE, "records of %(name)s withdrawn: %(text)s")
    DNS_RESTORED = Kind("bf8608e7d3f64c1dbfc452caed54faf1", Priority.WARNING, "records of %(name)s were changed by another program; published again: %(text)s")
    DNS_FAILED = Kind("23ff37d4c2b64018af98f2eda61ca45e", Priority.WARNING, "records of %(name)s not changed, next attempt in %(wait_s)s s: %(text)s")
    DNS_HOST_REMOVED = Kind("b7e58209bc8f4cdaac16f52737dbe1af", Priority.WARNING, "records of %(name)s removed: no response from the host for %(wait_s)s s")
    DNS_HOSTS_KEPT = Kind("5a2629ef24a04be69e209f54b54101f0", Priority.WARNING, "records of hosts without a response kept, because fewer than half of the hosts respond to this gateway: %(text)s")
    TERMINATION_NOTICED = Kind("05dcd1e9dd8b4abea7a6b1fe3371dcdf", Priority.NOTICE, "%(provider)s ends this machine: %(text)s; the host drains")


def entry(event: Event, **fields: object) -> dict[str, str]:
    """The fields of `event`'s journal entry; each of `fields` becomes `NBAGENT_NAME=`.

    The text of a field may be that of a caller or of an image, so control characters in it are escaped: a line feed
    would begin a line that looks like an entry of its own.
    """
    kind = event.value
    shown = {name: value if isinstance(value, (int, float)) else _escaped(str(value)) for name, value in fields.items()}
    return {
        "MESSAGE": kind.text % shown,
        "MESSAGE_ID": kind.message_id,
        "PRIORITY": str(int(kind.priority)),
        "SYSLOG_IDENTIFIER": "nbagent",
        **{f"NBAGENT_{name.upper()}": str(value) for name, value in shown.items()},
    }


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


@functools.cache
def _journal() -> Journal:
    # Imported here because the init of every slot imports this module, and keeps its memory small.
    from nbagent.core import journald

    return journald.Journal(lambda count: entry(Event.ENTRIES_LOST, count=count))


def emit(event: Event, **fields: object) -> None:
    """Write `event` to the journal, and its text to standard error as well if that is a terminal."""
    _journal().send(entry(event, **fields))
    if sys.stderr.isatty():
        print(entry(event, **fields)["MESSAGE"], file=sys.stderr)
