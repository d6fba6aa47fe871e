# SPDX-License-Identifier: BSD-3-Clause
"""The command line of the test hosts. Parses arguments, calls `testhost_driver.host` and prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from testhost_driver import ending, entry, state
from testhost_driver import host as hosts
from testhost_driver.errors import BadArgument, HostError
from testhost_driver.host import Host

EPILOG = """\
examples:
  testhost up --name t1                         a Debian 12 host, native speed
  testhost up --name t2 --suite trixie          a Debian 13 host
  testhost up --name v1 --driver vm --suite trixie
  testhost cp dist/*.deb t1:/root/
  testhost exec t1 -- systemctl status
  testhost forward t1 9000 8000:18000           127.0.0.1:9000 and :18000 of this machine
  testhost down --all

Root filesystems are cached in $NBAGENT_CACHE (/var/cache/nbagent-build),
hosts live in $NBAGENT_TESTHOST_STATE (/var/lib/nbagent-testhost).
"""


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    ending.take_signals()
    try:
        return int(arguments.call(arguments) or 0)
    except BadArgument as error:
        print(f"testhost: {error}", file=sys.stderr)
        return 2
    except HostError as error:
        print(f"testhost: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return ending.status()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="testhost",
        description="Real systemd hosts for tests, on a machine that need not have systemd.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    up = commands.add_parser("up", help="make a host, and return when it is fully booted")
    up.add_argument(
        "--name", default=hosts.DEFAULT_NAME, help="1 to 16 of a-z, 0-9 and '-' (default: %(default)s)"
    )
    up.add_argument("--driver", choices=state.DRIVERS, default="nspawn", help="default: %(default)s")
    up.add_argument("--suite", choices=state.SUITES, default="bookworm", help="default: %(default)s")
    up.add_argument(
        "--memory", metavar="SIZE", help="of the whole host, like 4G (default: nspawn no limit, vm 4G)"
    )
    up.add_argument("--cpus", type=int, metavar="N", help="of the whole host (default: nspawn all, vm 2)")
    up.set_defaults(call=_up)

    run = commands.add_parser("exec", help="run a command in a host and exit with its status")
    run.add_argument("host")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD…")
    run.set_defaults(call=_exec)

    copy = commands.add_parser("cp", help="copy SRC… N:DEST, or N:SRC DEST")
    copy.add_argument("paths", nargs="+", metavar="PATH")
    copy.set_defaults(call=_cp)

    forward = commands.add_parser(
        "forward", help="127.0.0.1:HOSTPORT here reaches 127.0.0.1:PORT in the host"
    )
    forward.add_argument("host")
    forward.add_argument("ports", nargs="+", metavar="PORT[:HOSTPORT]")
    forward.set_defaults(call=_forward)

    show = commands.add_parser("list", help="what is up")
    show.add_argument("--json", action="store_true")
    show.set_defaults(call=_list)

    down = commands.add_parser("down", help="end hosts and remove everything of them")
    down.add_argument("hosts", nargs="*", metavar="N")
    down.add_argument("--all", action="store_true", help="every host of this machine")
    down.add_argument(
        "--now", action="store_true", help="switch a virtual machine off instead of shutting it down"
    )
    down.set_defaults(call=_down)
    return parser


def _up(arguments: argparse.Namespace) -> None:
    Host.up(arguments.name, arguments.driver, arguments.suite, arguments.memory, arguments.cpus).keep()


def _exec(arguments: argparse.Namespace) -> None:
    """Executes the command in this process, so that descriptors, terminal, signals and exit status are its own."""
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    argv = Host.attach(arguments.host).command(command, tty=sys.stdin.isatty() and sys.stdout.isatty())
    terminal = {"TERM": os.environ["TERM"]} if "TERM" in os.environ else {}
    os.execvpe(argv[0], argv, entry.ENVIRONMENT | terminal)


def _cp(arguments: argparse.Namespace) -> None:
    *sources, dest = arguments.paths
    if not sources:
        raise BadArgument("cp: SRC… N:DEST, or N:SRC DEST")
    into, dest_path = _split(dest)
    remote = [_split(source) for source in sources]
    if into and not any(name for name, _path in remote):
        Host.attach(into).copy_in([Path(source) for source in sources], dest_path)
    elif not into and all(name for name, _path in remote):
        if len(remote) > 1 and not Path(dest).is_dir():
            raise BadArgument(f"{dest} is not a directory")
        for name, path in remote:
            Host.attach(name).copy_out(path, dest)
    else:
        raise BadArgument("cp: SRC… N:DEST, or N:SRC DEST; one side is a host, the other this machine")


def _split(path: str) -> tuple[str, str]:
    """`N:PATH` in two. As in scp, a text without a colon, or with a slash before it, is a path of this machine."""
    name, colon, rest = path.partition(":")
    return (name, rest) if colon and "/" not in name else ("", path)


def _forward(arguments: argparse.Namespace) -> None:
    host = Host.attach(arguments.host)
    for text in arguments.ports:
        inside, colon, outside = text.partition(":")
        if not inside.isdecimal() or (colon and not outside.isdecimal()):
            raise BadArgument(f"{text!r}: PORT or PORT:HOSTPORT, numbers")
        port = host.forward(int(inside), int(outside) if colon else None)
        print(f"127.0.0.1:{port} -> {host.name} 127.0.0.1:{inside}")


def _list(arguments: argparse.Namespace) -> None:
    rows = [_row(name) for name in state.names()]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        ports = " ".join(f"{here}->{inside}" for here, inside in row["forwards"].items())
        line = (
            f"{row['name']:<16} {row['status']:<8} {row['driver'] or '-':<7} {row['suite'] or '-':<9} {ports}"
        )
        print(line.rstrip())


def _row(name: str) -> dict[str, Any]:
    found, status = hosts.status(name)
    known = ("driver", "suite", "accel", "memory_bytes", "cpus")
    return {
        "name": name,
        "status": status,
        **{key: (getattr(found, key) or None) if found else None for key in known},
        "forwards": {f.machine_port: f.host_port for f in found.forwards} if found else {},
    }


def _down(arguments: argparse.Namespace) -> int:
    if bool(arguments.hosts) == arguments.all:
        raise BadArgument("down: name hosts, or --all")
    missing = False
    for name in state.names() if arguments.all else arguments.hosts:
        if hosts.take_down(name, now=arguments.now):
            print(f"testhost: {name} is down", file=sys.stderr)
        else:
            print(f"testhost: no host {name!r}", file=sys.stderr)
            missing = True
    return 1 if missing else 0
