# SPDX-License-Identifier: BSD-3-Clause
"""The commands of `nbagent`.

Standard output has only the result, so that scripts can use a command. An error is one line on standard error, and its
class in nbagent.core.errors determines the exit status.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nbagent import __version__
from nbagent.cli import tables
from nbagent.cli.dns import dns
from nbagent.cli.gateway import gateway
from nbagent.cli.images import image
from nbagent.cli.remote import DEFAULT_URL, Remote, read_token
from nbagent.cli.slot import slot as slot_group
from nbagent.config import host_config, nginx_check, nginx_settings
from nbagent.config.host_values import NETWORK_MODES
from nbagent.core import paths
from nbagent.core.errors import ConfigError, NbagentError, SlotNotFound
from nbagent.core.model import is_slot_id
from nbagent.core.proxies import HttpProxy
from nbagent.core.quantities import format_duration, parse_duration

WAIT_INTERVAL_S = 1.0
# The value of --wait without a duration.
WITHOUT_END = "without end"
EX_TEMPFAIL = 75  # sysexits.h
SERVER_ERRORS = 500  # the first HTTP status of a failure of the server
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def main(argv: list[str] | None = None) -> None:
    """The entry point. Exits with the status of the error, if there is one."""
    try:
        nbagent.main(argv, prog_name="nbagent", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except NbagentError as error:
        _print_error(error)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        # The reader of our output closed the pipe. Without this, Python would fail to flush the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        _print_error(error)
        sys.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nbagent", message="%(prog)s %(version)s")
def nbagent() -> None:
    """Claim, watch and end notebook slots, and manage this host."""


nbagent.add_command(dns)
nbagent.add_command(gateway)
nbagent.add_command(image)
nbagent.add_command(slot_group)


def _with_api(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options for the address of the API and for JSON to a command, which gets `remote` and `as_json`."""

    @_JSON
    @click.option("--url", envvar="NBAGENT_URL", default=DEFAULT_URL, show_default=True, show_envvar=True,
                  help="The control API.")
    @click.option("--token-file", envvar="NBAGENT_TOKEN_FILE", type=click.Path(readable=False, path_type=Path),
                  show_envvar=True, help=f"The file with the token of the API.  [default: {paths.TOKEN}, if readable]")
    @functools.wraps(function)
    def command(url: str, token_file: Path | None, **options: Any) -> None:
        function(Remote(url, read_token(token_file)), **options)

    return command


@nbagent.command()
@click.option("--image", help="The image to start.  [default: pool.image]")
@click.option("--memory", help="Memory such as 512M or 2G.  [default: slots.memory]")
@click.option("--cpu-weight", help="Share of the processors when they are busy, 1 to 10000.")
@click.option("--cpu-quota", help="Limit of processor time, such as 1/32 of the host or 50% of one processor.")
@click.option("--ttl", help="Life of the slot, such as 2h.  [default: slots.ttl]")
@click.option("--path", help="Page that the URL opens, such as lab/tree/notebook.ipynb.")
@click.option("--file", "files", metavar="FILE[=PATH]", multiple=True,
              help="A file to copy to PATH in the slot's home directory; may be repeated.")
@click.option("--archive", metavar="URL", help="A .tar, .tar.gz or .zip to download and unpack in the slot's home.")
@click.option("--network", type=click.Choice(NETWORK_MODES), help="Network of the slot.  [default: that of the image]")
@click.option("--idempotency-key", help="A claim with the same key returns the same slot.")
@_with_api
def claim(
    remote: Remote, as_json: bool, idempotency_key: str | None, files: tuple[str, ...], **options: str | None
) -> None:
    """Take a slot and print its URL."""
    request: dict[str, object] = {name: value for name, value in options.items() if value is not None}
    if files:
        request["files"] = dict(_file(argument) for argument in files)
    claimed = remote.call("POST", "/claim", request, idempotency_key)
    if as_json:
        _print_json(claimed)
        return
    click.echo(claimed["url"])
    if sys.stderr.isatty():
        remaining = format_duration(tables.seconds_until(claimed["expires_at"], _now()))
        click.echo(f"slot {claimed['slot']} expires in {remaining}, at {claimed['expires_at']}", err=True)


