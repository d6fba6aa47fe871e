# SPDX-License-Identifier: BSD-3-Clause
"""The addresses of JupyterLab's files in a slot's page: those of the image, which all slots share.

The router serves an image's unchanging files at /assets/DIGEST/, so that a browser has them once and not once for each
slot. The slot's page refers to them there, except to files that have changed in this slot: after `jupyter lab build`
the program is requested from the slot, and after the installation of an extension all extensions are. Themes, kernels'
logos and the server's icons are requested from the slot too, because JupyterLab makes their addresses from the slot's.

Runs under the image's own Python, 3.9 and up.
"""

from __future__ import annotations

import os
import re
from typing import Any, Dict, FrozenSet, Iterable, Mapping, Optional, Tuple

from nbagent.wire.assets import EXTENSIONS, PROGRAM, ROUTER_PATH, VARIABLE

# By part: the name in JupyterLab's page configuration, and the path below the slot that it has otherwise.
NAMES = {
    PROGRAM: ("fullStaticUrl", "static/lab"),
    EXTENSIONS: ("fullLabextensionsUrl", "lab/extensions"),
}

# The key of a page's configuration with the entries for the router, when the others are those of a CDN.
FALLBACK = "nbagentFallback"

Extensions = FrozenSet[Tuple[str, str]]


class Assets:
    """The files as they were when the server was initialised: `program` is JupyterLab's directory of its program."""

    def __init__(self, program: str, extensions: Extensions) -> None:
        self._index, self._extensions = os.path.join(program, "index.html"), extensions
        self._index_state = _state(self._index)

    def addresses(self, config: Mapping[str, Any], base_url: str, origin: str, variable: str) -> Dict[str, Any]:
        """The entries of the page configuration to replace. One that the image or the user has set is left as it is."""
        url, *parts = variable.split() or [""]
        usable = set(parts)
        if _state(self._index) != self._index_state:
            usable.discard(PROGRAM)
        if not _listed(config) <= self._extensions:
            usable.discard(EXTENSIONS)
        replaced = {
            name: part for part, (name, path) in NAMES.items()
            if part in usable and str(config.get(name, "")).rstrip("/") == base_url + path
        }
        found: Dict[str, Any] = {
            name: f"{origin if url.startswith('/') else ''}{url}/{part}" for name, part in replaced.items()
        }
        if found and not url.startswith("/"):
            digest = url.rpartition("/")[2]
            found[FALLBACK] = {name: f"{origin}{ROUTER_PATH}{digest}/{part}" for name, part in replaced.items()}
        return found


def install(server: Any, program: str) -> None:
    """Lets the pages of `server` use the image's addresses; `program` is the directory of JupyterLab's program."""
    from jupyterlab_server.config import get_federated_extensions

    # Those of the image alone; the user's own directory may have others, which the router does not have.
    directory = os.path.normpath(os.path.join(program, "../../labextensions"))
    assets = Assets(program, with_entries(get_federated_extensions([directory]).values()))
    settings = server.web_app.settings
    hook = settings.get("page_config_hook")

    def with_addresses(handler: Any, config: Dict[str, Any]) -> Dict[str, Any]:
        if hook is not None:
            config = hook(handler, config)
        origin = shared_origin(handler.request.protocol, handler.request.host, handler.base_url)
        # A copy, because the server keeps `config` for its next page, which may have another origin.
        return {**config, **assets.addresses(config, handler.base_url, origin, os.environ.get(VARIABLE, ""))}

    settings["page_config_hook"] = with_addresses


def shared_origin(protocol: str, host: str, base_url: str) -> str:
    """The origin of the assets: "" for the page's own, which all slots share, else the name `assets` beside the slot's.

    The DNS name and certificate *.nb.example.org are for assets.nb.example.org too, and no slot has this name.
    """
    slot = base_url.strip("/").rpartition("/")[2]
    domain = host[len(slot) + 1:]
    if not host.startswith(slot + ".") or not re.fullmatch(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?", domain):
        return ""
    return f"{protocol}://assets.{domain}"


def _state(path: str) -> Optional[Tuple[int, int]]:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def with_entries(packages: Iterable[Mapping[str, Any]]) -> Extensions:
    """Name and entry of each extension; the entry's name has a hash of the extension's content."""
    return frozenset(
        (str(package["name"]), str(package["jupyterlab"]["_build"]["load"]))
        for package in packages if "_build" in package.get("jupyterlab", {})
    )


def _listed(config: Mapping[str, Any]) -> Extensions:
    return frozenset((str(entry["name"]), str(entry["load"])) for entry in config.get("federated_extensions", ()))
