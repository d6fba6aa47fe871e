# SPDX-License-Identifier: BSD-3-Clause
"""systemd's file descriptor store of nbagent.service, which keeps the connections to zygotes over a restart.

A connection is in the store from the moment its zygote is ready. systemd passes it to the next supervisor after a
restart or a crash. It closes the store when the service is stopped, so that the zygotes end then; and it removes a
connection whose other end was closed. See FDSTORE= in sd_notify(3) and FileDescriptorStoreMax= in systemd.service(5).
"""

from __future__ import annotations

from collections.abc import Mapping

from systemd import daemon

# A name in the store may have no colon, and the name of a zygote's instance has one.
_PREFIX = "zygote/"


def keep(instance: str, fd: int) -> None:
    """Stores the connection to a zygote. Without systemd, does nothing."""
    daemon.notify(f"FDSTORE=1\nFDNAME={_name(instance)}", fds=[fd])


def forget(instance: str) -> None:
    """Closes the connection in the store, if it is there."""
    daemon.notify(f"FDSTOREREMOVE=1\nFDNAME={_name(instance)}")


def kept(named: Mapping[int, str]) -> dict[str, int]:
    """The connections of a former supervisor by instance, among the descriptors that systemd passes by name."""
    return {
        name.removeprefix(_PREFIX).replace("/", ":"): fd for fd, name in named.items() if name.startswith(_PREFIX)
    }


def _name(instance: str) -> str:
    return _PREFIX + instance.replace(":", "/")
