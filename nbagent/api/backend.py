# SPDX-License-Identifier: BSD-3-Clause
"""This host as the SlotBackend of its landing page, by calls of the supervisor."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping

from nbagent.api.hostnames import assets_address, host_of, slot_origin
from nbagent.config.host_config import HostConfig
from nbagent.core.documents import Claim, HostFigures
from nbagent.core.errors import Full, NbagentError, SupervisorUnavailable, from_wire
from nbagent.landing.backend import public_figures, slot_defaults
from nbagent.wire.control import ControlClient
from nbagent.wire.operations import (
    CLAIM,
    GIVE_BACK,
    KEEP,
    LANDING_KEY_PREFIX,
    LEND,
    STATS,
    ClaimArguments,
    LentArguments,
    own_key,
)

# The figures need no permission, so their rate of calls to the supervisor has to be limited.
FIGURES_AGE_S = 1.0


class HostBackend:
    """Slots of this host. `client` waits as long as a claim may take, `probe` as long as a page may."""

    def __init__(self, config: HostConfig, client: ControlClient, probe: ControlClient) -> None:
        self.config, self.client, self.probe = config, client, probe
        self._lock = threading.Lock()
        # The figures, or the error that followed the last request for them.
        self._figures: HostFigures | NbagentError = SupervisorUnavailable("the figures were not fetched yet")
        self._fetched_s = -math.inf

    def stats(self) -> HostFigures:
        """The figures of the host, at most FIGURES_AGE_S old. Raises NbagentError.

        An error is kept as long, since the pages that wait for the figures would each wait for a timeout, one after the
        other.
        """
        with self._lock:
            if time.monotonic() >= self._fetched_s + FIGURES_AGE_S:
                self._figures = self._fetch()
                self._fetched_s = time.monotonic()
            if isinstance(self._figures, NbagentError):
                raise from_wire(self._figures.to_wire())
            return self._figures

    def _fetch(self) -> HostFigures | NbagentError:
        try:
            figures = public_figures(self.probe.call(STATS))
        except NbagentError as error:
            return error
        figures["assets"] = assets_address(self.config.router, figures["assets"])
        return {**figures, **slot_defaults(self.config)}

    def claim(self, options: Mapping[str, object], key: str | None, client: str, trace: str) -> Claim:
        """Claims a slot. The key is valid for the landing page and the address `client` only.

        Otherwise a visitor could get the slot of another one by guessing a key. The spaces keep the key apart
        from keys of the control API, which contain none.
        """
        landing_key = None if key is None else f"{LANDING_KEY_PREFIX}{client} {key}"
        return self.client.call(CLAIM, ClaimArguments(options, landing_key or own_key(), client, trace))

    def lend(self, options: Mapping[str, object], client: str) -> Claim | None:
        """Lends a slot of this host; None if it lends none now."""
        try:
            return self.probe.call(LEND, ClaimArguments(options, own_key(), client))
        except (Full, SupervisorUnavailable):
            return None

    def keep(self, slot: str, token: str, client: str) -> None:
        """Makes a lent slot a claimed one. Raises SlotNotFound."""
        self.client.call(KEEP, LentArguments(slot, token, client))

    def give_back(self, slot: str, token: str, client: str) -> None:
        """Ends a slot that is still lent. Raises SlotNotFound."""
        self.probe.call(GIVE_BACK, LentArguments(slot, token, client))

    def origin(self, slot: str, host: str, scheme: str) -> str:
        """The origin of a slot by [router] of the settings, else the one that the visitor's request was sent to."""
        router = self.config.router
        if router.public_url or router.domain or host_of(host) is None or scheme not in ("http", "https"):
            return slot_origin(router, slot, host)
        return f"{scheme}://{host}"

    def has_origins(self) -> bool:
        """Whether url_mode is "subdomain"."""
        return self.config.router.domain is not None

    def can_prerender(self, host: str, scheme: str) -> bool:
        """Whether the page has the origin of slots, or their parent domain by the same scheme.

        A browser prerenders a page of another origin only within one site, which is a scheme and a registrable domain;
        which suffix of a host name is registrable is not known here, but two subdomains of one parent share it.
        """
        domain = self.config.router.domain
        return domain is None or (host_of(host) == domain and self.origin("x", host, scheme).startswith(f"{scheme}://"))
