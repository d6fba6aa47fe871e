# SPDX-License-Identifier: BSD-3-Clause
"""The errors of the test host driver. Each message names what is wrong and what would be right.

HostError                the command line prints it as one line, exit status 1
├── BadArgument          the caller's input; exit status 2
├── NoSuchHost           no host of that name is up
├── BuildFailed          a root filesystem could not be made
├── BootFailed           a host did not reach `running`; carries the console's or journal's end
└── CommandFailed        a command inside a host ended with a status other than 0
    └── CommandTimedOut  it did not end in time
"""

from __future__ import annotations


class HostError(Exception):
    """The driver failed to do what it was called for."""


class BadArgument(HostError):
    """An argument of the caller is not valid."""


class NoSuchHost(HostError):
    """The named host is not up."""


class BuildFailed(HostError):
    """A root filesystem could not be built."""


class BootFailed(HostError):
    """The host did not come up."""


class CommandFailed(HostError):
    """A command inside a host failed. Its output is part of the message, so that a test's report shows it."""

    def __init__(self, host: str, argv: list[str], returncode: int, stdout: str, stderr: str) -> None:
        self.argv = argv
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr
        parts = [f"{host}: {' '.join(argv)} ended with status {returncode}"]
        parts += [
            f"--- {name}\n{text.rstrip()}" for name, text in (("stdout", stdout), ("stderr", stderr)) if text
        ]
        super().__init__("\n".join(parts))


class CommandTimedOut(CommandFailed):
    """A command inside a host was ended because it took too long. Its status is 124, as with timeout(1)."""
