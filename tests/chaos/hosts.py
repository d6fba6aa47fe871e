# SPDX-License-Identifier: BSD-3-Clause
"""The host of a run in this directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from at_rest import SETTINGS, WARM

import product
from product import say
from testhost_driver import Host


@contextlib.contextmanager
def running(name: str, *, keep: bool, driver: str = "nspawn", suite: str = "bookworm") -> Iterator[Host]:
    """A host with the packages of this tree and warm slots. With `keep` it stays, and one that is up is used."""
    host = Host.up(name=name, driver=driver, suite=suite, say=say)
    if keep:
        host.keep()
    try:
        host.run(["mkdir", "-p", "/etc/nbagent/conf.d"])
        host.run(["tee", "/etc/nbagent/conf.d/50-test.toml"], input=SETTINGS)
        product.add_changed(host, product.build(say), say)
        product.wait_warm(host, WARM)
        yield host
    finally:
        if not keep:
            host.down(now=True)
