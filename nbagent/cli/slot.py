# SPDX-License-Identifier: BSD-3-Clause
"""`nbagent slot`: the steps of a slot's start."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import click

from nbagent.config import host_config
from nbagent.core import paths

WIDTH = 100


@click.group()
def slot() -> None:
    """Show how slots are started."""


@slot.command()
@click.argument("image")
@click.option("--store", type=click.Path(readable=False, path_type=Path), default=paths.IMAGES, show_default=True,
              help="The image store.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(image: str, store: Path, as_json: bool) -> None:
    """Print every step of the start of a slot of IMAGE, with its reason.

    Nothing is started. If a start fails, its message names the step with these words, and the steps before it are
    undone. If slots of the image are forked, the steps of the zygote, which are done once for many slots, come first.
    """
    from nbagent.core.model import Slot, SlotState
    from nbagent.image.store import ImageStore
    from nbagent.network.addresses import FIRST, forwards_ipv6
    from nbagent.sandbox.plan import plan as sandbox_plan
    from nbagent.sandbox.plan import zygote_plan
    from nbagent.supervisor.network import INTERNET, numbered, uplink
    from nbagent.supervisor.sandbox_specs import default_limits, host_steps, sandbox_spec, zygote_spec
    from nbagent.supervisor.slots import UID_FIRST

    settings, found = host_config.load(), ImageStore(store).get(image)
    sample = Slot(
        id=f"{settings.label}-{'x' * 12}", image=found.name, digest=found.digest, id_base=found.id_base,
        uid=UID_FIRST, state=SlotState.STARTING, limits=default_limits(settings.slots), token="", created_s=0.0,
        addresses=numbered(settings.network, FIRST, forwards_ipv6()) if INTERNET in settings.network.allow else (),
    )
    uplinked = uplink(settings.network, sample)
    spec = sandbox_spec(sample, found, settings.slots.storage_bytes, settings.slots.start_timeout, uplinked)._replace(
        limit_files=str(paths.SLOTS / sample.id)
    )
    lines = []
    if found.launch == "fork":
        spec = spec._replace(forked=True)
        shared_steps = zygote_plan(zygote_spec(found, settings.slots.storage_bytes, sample.limits))
        lines = [line._replace(part="zygote") for line in shared_steps.lines()]
    lines += [*host_steps(sample, paths.SLOTS / sample.id, spec.forked), *sandbox_plan(spec).lines()]
    if as_json:
        click.echo(json.dumps([line._asdict() for line in lines], indent=2 if sys.stdout.isatty() else None))
        return
    for number, line in enumerate(lines, 1):
        click.echo(click.style(f"{number:2} {line.part:9} {line.step}", bold=True))
        for text in (line.reason, f"Undo: {line.undo}."):
            click.echo(textwrap.fill(text, WIDTH, initial_indent=" " * 12, subsequent_indent=" " * 12))
