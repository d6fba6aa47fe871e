# SPDX-License-Identifier: BSD-3-Clause
"""The specification of a slot's sandbox: plain values, sent as JSON from the supervisor to the launcher."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

# Descriptors of the slot's program: its listening socket, its activity page, its configuration.
LISTEN_FD = 3
ACTIVITY_FD = 4
CONFIG_FD = 5
# The host ids of images (nbagent.image.ids.BASES), of which each has IDS.
IDS = 65536
HOST_IDS = range(0x70000000, 0x7FFE0000)
# The profile of packaging/apparmor.
APPARMOR_PROFILE = "nbagent-slots"


class Uplink(NamedTuple):
    """The slot's end of its interface.

    `addresses` has the slot's IPv4 address and, on a host that forwards IPv6, its IPv6 address; `gateways` has the
    host's address of each family, of which the first is also the resolver. `rate` limits what the slot sends, in
    bytes a second.
    """

    addresses: List[str]
    gateways: List[str]
    rate: int


class SandboxSpec(NamedTuple):
    """One slot's sandbox.

    `command` is started in `directory`; its first word is searched on the PATH of `environment`. When `port` is not
    0, the program must listen on that port of the slot's loopback within `listen_timeout_s`, and connections to
    LISTEN_FD are forwarded there; when it is 0, the program inherits the three descriptors above.
    `root` is the image's tree on the host, owned by the ids from `id_base`; `uid` is the slot's user id inside the
    image's range of ids; `storage_bytes` bounds the total size of the files that the slot writes; `code` is the
    host's directory of the package nbagent, mounted read-only in the slot, as is `system`, the files below its /sys;
    `mountpoint` is an empty directory of the host, on which the slot's mount namespace mounts the slot's storage;
    `syscall_filter` is a seccomp program in base64; `uplink` is None for a slot with loopback only.
    `forked` means that the slot's PID 1 starts inside the image's user namespace and its own pid namespace;
    `forked_filter` is then the filter that its program and kernels load in addition to the zygote's.
    `apparmor` is the AppArmor profile of the slot's processes, empty on a host without it. `limit_files` is the host's
    directory with the files of nbagent.supervisor.limit_files, empty for a zygote. `public` are the directories of the
    image that everyone may write to, of which the slot gets copies.
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
    system: str
    uplink: Optional[Uplink] = None
    forked: bool = False
    forked_filter: str = ""
    apparmor: str = ""
    limit_files: str = ""
    public: Sequence[str] = ()

    def save(self) -> Dict[str, object]:
        """The fields as a JSON object."""
        return self._asdict()

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> SandboxSpec:
        """The inverse of `save`. Raises TypeError when a field is missing or unknown."""
        fields = dict(saved)
        if fields.get("uplink") is not None:
            fields["uplink"] = Uplink(*fields["uplink"])
        return cls(**fields)
