# SPDX-License-Identifier: BSD-3-Clause
"""The host of a run in this directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from at_rest import SETTINGS, WARM

import product
from product import Api, say
from testhost_driver import Host

# A zygote and a start by exec take up to two minutes of the processor time that an emulated machine counts.
EMULATED = """
[slots]
start_timeout = "10min"
"""


def slower(host: Host) -> float:
    """The factor of deadlines on a host, which is an emulated machine or not."""
    return 4.0 if host.driver == "vm" else 1.0


def journal_cursor(host: Host) -> str:
    """The position of the last entry of the journal."""
    shown = host.run(["journalctl", "-q", "-n", "1", "--show-cursor", "-o", "cat"]).stdout
    return shown.rpartition("-- cursor: ")[2].strip()


def release_all(host: Host) -> None:
    """Ends the slots that callers of a former run have left claimed on a host that was kept."""
    api = Api(host)
    for slot in api.get("/slots").json():
        if slot["state"] == "claimed":
            say(f"releasing {slot['slot']} of a former run")
            api.delete(f"/slots/{slot['slot']}")


@contextlib.contextmanager
def running(
    name: str, *, keep: bool, driver: str = "nspawn", suite: str = "bookworm", prepare: Sequence[str] = ()
) -> Iterator[Host]:
    """A host with the packages of this tree, warm slots and no claimed ones. With `keep` it stays, and one that is up
    is used.

    `prepare` is a command that is executed before the packages are installed.
    """
    host = Host.up(name=name, driver=driver, suite=suite, say=say)
    if keep:
        host.keep()
    try:
        if prepare:
            host.run(list(prepare))
        host.run(["mkdir", "-p", "/etc/nbagent/conf.d"])
        host.run(["tee", "/etc/nbagent/conf.d/50-test.toml"], input=SETTINGS)
        if driver == "vm":
            host.run(["tee", "/etc/nbagent/conf.d/51-emulated.toml"], input=EMULATED)
        product.add_changed(host, product.build(say), say)
        product.wait_warm(host, WARM)
        release_all(host)
        yield host
    finally:
        if not keep:
            host.down(now=True)