@nbagent.command()
@click.argument("slots", metavar="ID...", nargs=-1, required=True)
@_with_api
def release(remote: Remote, as_json: bool, slots: tuple[str, ...]) -> None:
    """End slots. After a failure, continue with the next slot, and exit with the status of the last failure."""
    released, failure = [], None
    for slot in slots:
        try:
            released.append(remote.call("DELETE", _slot_path(slot)))
        except NbagentError as error:
            _print_error(error)
            failure = error
        else:
            if not as_json:
                click.echo(f"{slot} {released[-1]['state']}")
    if as_json:
        _print_json(released)
    if failure is not None:
        sys.exit(failure.exit_status)


@nbagent.command()
@click.argument("slot", metavar="[ID]", required=False)
@_with_api
def slots(remote: Remote, as_json: bool, slot: str | None) -> None:
    """Show the slots of the host, or one slot in full. `nbagent top` shows them repeatedly."""
    found = remote.call("GET", "/slots" if slot is None else _slot_path(slot))
    if as_json:
        _print_json(found)
    elif slot is not None:
        tables.show_facts(found)
    else:
        tables.show(tables.SLOT_COLUMNS, _slot_rows(found))


@nbagent.command("history")
@click.argument("slot", metavar="[ID]", required=False)
@click.option("--since", metavar="DURATION", help="Slots with an event in this time, such as 1h or 2d.")
@click.option("--all", "every", is_flag=True, help="With --since: also slots that were never claimed.")
@_JSON
def history_command(slot: str | None, since: str | None, every: bool, as_json: bool) -> None:
    """Show what happened to a slot, or to all slots of a time. The events are in this host's journal."""
    from nbagent.cli import history

    if (slot is None) == (since is None):
        raise click.UsageError("give either the ID of a slot or --since")
    if slot is not None:
        found = history.of_slot(slot) if is_slot_id(slot) else None
        if found is None:
            text = f"the journal has no entry about slot {slot}; only root and the group systemd-journal read all of it"
            raise SlotNotFound(text, slot=slot)
        if as_json:
            _print_json(found.document())
        else:
            document = found.document()
            events, changes = document.pop("events"), document.pop("changes")
            tables.show_facts(document | {"changes": len(changes) if isinstance(changes, list) else 0})
            for event in events if isinstance(events, list) else ():
                click.echo(f"{event['at']}  {event['text']}")
        return
    start = datetime.datetime.fromtimestamp(_since_s(since), datetime.UTC)
    histories = [one for one in history.since(start) if every or one.claimed_at is not None]
    if as_json:
        _print_json([one.document() for one in histories])
    else:
        now = _now()
        tables.show(history.COLUMNS, [one.row(now) for one in histories])


def _since_s(since: str | None) -> float:
    """The begin of --since, in seconds since 1970 and not before; now without it."""
    try:
        return max(0.0, _now().timestamp() - (parse_duration(since) if since is not None else 0.0))
    except ValueError as error:
        raise click.UsageError(f"--since {since}: expected {error}") from None


@nbagent.command("traces")
@click.option("--to", "url", required=True, metavar="URL",
              help="The traces endpoint of a collector, such as http://collector.example:4318/v1/traces.")
@click.option("--since", metavar="DURATION", help="Begin with the claims of this time, such as 1h, instead of now.")
@click.option("--once", is_flag=True, help="Send what the journal has, and exit.")
def traces_command(url: str, since: str | None, once: bool) -> None:
    """Send spans of claims to a collector, by OTLP/HTTP.

    They are those of claims with a traceparent header, and come from this machine's journal.
    """
    from nbagent.cli import traces

    if not re.fullmatch(r"https?://[^/\s]+/\S*", url):
        raise click.UsageError(f"--to {url}: expected a URL such as http://collector.example:4318/v1/traces")
    sent = traces.export(url, _since_s(since), once=once, complain=lambda text: click.echo(text, err=True))
    click.echo(f"{sent} spans sent to {url}")


