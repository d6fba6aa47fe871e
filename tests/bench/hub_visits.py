# SPDX-License-Identifier: BSD-3-Clause
"""Visits of a browser to JupyterHub with SystemdSpawner: the press of a link starts a server and opens its notebook.

The person has logged in and reads the hub's page before the times begin; nbagent and a bare server need neither. The
server of the visit before has ended, and its home, kernels and workspace are removed, as those of the other sides are.
The name of the person stays the same, so that a later visit finds the files of JupyterLab in the browser's cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from urllib.parse import urlencode

from client import Client
from sides import Hub

import browser
from testhost_driver import Host

PERSON = "u0"
LOGIN = "/hub/login"
# The spawner's directory for a dynamic user, which systemd gives to the user when the server starts. The link in /run
# would stay, and the next start would fail on it.
NEW_HOME = """
set -e
rm -rf /var/lib/private/"$1" /var/lib/"$1" /run/jupyter-"$1"-singleuser
mkdir -p -m 700 /var/lib/private && mkdir /var/lib/private/"$1"
cp "$2" /var/lib/private/"$1"
"""


class HubVisits:
    """A hub with one person; `notebook` is the file in each new home, below the host's root."""

    def __init__(self, host: Host, client: Client, notebook: str) -> None:
        self.host, self.client, self.notebook = host, client, notebook
        self.hub = Hub(host, client, "systemd")
        self.hub.open(1)

    @contextlib.contextmanager
    def visit(self, page: browser.Page, path: str) -> Iterator[Callable[[], None]]:
        """The press of the link on the hub's page, which leads to `path` of the server."""
        self.host.run(["sh", "-c", NEW_HOME, "home", PERSON, self.notebook])
        page.open(f"{self.hub.url}/hub/home")
        link = page.see("#start, #username_input")[0]
        if LOGIN in page.driver.current_url:
            link.send_keys(PERSON)
            page.see("#login_submit")[0].click()
            link = page.see("#start")[0]
        query = urlencode({"next": f"/user/{PERSON}/{path}"})
        page.driver.execute_script("arguments[0].href = arguments[1]", link, f"/hub/spawn/{PERSON}?{query}")
        yield link.click
        self.client.run(self.hub.stop([PERSON]))

    def close(self) -> None:
        self.hub.close()
