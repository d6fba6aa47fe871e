"""`nbagent image`: the image store of this host, by root and without the agent's help.

A change of the host's own store is told to the agent, if it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nbagent.cli import tables
from nbagent.core.errors import FetchFailed

if TYPE_CHECKING:
    from nbagent.image.store import Image, ImageStore

STORE_PATH = Path("/var/lib/nbagent/images")
# Makes an archive of a recipe: images/build of the source, as the package has it.
BUILDER = Path("/usr/lib/nbagent/build-image")
BUILD_CACHE = Path("/var/cache/nbagent")
_SHOWN_DIGITS = 12

_STORE = click.option(
    "--store", type=click.Path(path_type=Path), default=STORE_PATH, show_default=True, help="The image store."
)
_NAME = click.option("--name", required=True, help="What claims call the image.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def image() -> None:
    """Add, import, build, list, exchange and remove the images of this host.

    The agent, if it runs, is told: it replaces warm slots, and claimed ones finish on the image they have.
    """


@image.command()
@_NAME
@click.argument("archive", type=_FILE)
@_STORE
@_JSON
def add(name: str, archive: Path, store: Path, as_json: bool) -> None:
    """Unpack ARCHIVE into the store under a name."""
    images = _open(store)
    _changed(images, images.add(archive, name), as_json)


@image.command("import")
@_NAME
@click.option("--manifest", type=_FILE, help="What the image says about itself, in place of what is in it.")
@click.option("--insecure", is_flag=True, help="A registry without TLS, or whose certificate nobody vouches for.")
@click.argument("source")
@_STORE
@_JSON
def import_image(
    name: str, manifest: Path | None, insecure: bool, source: str, store: Path, as_json: bool
) -> None:
    """Bring a container image into the store under a name.

    SOURCE is oci:DIR[:TAG], docker-archive:FILE or docker://NAME[:TAG]. No Docker daemon is needed; skopeo is,
    except for a layout that is here (oci:).
    """
    from nbagent.image import fetch
    from nbagent.image.manifest import parse

    images, found = _open(store), fetch.source(source, insecure=insecure)
    given = None if manifest is None else parse(manifest.read_bytes())
    _changed(images, images.import_oci(found, name, given), as_json)


@image.command()
@_NAME
@click.argument("recipe", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_STORE
@_JSON
def build(name: str, recipe: Path, store: Path, as_json: bool) -> None:
    """Build the RECIPE directory and put the image into the store under a name."""
    images = _open(store)
    BUILD_CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD_CACHE) as output:
        command = [str(BUILDER), "--output", output, str(recipe)]
        environment = os.environ | {"NBAGENT_CACHE": str(BUILD_CACHE)}
        if subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=False).returncode:
            raise FetchFailed(f"{recipe} was not built; what went wrong is said above")
        (archive,) = Path(output).iterdir()
        added = images.add(archive, name)
    _changed(images, added, as_json)


@image.command()
@click.argument("name")
@click.argument("reference", metavar="IMAGE")
@_STORE
@_JSON
def use(name: str, reference: str, store: Path, as_json: bool) -> None:
    """Let NAME mean another IMAGE of the store: another's name, or the first digits of a digest.

    What NAME meant before is kept, so that is the way back, too: image list shows it.
    """
    images = _open(store)
    _changed(images, images.use(name, reference), as_json)


@image.command("list")
@_STORE
@_JSON
def list_images(store: Path, as_json: bool) -> None:
    """List the images of the store, and what each name meant before."""
    images = _open(store)
    documents = [_document(images, found) for found in images.list()]
    if as_json:
        click.echo(json.dumps(documents))
    else:
        rows = [(i["name"], _short(i["digest"]), _short(i["former"]), i["root"]) for i in documents]
        tables.show(("NAME", "DIGEST", "BEFORE", "ROOT"), rows)


@image.command()
@click.argument("name")
@_STORE
@_JSON
def remove(name: str, store: Path, as_json: bool) -> None:
    """Take the name off an image; slots that run from it go on."""
    images = _open(store)
    images.remove(name)
    _tell_agent(images)
    click.echo(json.dumps({"removed": name}) if as_json else f"{name} removed")


def _open(store: Path) -> ImageStore:
    from nbagent.image.store import ImageStore

    return ImageStore(store)


def _changed(images: ImageStore, found: Image, as_json: bool) -> None:
    """Tells the agent and the operator what a name means now."""
    _tell_agent(images)
    click.echo(json.dumps(_document(images, found)) if as_json else f"{found.name} {found.digest}")


def _tell_agent(images: ImageStore) -> None:
    """The agent looks at its store when it is reloaded. One that does not run looks when it starts."""
    if images.path == STORE_PATH and Path("/run/systemd/system").is_dir():
        subprocess.run(["systemctl", "--quiet", "try-reload-or-restart", "nbagent.service"], check=False)


def _short(digest: str | None) -> str:
    return digest.removeprefix("sha256-")[:_SHOWN_DIGITS] if digest else "-"


def _document(images: ImageStore, found: Image) -> dict[str, Any]:
    """What of an Image is of use outside the host's own processes."""
    return {
        "name": found.name,
        "digest": found.digest,
        "former": images.former(found.name),
        "launch": found.launch,
        "share_memory": found.share_memory,
        "root": str(found.root),
        "static": str(found.static),
        "id_base": found.id_base,
    }