@nbagent.command("top")
@click.option("--once", is_flag=True, help="Measure for the interval, print the result and exit.")
@click.option("--sort", "order", type=click.Choice(["cpu", "memory", "idle", "age"]), default="cpu", show_default=True,
              help="Slots with the largest value are first.")
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=2.0, show_default=True,
              help="Seconds between two updates.")
@_with_api
def top_command(remote: Remote, as_json: bool, once: bool, order: str, interval: float) -> None:
    """Show the slots that use most processor time or memory, live. It runs until interrupted."""
    from nbagent.cli import top

    source = top.Source(remote.call)
    if not once and not as_json and sys.stdout.isatty():
        top.show(source, order, interval)
        return
    sample, found = top.once(source, order, interval)
    if as_json:
        _print_json({"stats": sample.stats, "slots": found})
        return
    for line in top.head(sample.stats):
        click.echo(line)
    tables.show(top.COLUMNS, [top.row(slot, _now()) for slot in found])


@nbagent.command()
@_with_api
def stats(remote: Remote, as_json: bool) -> None:
    """Show the capacity and the counters of the host."""
    _print(remote.call("GET", "/stats"), as_json)


@nbagent.command()
@click.option("--off", is_flag=True, help="Accept claims again.")
@click.option("--wait", is_flag=False, flag_value=WITHOUT_END, metavar="[DURATION]",
              help="Return when the last claimed slot has ended, or after a time such as 30min with exit status 75.")
@_with_api
def drain(remote: Remote, as_json: bool, off: bool, wait: str | None) -> None:
    """Refuse new claims; claimed slots keep running."""
    if off and wait is not None:
        raise click.UsageError("--wait waits for a drain, and --off ends it; use only one of them")
    until_s = time.monotonic() + _wait_s(wait)
    state = remote.call("DELETE" if off else "POST", "/drain")
    while state["claimed"] and state["draining"] and time.monotonic() < until_s:
        if sys.stderr.isatty():
            click.echo(f"\r{state['claimed']} claimed slots left ", err=True, nl=False)
        # The API has no events to wait for. One request a second is cheap for a drain that takes hours.
        time.sleep(min(WAIT_INTERVAL_S, max(0.0, until_s - time.monotonic())))
        # A drain outlives the API, which may be restarting, or have no thread left.
        try:
            stats = remote.call("GET", "/stats")
        except NbagentError as error:
            if error.http_status < SERVER_ERRORS:
                raise
        else:
            state = {name: stats[name] for name in ("draining", "claimed", "warm")}
    _print(state, as_json)
    if wait is not None and state["claimed"]:
        reason = f"after {wait}" if state["draining"] else "because the drain was ended"
        _print_error(f"{state['claimed']} claimed slots are left {reason}")
        sys.exit(EX_TEMPFAIL)


def _wait_s(wait: str | None) -> float:
    """The seconds of --wait; 0 without it."""
    if wait is None:
        return 0.0
    try:
        return math.inf if wait == WITHOUT_END else parse_duration(wait)
    except ValueError as error:
        raise click.UsageError(f"--wait {wait}: expected {error}") from None


@nbagent.command()
@_with_api
def images(remote: Remote, as_json: bool) -> None:
    """Show the images that a claim may request."""
    found = remote.call("GET", "/images")
    if as_json:
        _print_json(found)
    else:
        tables.show(tables.IMAGE_COLUMNS, [tables.image_row(item) for item in found])


