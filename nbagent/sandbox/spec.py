"""What a slot's sandbox is to be: plain values that travel as JSON from supervisor to launcher."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple

# Where a slot's process finds what the supervisor made for it.
LISTEN_FD = 3
ACTIVITY_FD = 4
CONFIG_FD = 5


class SandboxSpec(NamedTuple):
    """One slot's sandbox.

    `root` is the image's tree on the host, owned by `id_base` and up; `uid` is the slot's id
    inside the image's range of ids; `storage_bytes` bounds everything the slot may write;
    `code` is the host's directory of the package nbagent, shown to the slot read-only;
    `mountpoint` is an empty directory of the host, covered in the slot's mount namespace only;
    `syscall_filter` is a seccomp program, in base64.
    """

    slot: str
    root: str
    id_base: int
    uid: int
    user: str
    home: str
    storage_bytes: int
    command: List[str]
    environment: Dict[str, str]
    code: str
    mountpoint: str
    syscall_filter: str

    def save(self) -> Dict[str, Any]:
        """The specification as JSON."""
        return self._asdict()

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> SandboxSpec:
        """The specification out of JSON. Raises TypeError when it is not one."""
        return cls(**saved)
