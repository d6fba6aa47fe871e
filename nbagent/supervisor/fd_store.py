# SPDX-License-Identifier: BSD-3-Clause
"""systemd's file descriptor store of nbagent.service, which keeps the connections to zygotes over a restart.

A connection is in the store from the moment its zygote service has connected, under one name while the zygote starts
and under another when it is ready. systemd passes it to the next supervisor after a restart or a crash. It closes the
store when the service is stopped, so that the zygotes end then; and it removes a connection whose other end was closed.
See FDSTORE= in sd_notify(3) and FileDescriptorStoreMax= in systemd.service(5).
"""

from __future__ import annotations

from collections.abc import Mapping

from systemd import daemon

# A name in the store may have no colon, and the name of a zygote's instance has one.
_READY, _BEGUN = "zygote/", "begun-zygote/"


def begin(instance: str, fd: int) -> None:
    """Stores the connection to a zygote that starts. Without systemd, does nothing."""
    daemon.notify(f"FDSTORE=1\nFDNAME={_name(_BEGUN, instance)}", fds=[fd])


def keep(instance: str, fd: int) -> None:
    """Stores the connection to a zygote that is ready, under its other name only, because systemd ignores a descriptor
    that is in the store already. Without systemd, does nothing."""
    daemon.notify(f"FDSTOREREMOVE=1\nFDNAME={_name(_BEGUN, instance)}")
    daemon.notify(f"FDSTORE=1\nFDNAME={_name(_READY, instance)}", fds=[fd])


def forget(instance: str) -> None:
    """Closes the connection in the store, if it is there."""
    for prefix in (_READY, _BEGUN):
        daemon.notify(f"FDSTOREREMOVE=1\nFDNAME={_name(prefix, instance)}")


def kept(named: Mapping[int, str]) -> dict[str, int]:
    """The connections to zygotes of a former supervisor by instance, among the descriptors that systemd passes."""
    return _named(_READY, named)


def begun(named: Mapping[int, str]) -> dict[str, int]:
    """The connections to zygotes that a former supervisor was starting, by instance."""
    return _named(_BEGUN, named)


def _named(prefix: str, named: Mapping[int, str]) -> dict[str, int]:
    return {name.removeprefix(prefix).replace("/", ":"): fd for fd, name in named.items() if name.startswith(prefix)}


def _name(prefix: str, instance: str) -> str:
    return prefix + instance.replace(":", "/")
