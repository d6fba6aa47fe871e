# SPDX-License-Identifier: BSD-3-Clause
"""Logins for registries, as a document that skopeo reads (containers-auth.json(5)).

A login comes from, in this order: a name and a password; a file, which `docker login` or `podman login` wrote; the
systemd credential `registry-auth` of the service that runs the command; /etc/nbagent/registry-auth.json. Without one,
the import is anonymous. Programs that a file names as credential helpers are not run.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path

from nbagent.core import paths
from nbagent.core.errors import ConfigError

CREDENTIAL = "registry-auth"
_MAX_BYTES = 1 << 20
_DOCKER_HUB = "docker.io"


def of_password(reference: str, user: str, password: str) -> str:
    """The document for a name and a password in the registry of the image `reference`."""
    first, separator, _ = reference.partition("/")
    # Docker's rule: without a dot or port the first component is not a host name.
    is_host = separator and ("." in first or ":" in first or first == "localhost")
    return json.dumps({"auths": {first if is_host else _DOCKER_HUB: {"auth": _encoded(user, password)}}})


def found(given: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The document of the first file that exists; None for an anonymous import. Raises ConfigError."""
    if given is not None:
        return _read(given)
    candidates = [paths.REGISTRY_AUTH]
    if directory := environment.get("CREDENTIALS_DIRECTORY"):
        candidates.insert(0, Path(directory) / CREDENTIAL)
    for path in candidates:
        if path.exists():
            return _read(path)
    return None


def _encoded(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(_MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", file=str(path)) from None
    except (ValueError, RecursionError):
        document = None
    auths = document.get("auths") if isinstance(document, dict) else None
    logins = {}
    for registry, login in (auths.items() if isinstance(auths, dict) else ()):
        if not isinstance(login, dict):
            continue
        user, password = login.get("username"), login.get("password")
        if any(login.get(key) for key in ("auth", "identitytoken")):
            logins[registry] = login
        elif user and isinstance(user, str) and isinstance(password, str):
            # As in secrets of Kubernetes, which skopeo does not read.
            logins[registry] = {"auth": _encoded(user, password)}
    if not logins:
        raise ConfigError(
            f"{path}: has no login; expected the file that `docker login` or `podman login --authfile` writes, without"
            " a credential helper", file=str(path),
        )
    return json.dumps({"auths": logins})