@image.command("check")
@click.argument("name")
@_with_api
def check_image(remote: Remote, as_json: bool, name: str) -> None:
    """Try the image NAME by one slot.

    Shows how it starts, its memory, a kernel, a terminal, files and its extensions. Needs the running agent, and root.
    The exit status is 1 if a check fails.
    """
    from nbagent.cli import image_check

    results = list(image_check.check(remote, name))
    if as_json:
        _print_json([dataclasses.asdict(result) for result in results])
    else:
        tables.show(image_check.COLUMNS, [(result.check, result.status, result.found) for result in results])
    if any(result.status == image_check.FAIL for result in results):
        sys.exit(1)


@nbagent.group("config")
def config_group() -> None:
    """Check the configuration."""


@config_group.command()
@click.argument("file", type=click.Path(readable=False, path_type=Path), default=host_config.DEFAULT_PATH)
@_JSON
def check(file: Path, as_json: bool) -> None:
    """Check FILE and the conf.d directory beside it. Shows which files were read."""
    if file != host_config.DEFAULT_PATH and not file.is_file():
        raise ConfigError(f"{file}: no such file", file=str(file))
    settings = host_config.load(file)
    # Absent where only the command line is installed, as in a build of configuration for other hosts.
    if Path(nginx_check.NGINX).exists() and paths.ROUTER_CONFIG.exists():
        error = nginx_check.check(nginx_settings.nginx(settings))
        if error is not None:
            raise ConfigError(f"the router's configuration: {error}", file=str(paths.ROUTER_FILES))
    files = [str(path) for path in host_config.settings_files(file)]
    if as_json:
        _print_json({"files": files, "config": effective(settings)})
        return
    click.echo(f"OK, read from {', '.join(files)}" if files else "OK, no file found: every setting has its default")


@nbagent.command()
@click.option("--config", "file", type=click.Path(readable=False, path_type=Path), default=host_config.DEFAULT_PATH,
              show_default=True, help="The configuration to check the host against.")
@click.option("--url", envvar="NBAGENT_URL", default=DEFAULT_URL, show_default=True, show_envvar=True,
              help="The control API.")
@_JSON
def doctor(file: Path, url: str, as_json: bool) -> None:
    """Check this host, and show how to fix what is missing or weak."""
    from nbagent import doctor as checks

    findings = checks.examine(file, url)
    if as_json:
        _print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        for finding in findings:
            status = click.style(f"{finding.status:4}", fg=colours[finding.status])
            click.echo(f"{status}  {finding.name}: {finding.found}")
            if finding.mend:
                click.echo(f"      {finding.mend}")
    if any(finding.status == "fail" for finding in findings):
        sys.exit(1)


def effective(settings: host_config.HostConfig) -> dict[str, object]:
    """All settings with their values as a JSON document, in which None is "auto"."""

    def plain(value: object) -> object:
        if isinstance(value, HttpProxy):
            return str(value)
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if value is None:
            return "auto"
        return value if isinstance(value, (str, int, float)) else str(value)

    document = plain(dataclasses.asdict(settings))
    assert isinstance(document, dict)
    return document


def _file(argument: str) -> tuple[str, dict[str, str]]:
    """The name and value of a member of a claim's `files`, for an argument FILE[=PATH]."""
    from base64 import b64encode

    # The last "=" separates the two, so a FILE with "=" in its name needs a PATH.
    source, _, path = argument.rpartition("=") if "=" in argument else (argument, "", Path(argument).name)
    return path, {"base64": b64encode(Path(source).read_bytes()).decode()}


def _slot_path(slot: str) -> str:
    from urllib.parse import quote

    return f"/slots/{quote(slot, safe='')}"


def _slot_rows(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    now = _now()
    return [tables.slot_row(slot, now) for slot in found]


def _print(document: dict[str, object], as_json: bool) -> None:
    if as_json:
        _print_json(document)
    else:
        tables.show_facts(document)


def _print_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2 if sys.stdout.isatty() else None))


def _print_error(error: Exception | str) -> None:
    # An argument that is not UTF-8 has surrogates.
    line = " ".join(str(error).split()).encode(errors="backslashreplace").decode()
    click.echo(f"nbagent: {line}", err=True)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
