# SPDX-License-Identifier: BSD-3-Clause
"""`nbagent image`: changes the image store of this host directly, as root.

After a change of the default store, the agent is reloaded if it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nbagent.cli import tables
from nbagent.config import host_config
from nbagent.core import paths, proxies
from nbagent.core.errors import FetchFailed

if TYPE_CHECKING:
    from nbagent.image.manifest import Manifest
    from nbagent.image.store import Image, ImageStore

_SHOWN_DIGITS = 12

_STORE = click.option(
    "--store", type=click.Path(readable=False, path_type=Path), default=paths.IMAGES, show_default=True,
    help="The image store.",
)
_NAME = click.option("--name", required=True, help="Name of the image in claims.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_MANIFEST = click.option("--manifest", type=_FILE, help="A manifest that replaces the one in the image.")


@click.group()
def image() -> None:
    """Add, import, build, list, switch and remove images of this host.

    If the agent runs, it is reloaded. It then replaces warm slots; claimed slots keep their image.
    """


@image.command()
@_NAME
@_MANIFEST
@click.argument("archive", type=_FILE)
@_STORE
@_JSON
def add(name: str, manifest: Path | None, archive: Path, store: Path, as_json: bool) -> None:
    """Unpack ARCHIVE into the store under a name."""
    images = _open(store)
    _added(images, images.add(archive, name, _parsed(manifest)), as_json)


@image.command("import")
@_NAME
@_MANIFEST
@click.option("--insecure", is_flag=True, help="Allow a registry without TLS or with an untrusted certificate.")
@click.option("--auth-file", type=_FILE, envvar="REGISTRY_AUTH_FILE", show_envvar=True,
              help=f"A file of `docker login` or `podman login`.  [default: {paths.REGISTRY_AUTH}, if it exists]")
@click.option("--user", metavar="NAME",
              help="The name of a login, whose password is read from the terminal or from standard input.")
@click.argument("source")
@_STORE
@_JSON
def import_image(
    name: str, manifest: Path | None, insecure: bool, auth_file: Path | None, user: str | None, source: str,
    store: Path, as_json: bool,
) -> None:
    """Import a container image into the store under a name.

    SOURCE is oci:DIR[:TAG], docker-archive:FILE or docker://NAME[:TAG]. This needs no Docker daemon. It needs skopeo,
    except for a local OCI layout (oci:). For a registry it uses the proxies of the environment (HTTPS_PROXY, NO_PROXY),
    or else network.proxy, and the mirrors in containers-registries.conf(5).
    """
    from nbagent.image import fetch, logins

    login, proxy = None, {}
    if user is not None:
        login = logins.of_password(source.removeprefix("docker://"), user, _password(user))
    elif source.startswith("docker:"):
        login = logins.found(auth_file)
    if source.startswith("docker:"):
        proxy = _proxy()
    images, found = _open(store), fetch.source(source, insecure=insecure, login=login, proxy=proxy)
    _added(images, images.import_oci(found, name, _parsed(manifest)), as_json)


@image.command()
@_NAME
@click.argument("recipe", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_STORE
@_JSON
def build(name: str, recipe: Path, store: Path, as_json: bool) -> None:
    """Build an image from the directory RECIPE and add it under a name."""
    images = _open(store)
    paths.BUILD_CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.BUILD_CACHE) as output:
        command = [str(paths.IMAGE_BUILDER), "--output", output, str(recipe)]
        environment = os.environ | {"NBAGENT_CACHE": str(paths.BUILD_CACHE)}
        if subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=False).returncode:
            raise FetchFailed(f"failed to build {recipe}; the output above has the reason")
        (archive,) = Path(output).iterdir()
        added = images.add(archive, name)
    _added(images, added, as_json)


@image.command()
@_MANIFEST
@click.option("--layer", type=_FILE, help="A tar archive whose files replace those of IMAGE or are added to them.")
@click.argument("name")
@click.argument("reference", metavar="IMAGE")
@_STORE
@_JSON
def use(
    name: str, reference: str, manifest: Path | None, layer: Path | None, store: Path, as_json: bool
) -> None:
    """Switch NAME to another IMAGE of the store.

    IMAGE is another name, or the first digits of a digest. With --manifest, NAME gets the files of IMAGE with another
    manifest, and with --layer, the files of IMAGE with some others, which takes seconds and no space for the files of
    IMAGE. The previous image is kept, so that you can switch back; "nbagent image list" shows it.
    """
    images = _open(store)
    found = images.use(name, reference, _parsed(manifest), layer)
    (_added if layer else _changed)(images, found, as_json)


@image.command("list")
@_STORE
@_JSON
def list_images(store: Path, as_json: bool) -> None:
    """List the images of the store, and the previous image of each name."""
    images = _open(store)
    found = images.list()
    if as_json:
        click.echo(json.dumps([_document(images, item) for item in found]))
    else:
        rows = [(i.name, _short(i.digest), _short(images.former(i.name)), str(i.root)) for i in found]
        tables.show(("NAME", "DIGEST", "BEFORE", "ROOT"), rows)


@image.group()
def assets() -> None:
    """Publish the web assets of images."""


@assets.command()
@click.option("--remove-unused", is_flag=True,
              help="Afterwards delete the images of TARGET that this host's store does not have.")
@click.argument("name", metavar="IMAGE")
@click.argument("target")
@_STORE
@_JSON
def publish(remove_unused: bool, name: str, target: str, store: Path, as_json: bool) -> None:
    """Upload the web assets of an IMAGE to TARGET.

    TARGET is a remote and path of rclone, such as "storage:bucket". Pages of slots load the files from there when
    router.assets_url is the public address of TARGET. A second run uploads what is missing or different only.
    """
    from nbagent.image import publishing

    images = _open(store)
    found = images.get(name)
    copied, files = publishing.publish(found.static, found.digest, target)
    removed = publishing.remove_unused(target, images.digests()) if remove_unused else []
    if as_json:
        click.echo(json.dumps({"digest": found.digest, "files": files, "uploaded": copied, "removed": removed}))
    else:
        click.echo(f"{name} {found.digest}: {copied} of {files} files uploaded to {target}, the others were there")
        for digest in removed:
            click.echo(f"{digest} removed from {target}")


@image.command()
@click.argument("name")
@_STORE
@_JSON
def remove(name: str, store: Path, as_json: bool) -> None:
    """Remove the name of an image; its running slots are not affected."""
    images = _open(store)
    images.remove(name)
    _reload_agent(images)
    click.echo(json.dumps({"removed": name}) if as_json else f"{name} removed")


def _proxy() -> dict[str, str]:
    """The environment variables of the host's HTTP proxy."""
    settings = host_config.load().network
    return proxies.variables(settings.proxy, map(str, settings.also)) if settings.proxy else {}


