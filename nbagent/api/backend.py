"""This host as the landing page's SlotBackend: what it asks of the supervisor."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from nbagent.api import responses
from nbagent.api.hostnames import host_of
from nbagent.config.host_config import HostConfig
from nbagent.landing.backend import public_figures, terms
from nbagent.wire.control import ControlClient
from nbagent.wire.operations import CLAIM, STATS, ClaimArguments, own_key

# Anybody may ask as often as they like; the supervisor is asked so often.
FIGURES_AGE_S = 1.0


class HostBackend:
    """Slots of this host. `client` waits for claims, `probe` has the patience of somebody who looks at a page."""

    def __init__(self, config: HostConfig, client: ControlClient, probe: ControlClient) -> None:
        self.config, self.client, self.probe = config, client, probe
        self._lock = threading.Lock()
        self._figures: dict[str, Any] = {}
        self._asked_s = -FIGURES_AGE_S

    def stats(self) -> dict[str, Any]:
        """The host's figures, at most a second old."""
        with self._lock:
            if time.monotonic() >= self._asked_s + FIGURES_AGE_S:
                self._figures = public_figures(self.probe.call(STATS)) | terms(self.config)
                self._asked_s = time.monotonic()
            return self._figures

    def claim(self, options: Mapping[str, Any], key: str | None, client: str) -> Mapping[str, Any]:
        """A claim. Its key is one of the landing page and of that address: nobody gets a slot by another's key.

        With the space in it, it is none that the control API lets through either.
        """
        kept = None if key is None else f"landing {client} {key}"
        return self.client.call(CLAIM, ClaimArguments(options, kept or own_key(), client))

    def origin(self, slot: str, host: str, scheme: str) -> str:
        """What the operator says, else where the caller came in."""
        router = self.config.router
        if router.public_url or router.domain or host_of(host) is None or scheme not in ("http", "https"):
            return responses.front(router, slot, host)
        return f"{scheme}://{host}"

    def has_origins(self) -> bool:
        """Whether url_mode is "subdomain"."""
        return self.config.router.domain is not None
