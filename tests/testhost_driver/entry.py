# SPDX-License-Identifier: BSD-3-Clause
"""How a command enters a host, prepared by `up` so that `testhost exec` does as little as possible.

A host's `entry` file holds the argv to put before the command, and which process must still be alive for it
to be valid. Imports only modules that the interpreter has loaded already, because the start of Python is most of
the cost of an exec.
"""

import os
import sys

# The environment of a command inside, which does not depend on the caller's.
ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "LOGNAME": "root",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "SHELL": "/bin/bash",
    "USER": "root",
}


def state_directory() -> str:
    """The directory of the state, which must be on a disk because the writable layer of each host is below it."""
    return os.environ.get("NBAGENT_TESTHOST_STATE") or "/var/lib/nbagent-testhost"


def start_ticks(pid: int) -> int | None:
    """When the process was started, in ticks after the machine's boot; None when gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the command's name may hold spaces and parentheses
    return None if fields[0] in "ZX" else int(fields[19])


def write(path: str, pid: int, ticks: int, prefix: list[str], *, remote_shell: bool) -> None:
    """`remote_shell`: the command goes as one string to a shell inside, as with ssh."""
    with open(path + ".new", "w") as file:
        file.write("\0".join([str(pid), str(ticks), "shell" if remote_shell else "argv", *prefix]))
    os.rename(path + ".new", path)


def command(name: str, argv: list[str], *, tty: bool = False, tag: str = "") -> list[str] | None:
    """The whole argv that runs `argv` in the host, or None when there is no such host or it has ended.

    `tag` makes the command findable from another one where it runs in a remote shell; see `end_by_tag`.
    """
    try:
        with open(f"{state_directory()}/hosts/{name}/entry") as file:
            pid, ticks, kind, *prefix = file.read().split("\0")
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if start_ticks(int(pid)) != int(ticks):
        return None
    if kind == "argv":
        return prefix + argv
    import shlex

    # A command that is followed by another is not exec'd by the shell, which then reports a death by signal as status.
    mark = f": {tag}; " if tag else ""
    return [*prefix, *(["-tt"] if tty else []), "testhost", "--", f"{mark}{shlex.join(argv)}; exit $?"]


def end_by_tag(tag: str) -> list[str]:
    """The argv that ends a tagged command inside, with its process group: sshd lets it outlive its client."""
    script = 'for leader in $(pgrep -f "^[^ ]* -c : $1; "); do kill -9 "-$leader"; done'
    return ["sh", "-c", script, "end", tag]


def exec_or_return(arguments: list[str]) -> None:
    """`testhost exec N -- CMD…`: executes the command. Returns when the arguments need the full parser."""
    if (
        len(arguments) < 3
        or arguments[1] != "--"
        or "/" in arguments[0]
        or arguments[0].startswith(("-", "."))
    ):
        return
    tty = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    found = command(arguments[0], arguments[2:], tty=tty)
    if found:
        terminal = {"TERM": os.environ["TERM"]} if "TERM" in os.environ else {}
        os.execvpe(found[0], found, ENVIRONMENT | terminal)
