"""The commands: what each asks, and how it shows the answer.

Standard output is for the answer and nothing else, so that a command can be used in a script;
errors are one line on standard error, and the exit status is that of the error (nbagent.errors).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nbagent import __version__
from nbagent.cli import tables
from nbagent.cli.gateway import gateway
from nbagent.cli.images import image
from nbagent.cli.remote import DEFAULT_URL, TOKEN_PATH, Remote, read_token
from nbagent.cli.slot import slot as slot_group
from nbagent.config import host_config
from nbagent.config.host_config import NETWORK_MODES
from nbagent.core.errors import ConfigError, NbagentError
from nbagent.core.quantities import format_duration

WAIT_INTERVAL_S = 1.0
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def main(argv: list[str] | None = None) -> None:
    """The entry point. Ends the process with the status of what happened."""
    try:
        nbagent.main(argv, prog_name="nbagent", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except NbagentError as error:
        _complain(error)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        # Whoever read our output has enough; Python must not try to flush the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        _complain(error)
        sys.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nbagent", message="%(prog)s %(version)s")
def nbagent() -> None:
    """Notebook slots on this host: claim, watch and end them."""


nbagent.add_command(gateway)
nbagent.add_command(image)
nbagent.add_command(slot_group)


def _asks_api(function: Callable[..., None]) -> Callable[..., None]:
    """Gives a command `remote` and `as_json`, and the options that say where the API is."""

    @_JSON
    @click.option("--url", envvar="NBAGENT_URL", default=DEFAULT_URL, show_default=True, show_envvar=True,
                  help="The control API.")
    @click.option("--token-file", envvar="NBAGENT_TOKEN_FILE", type=click.Path(path_type=Path),
                  show_envvar=True, help=f"The file with its token.  [default: {TOKEN_PATH}, if readable]")
    @functools.wraps(function)
    def command(url: str, token_file: Path | None, **options: Any) -> None:
        function(Remote(url, read_token(token_file)), **options)

    return command


@nbagent.command()
@click.option("--image", help="The image to start.  [default: pool.image]")
@click.option("--memory", help="Memory such as 512M or 2G.  [default: slots.memory]")
@click.option("--cpu-weight", help="Share of the processors when they are short, 1 to 10000.")
@click.option("--cpu-quota", help="Most of the processors, such as 1/32 of the host or 50% of one.")
@click.option("--ttl", help="How long it lives, such as 2h.  [default: slots.ttl]")
@click.option("--path", help="Where the link leads, such as lab/tree/notebook.ipynb.")
@click.option("--file", "files", metavar="FILE[=PATH]", multiple=True,
              help="A file to be in the slot's home directory, there as PATH; may be repeated.")
@click.option("--archive", metavar="URL", help="A .tar, .tar.gz or .zip that the slot fetches and unpacks there.")
@click.option("--network", type=click.Choice(NETWORK_MODES), help="What it reaches.  [default: the image's]")
@click.option("--idempotency-key", help="The same key gives the same slot again.")
@_asks_api
def claim(
    remote: Remote, as_json: bool, idempotency_key: str | None, files: tuple[str, ...], **options: str | None
) -> None:
    """Take a slot and print its URL."""
    asked: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if files:
        asked["files"] = dict(_file(argument) for argument in files)
    claimed = remote.call("POST", "/claim", asked, idempotency_key)
    if as_json:
        _print_json(claimed)
        return
    click.echo(claimed["url"])
    if sys.stderr.isatty():
        left = format_duration(tables.seconds_until(claimed["expires_at"], _now()))
        click.echo(f"slot {claimed['slot']} lives {left}, until {claimed['expires_at']}", err=True)


@nbagent.command()
@click.argument("slots", metavar="ID...", nargs=-1, required=True)
@_asks_api
def release(remote: Remote, as_json: bool, slots: tuple[str, ...]) -> None:
    """End slots. Every one is tried; the status is that of the last that failed."""
    released, failure = [], None
    for slot in slots:
        try:
            released.append(remote.call("DELETE", _slot_path(slot)))
        except NbagentError as error:
            _complain(error)
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
@click.option("--watch", is_flag=True, help="Go on showing them until interrupted.")
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=2.0, show_default=True,
              help="Seconds between two looks with --watch.")
@_asks_api
def slots(remote: Remote, as_json: bool, slot: str | None, watch: bool, interval: float) -> None:
    """Show the slots of the host, or one slot in full."""
    look = functools.partial(remote.call, "GET", "/slots" if slot is None else _slot_path(slot))
    if watch and (as_json or not sys.stdout.isatty()):
        while True:
            _print_json(look())
            time.sleep(interval)
    elif watch:
        _watch(look, interval)
    elif as_json:
        _print_json(look())
    elif slot is not None:
        tables.show_facts(look())
    else:
        tables.show(tables.SLOT_COLUMNS, _slot_rows(look()))


def _watch(look: Callable[[], Any], interval_s: float) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    rows: list[tuple[str, ...]] = []
    with contextlib.suppress(KeyboardInterrupt), Live(screen=True, auto_refresh=False) as live:
        while True:
            caption = f"{_now():%H:%M:%S} UTC, every {interval_s:g} s, Ctrl-C ends"
            try:
                found = look()
                rows = _slot_rows(found if isinstance(found, list) else [found])
            except NbagentError as error:
                caption = str(error)  # the API restarts; what was seen last stays in sight
            shown = Group(tables.table(tables.SLOT_COLUMNS, rows), Text(caption, "dim"))
            live.update(shown, refresh=True)
            time.sleep(interval_s)


@nbagent.command()
@_asks_api
def stats(remote: Remote, as_json: bool) -> None:
    """Show how full the host is, and what it has done."""
    _print(remote.call("GET", "/stats"), as_json)


@nbagent.command()
@click.option("--off", is_flag=True, help="Hand out slots again.")
@click.option("--wait", is_flag=True, help="Return when the last claimed slot is gone.")
@_asks_api
def drain(remote: Remote, as_json: bool, off: bool, wait: bool) -> None:
    """Hand out no more slots; users stay."""
    if off and wait:
        raise click.UsageError("--wait waits for a drain, and --off ends it; give one of them")
    answer = remote.call("DELETE" if off else "POST", "/drain")
    while wait and answer["claimed"]:
        if sys.stderr.isatty():
            click.echo(f"\r{answer['claimed']} claimed slots left ", err=True, nl=False)
        # The API tells no events; a drain takes hours, so a look a second is cheap.
        time.sleep(WAIT_INTERVAL_S)
        now = remote.call("GET", "/stats")
        answer = {name: now[name] for name in ("draining", "claimed", "warm")}
    _print(answer, as_json)


@nbagent.command()
@_asks_api
def images(remote: Remote, as_json: bool) -> None:
    """Show the images that a claim can ask for."""
    found = remote.call("GET", "/images")
    if as_json:
        _print_json(found)
    else:
        tables.show(tables.IMAGE_COLUMNS, [tables.image_row(item) for item in found])


@nbagent.group("config")
def config_group() -> None:
    """Shows and checks the configuration."""


@config_group.command()
@click.argument("file", type=click.Path(path_type=Path), default=host_config.DEFAULT_PATH)
@_JSON
def check(file: Path, as_json: bool) -> None:
    """Say whether FILE and the conf.d beside it are right, and what was read."""
    if file != host_config.DEFAULT_PATH and not file.is_file():
        raise ConfigError(f"{file}: no such file", file=str(file))
    settings = host_config.load(file)
    files = [str(path) for path in host_config.settings_files(file)]
    if as_json:
        _print_json({"files": files, "config": effective(settings)})
        return
    click.echo(f"OK, read from {', '.join(files)}" if files else "OK, no file: every setting has its default")


@nbagent.command()
@click.option("--config", "file", type=click.Path(path_type=Path), default=host_config.DEFAULT_PATH,
              show_default=True, help="The configuration to judge the host by.")
@click.option("--url", envvar="NBAGENT_URL", default=DEFAULT_URL, show_default=True, show_envvar=True,
              help="The control API.")
@_JSON
def doctor(file: Path, url: str, as_json: bool) -> None:
    """Say what is missing or weak on this host, and how to mend it."""
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


def effective(settings: host_config.HostConfig) -> dict[str, Any]:
    """The whole configuration as it is in force, as JSON holds it; None is "auto"."""

    def plain(value: Any) -> Any:
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
    """A file's path in the slot and what is in it, as a claim has them."""
    from base64 import b64encode

    # A file whose own name has "=" in it is given with a PATH.
    source, _, path = argument.rpartition("=") if "=" in argument else (argument, "", Path(argument).name)
    return path, {"base64": b64encode(Path(source).read_bytes()).decode()}


def _slot_path(slot: str) -> str:
    from urllib.parse import quote

    return f"/slots/{quote(slot, safe='')}"


def _slot_rows(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    now = _now()
    return [tables.slot_row(slot, now) for slot in found]


def _print(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(document)
    else:
        tables.show_facts(document)


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2 if sys.stdout.isatty() else None))


def _complain(error: Exception) -> None:
    click.echo(f"nbagent: {' '.join(str(error).split())}", err=True)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
