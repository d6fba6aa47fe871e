"""What a slot's sandbox is to be: plain values that travel as JSON from supervisor to launcher."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional

# Where a slot's process finds what the supervisor made for it.
LISTEN_FD = 3
ACTIVITY_FD = 4
CONFIG_FD = 5


class Uplink(NamedTuple):
    """The slot's side of its interface: for IPv4, and perhaps IPv6, an address and the host's that
    it is reached by; the first of the latter also resolves names. `rate` is what the slot may
    send, in bytes a second."""

    addresses: List[str]
    gateways: List[str]
    rate: int


class SandboxSpec(NamedTuple):
    """One slot's sandbox.

    `command` is started in `directory`, its first word looked for on the PATH of `environment`. Where `port`
    is not 0, it listens on that port of the slot's own loopback, within `listen_timeout_s`, and what comes
    in at LISTEN_FD is forwarded there; else the program is handed the three descriptors above.
    `root` is the image's tree on the host, owned by `id_base` and up; `uid` is the slot's id
    inside the image's range of ids; `storage_bytes` bounds everything the slot may write;
    `code` is the host's directory of the package nbagent, shown to the slot read-only;
    `mountpoint` is an empty directory of the host, covered in the slot's mount namespace only;
    `syscall_filter` is a seccomp program, in base64; `uplink` is None for a slot that has loopback only.
    `forked`: the slot's processes begin inside the image's user namespace and a pid namespace of their own;
    `forked_filter` is then what its program and kernels have beside the zygote's filter.
    """

    slot: str
    root: str
    id_base: int
    uid: int
    user: str
    home: str
    storage_bytes: int
    command: List[str]
    directory: str
    port: int
    listen_timeout_s: float
    environment: Dict[str, str]
    code: str
    mountpoint: str
    syscall_filter: str
    uplink: Optional[Uplink] = None
    forked: bool = False
    forked_filter: str = ""

    def save(self) -> Dict[str, Any]:
        """The specification as JSON."""
        return self._asdict()

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> SandboxSpec:
        """The specification out of JSON. Raises TypeError when it is not one."""
        fields = dict(saved)
        if fields.get("uplink") is not None:
            fields["uplink"] = Uplink(*fields["uplink"])
        return cls(**fields)
