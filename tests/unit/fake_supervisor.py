"""A supervisor without slots: the control wire on a real socket, the real options, no process.

The API and the command line are tested against it. It keeps what it was asked, so a test can
say that bad input cost nothing.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path
from typing import Any

from nbagent.core import model
from nbagent.core.errors import Draining, Full, IdempotencyMismatch, ImageNotFound, NbagentError, SlotNotFound
from nbagent.wire import control, operations
from nbagent.wire.channel import Channel, Message

LABEL = "c07"
BOUNDS = model.Bounds(
    memory_max_bytes=4 << 30, ttl_max_s=86400, cpus=4, networks=("none",), archives=("https://data.example.org/",)
)
LIMITS = model.Limits(memory_bytes=1 << 30, cpu_weight=100, cpu_quota=None, tasks=256)


class FakeSupervisor:
    """Answers on a SEQPACKET socket at `path` until closed."""

    def __init__(self, path: Path, capacity: int = 1000) -> None:
        self.path = path
        self.capacity = capacity
        self.slots: dict[str, model.Slot] = {}
        self.draining = False
        self.ready = True
        self.asked: list[dict[str, Any]] = []
        self.raises: Exception | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> FakeSupervisor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops answering; may be called twice."""
        if self._thread.is_alive():
            self._listener.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._listener.close()
            self.path.unlink()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with Channel(connection, control.REQUEST_MAX_BYTES) as channel, contextlib.suppress(OSError, ValueError):
                request = channel.receive()
                if request is not None:
                    with request:
                        channel.send(self._answer(request))

    def _answer(self, message: Message) -> dict[str, Any]:
        request: dict[str, Any] = message.body
        self.asked.append(request)
        try:
            if self.raises is not None:
                raise self.raises
            args = request["args"]
            if request["op"] == "claim":
                args = vars(operations.CLAIM.restore(dict(args), message))
            return {"ok": getattr(self, "_op_" + request["op"])(**args)}
        except NbagentError as error:
            return {"error": error.to_wire()}

    def _op_claim(self, options: dict[str, Any], key: str | None, client: str) -> Any:
        wanted = model.parse_options(options, model.CLAIM_FIELDS, BOUNDS)
        fingerprint = json.dumps(options, sort_keys=True, default=str)
        for slot in self.slots.values():
            if key is not None and slot.key == key:
                if slot.fingerprint != fingerprint:
                    raise IdempotencyMismatch(f"key {key} came with other options before")
                return slot.claim_document()
        if wanted.image not in (None, "minimal"):
            raise ImageNotFound(f"no image {wanted.image!r}", field="image", expected="one of minimal")
        if self.draining:
            raise Draining(retry_after_s=30)
        if len(self.slots) >= self.capacity:
            raise Full(retry_after_s=4.2)
        slot = model.Slot(
            id=model.new_id(LABEL), image="minimal", digest="sha256-0", id_base=1 << 20, uid=1,
            state=model.SlotState.CLAIMED, limits=wanted.limits(LIMITS), token=model.new_token(),
            created_s=model.now(), claimed_s=model.now(), ttl_s=wanted.ttl_s or 3600.0,
            path=wanted.path or "lab", key=key, fingerprint=fingerprint,
        )
        self.slots[slot.id] = slot
        return slot.claim_document()

    def _op_slots(self) -> Any:
        return [self._document(slot) for slot in self.slots.values()]

    def _op_slot(self, id: str) -> Any:  # noqa: A002
        return self._document(self._find(id))

    def _op_update(self, id: str, options: dict[str, Any]) -> Any:  # noqa: A002
        wanted = model.parse_options(options, model.UPDATE_FIELDS, BOUNDS)
        slot = self._find(id)
        changed = model.dataclasses.replace(
            slot, limits=wanted.limits(slot.limits), ttl_s=wanted.ttl_s or slot.ttl_s
        )
        self.slots[id] = changed
        return self._document(changed)

    def _op_release(self, id: str) -> Any:  # noqa: A002
        slot = self._find(id).to(model.SlotState.STOPPING)
        del self.slots[id]
        return self._document(slot)

    def _op_drain(self) -> Any:
        self.draining = True
        return {"draining": True, "claimed": len(self.slots), "warm": 2}

    def _op_undrain(self) -> Any:
        self.draining = False
        return {"draining": False, "claimed": len(self.slots), "warm": 2}

    def _op_recycle_pool(self) -> Any:
        return {"drained": 2}

    def _op_images(self) -> Any:
        return [{"name": "minimal", "digest": "sha256-0", "launch": "exec",
                 "warm": 2, "wanted": 2, "default": True}]

    def _op_stats(self) -> Any:
        durations = {"count": 3, "sum": 0.06, "buckets": {"0.01": 1, "0.05": 3, "0.1": 3}}
        counters = ("claims", "claims_refused", "starts", "start_failures", "released", "died",
                    "oom_kills", "culled_idle", "culled_age", "culled_memory", "compressed")
        return {
            "version": "0.3.0", "label": LABEL,
            "available": 0 if self.draining else self.capacity - len(self.slots),
            "capacity": self.capacity,
            "warm": 2, "starting": 1, "claimed": len(self.slots), "stopping": 0,
            "draining": self.draining, "ready": self.ready, "container_image": "minimal",
            "memory_available_bytes": 8 << 30, "free_percent": 90, "next_end_s": 4.2,
            "pools": {"minimal": {"wanted": 2, "warm": 2, "starting": 1, "failures": 0}},
            "counters": {name: index for index, name in enumerate(counters)},
            "start_seconds": durations, "claim_seconds": durations, "uptime_s": 12.5,
        }

    def _find(self, slot: str) -> model.Slot:
        if slot in self.slots:
            return self.slots[slot]
        raise SlotNotFound(f"no slot {slot}")

    @staticmethod
    def _document(slot: model.Slot) -> dict[str, Any]:
        measured = {"idle_s": 1.5, "memory_bytes": 90 << 20, "swapped_bytes": 5 << 20, "cpu_s": 2.5, "tasks": 11,
                    "oom_kills": 0, "tasks_refused": 0, "storage_bytes": 1 << 20}
        return slot.document(model.now()) | measured