def _open(store: Path) -> ImageStore:
    from nbagent.image.store import ImageStore

    return ImageStore(store)


def _password(account: str) -> str:
    """A password from the terminal, or the first line of standard input if it is no terminal."""
    if sys.stdin.isatty():
        return str(click.prompt(f"Password of {account}", hide_input=True, err=True))
    return sys.stdin.readline().rstrip("\r\n")


def _parsed(manifest: Path | None) -> Manifest | None:
    from nbagent.image.manifest import parse

    return None if manifest is None else parse(manifest.read_bytes())


def _added(images: ImageStore, found: Image, as_json: bool) -> None:
    """As `_changed`, and prints on standard error what is different from a container of the image."""
    for note in found.notes:
        click.echo(f"{found.name}: {note}", err=True)
    _changed(images, found, as_json)


def _changed(images: ImageStore, found: Image, as_json: bool) -> None:
    """Reload the agent, and print the image that a name has now."""
    _reload_agent(images)
    click.echo(json.dumps(_document(images, found)) if as_json else f"{found.name} {found.digest}")


def _reload_agent(images: ImageStore) -> None:
    """Reload the agent if it runs, because it reads its store at a start and a reload."""
    if images.path == paths.IMAGES and Path("/run/systemd/system").is_dir():
        subprocess.run(["systemctl", "--quiet", "try-reload-or-restart", "nbagent.service"], check=False)


def _short(digest: str | None) -> str:
    return digest.removeprefix("sha256-")[:_SHOWN_DIGITS] if digest else "-"


def _document(images: ImageStore, found: Image) -> dict[str, str | int | list[str] | None]:
    """An image as a JSON document."""
    return {
        "name": found.name,
        "digest": found.digest,
        "former": images.former(found.name),
        "launch": found.launch,
        "share_memory": found.share_memory,
        "activate": found.activate,
        "root": str(found.root),
        "static": str(found.static),
        "id_base": found.id_base,
        "notes": list(found.notes),
    }
