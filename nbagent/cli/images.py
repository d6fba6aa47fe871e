"""`nbagent image`: the image store of this host, by root and without the agent's help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nbagent.cli import tables

if TYPE_CHECKING:
    from nbagent.image.store import Image

STORE_PATH = Path("/var/lib/nbagent/images")

_STORE = click.option(
    "--store", type=click.Path(path_type=Path), default=STORE_PATH, show_default=True, help="The image store."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def image() -> None:
    """Add, list and remove the images of this host.

    The agent finds a change when it is reloaded: systemctl reload nbagent.
    """


@image.command()
@click.option("--name", required=True, help="What claims call the image.")
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_STORE
@_JSON
def add(name: str, archive: Path, store: Path, as_json: bool) -> None:
    """Unpack ARCHIVE into the store under a name."""
    from nbagent.image.store import ImageStore

    added = _document(ImageStore(store).add(archive, name))
    click.echo(json.dumps(added) if as_json else f"{added['name']} {added['digest']}")


@image.command("list")
@_STORE
@_JSON
def list_images(store: Path, as_json: bool) -> None:
    """List the images of the store."""
    from nbagent.image.store import ImageStore

    images = [_document(found) for found in ImageStore(store).list()]
    if as_json:
        click.echo(json.dumps(images))
    else:
        tables.show(("NAME", "LAUNCH", "ROOT"), [(i["name"], i["launch"], i["root"]) for i in images])


@image.command()
@click.argument("name")
@_STORE
@_JSON
def remove(name: str, store: Path, as_json: bool) -> None:
    """Take the name off an image; slots that run from it go on."""
    from nbagent.image.store import ImageStore

    ImageStore(store).remove(name)
    click.echo(json.dumps({"removed": name}) if as_json else f"{name} removed")


def _document(found: Image) -> dict[str, Any]:
    """What of an Image is of use outside the host's own processes."""
    return {
        "name": found.name,
        "digest": found.digest,
        "launch": found.launch,
        "root": str(found.root),
        "static": str(found.static),
        "id_base": found.id_base,
    }
