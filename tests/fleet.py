# SPDX-License-Identifier: BSD-3-Clause
"""A fleet on test hosts: compute servers and gateways in a network of their own, installed by the packages.

Shared by `make up-fleet`, the integration tests and the benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import product
from testhost_driver import Host
from testhost_driver.lan import Lan

HTTP_PORT = 80
# Gateways have .1 and up, hosts .11 and up.
NETWORK = "10.77.0"


def gateway_address(number: int) -> str:
    return f"{NETWORK}.{number + 1}"


def host_address(number: int) -> str:
    return f"{NETWORK}.{number + 11}"


class Fleet:
    """Hosts labelled a, b, c, …, and gateways in front of them, with names NAME-…"""

    def __init__(self, name: str, labels: Sequence[str], gateways: int = 1) -> None:
        self.name, self.labels = name, tuple(labels)
        self.lan = Lan(name)
        self.hosts: dict[str, Host] = {}
        self.gateways: list[Host] = []
        self._gateway_count = gateways

    def up(self, say: Callable[[str], None], settings: str | dict[str, str] = "", gateway_settings: str = "") -> None:
        """Boots and installs the missing hosts; `settings` are for all hosts, or for each by its label."""
        packages = product.build(say, tuple(dict.fromkeys((*product.HOST, *product.GATEWAY))))
        by_name = {package.name.split("_")[0]: package for package in packages}
        # One after the other, because the build of a root filesystem is locked.
        for number in range(self._gateway_count):
            self.gateways.append(self._boot(f"{self.name}-gw{number}", gateway_address(number)))
        for number, label in enumerate(self.labels):
            self.hosts[label] = self._boot(f"{self.name}-{label}", host_address(number))
        with ThreadPoolExecutor(2) as threads:
            made = [
                threads.submit(
                    self._install_host, label, by_name, settings if isinstance(settings, str) else settings[label]
                )
                for label in self.labels
            ]
            made += [threads.submit(self._install_gateway, host, by_name, gateway_settings) for host in self.gateways]
            for one in made:
                one.result()

    def _boot(self, name: str, address: str) -> Host:
        host = Host.up(name=name)
        self.lan.plug(host, address)
        return host

    def _install_host(self, label: str, packages: dict[str, Path], settings: str) -> None:
        proxies = ", ".join(f'"{gateway_address(number)}/32"' for number in range(self._gateway_count))
        fleet = f'[host]\nlabel = "{label}"\n[router]\ntrusted_proxies = [{proxies}]\n'
        host = self.hosts[label]
        host.run(["mkdir", "-p", "/etc/nbagent/conf.d"])
        host.run(["tee", "/etc/nbagent/conf.d/40-fleet.toml"], input=fleet)
        _install(host, [packages[name] for name in product.HOST], settings)
        product.wait_warm(host)

    def _install_gateway(self, host: Host, packages: dict[str, Path], settings: str) -> None:
        listed = "".join(
            f'[hosts.{label}]\naddress = "{host_address(number)}"\n' for number, label in enumerate(self.labels)
        )
        host.run(["mkdir", "-p", "/etc/nbagent/gateway.d"])
        host.run(["tee", "/etc/nbagent/gateway.d/50-fleet.toml"], input=settings + listed)
        _install(host, [packages[name] for name in product.GATEWAY], "")

    def keep(self) -> None:
        """Lets hosts and network outlive this process."""
        for host in (*self.gateways, *self.hosts.values()):
            host.keep()
        self.lan.keep()

    def down(self) -> None:
        """Removes all hosts and the network."""
        for host in (*self.gateways, *self.hosts.values()):
            host.down(now=True)
        self.lan.remove()


def _install(host: Host, packages: list[Path], settings: str) -> None:
    if settings:
        host.run(["tee", "/etc/nbagent/conf.d/50-test.toml"], input=settings)
    product.add_changed(host, packages, lambda line: product.say(f"{host.name}: {line}"))
