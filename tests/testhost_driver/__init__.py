# SPDX-License-Identifier: BSD-3-Clause
"""Real systemd hosts for tests. `from testhost_driver import Host`; the command line is `tests/testhost`."""

TYPE_CHECKING = False  # type checkers treat it as true; importing `typing` would cost more than the rest of this module
if TYPE_CHECKING:
    from testhost_driver.host import Host as Host


def __getattr__(name: str) -> object:
    # Imported late, because `testhost exec` does not need it and is the command that a test suite calls most.
    if name == "Host":
        from testhost_driver.host import Host

        return Host
    raise AttributeError(name)
