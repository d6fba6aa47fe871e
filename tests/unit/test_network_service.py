# SPDX-License-Identifier: BSD-3-Clause
"""The network service: requests with typed arguments, and those that it refuses."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading

import pytest
from malformed_messages import MALFORMED, open_fds, settles_at

from nbagent.config import host_config
from nbagent.config.host_config import CurrentConfig
from nbagent.core.errors import StartFailed
from nbagent.network import requests
from nbagent.supervisor import network as supervisor_network
from nbagent.wire.channel import Channel
from nbagent.wire.failure import StepFailed


class FakeKernel:
    """Records the calls of the network service; the first fails with `error`, if there is one."""

    def __init__(self):
        self.calls = []
        self.error = None

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            if error := self.error:
                self.error = None
                raise error

        return call


@pytest.fixture
def network(tmp_path, monkeypatch):
    """The supervisor's Network, whose service is `_serve` with a FakeKernel."""
    kernel, path = FakeKernel(), tmp_path / "network.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    monkeypatch.setattr(supervisor_network.paths, "NETWORK_SOCKET", path)

    def serve():
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            requests.serve(kernel, connection, kernel)

    thread = threading.Thread(target=serve)
    thread.start()
    yield supervisor_network.Network._call, kernel, path
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    listener.close()


NAME = "nb-0123456789ab"


@pytest.mark.skipif(os.getuid() != 0, reason="the network service serves root only")
def test_the_network_service_gets_typed_arguments_and_the_namespace(network, file):
    call, kernel, _ = network
    before = open_fds()
    asyncio.run(call(None, "attach", {"netns": file}, name=NAME, inner="net0", addresses=["10.0.0.2"], rate=5))
    (op, name, inner, netns, addresses, rate), = kernel.calls
    assert (op, name, inner, addresses, rate) == ("attach", NAME, "net0", ["10.0.0.2"], 5) and netns > 2
    assert settles_at(len(before))


@pytest.mark.skipif(os.getuid() != 0, reason="the network service serves root only")
def test_rules_that_cannot_be_written_are_a_fault_of_the_network(monkeypatch, tmp_path):
    """As while /run is full; callers expect no other error, and try again."""
    monkeypatch.setattr(supervisor_network, "RULES_PATH", tmp_path / "full" / "network.json")
    config = CurrentConfig(host_config.parse({"network": {"allow": ["none", "internet"]}}))
    with pytest.raises(StartFailed, match=r"network\.json was not written: No such file") as failed:
        asyncio.run(supervisor_network.Network(config, None).set_up())
    assert failed.value.details == {"step": "network", "errno": errno.ENOENT}


def test_a_request_of_the_network_is_repeated_after_a_repair(network):
    """Another program deletes the nftables table, and the slot's addresses are added before the service knows."""
    call, kernel, _ = network
    kernel.error = OSError("nft: No such file or directory")
    asyncio.run(call(None, "open", name=NAME))
    assert kernel.calls == [("open", NAME), ("check",), ("open", NAME)]


@pytest.mark.skipif(os.getuid() != 0, reason="the network service serves root only")
@pytest.mark.parametrize("arguments", [
    {"name": "eth0"}, {"name": 7}, {}, {"name": NAME + "\n"},
])
def test_the_network_service_refuses_other_interfaces(network, arguments):
    call, kernel, _ = network
    with pytest.raises(StartFailed, match="nbagent-network: open: ") as failed:
        asyncio.run(call(None, "open", **arguments))
    assert failed.value.details["step"] == "network" and kernel.calls == []


@pytest.mark.parametrize(
    "payload", [*MALFORMED, b"{}", b'{"op": "none"}', b'{"op": "attach", "inner": "x", "rate": 1e999}']
)
def test_the_network_service_responds_to_a_malformed_request_with_a_failure(network, file, payload):
    _, kernel, path = network
    before = open_fds()
    with Channel.unconnected() as channel:
        channel.socket.connect(str(path))
        socket.send_fds(channel.socket, [payload], [file])
        with channel.receive() as response, pytest.raises(StepFailed):
            response.raise_failure()
    assert kernel.calls == [] and settles_at(len(before))
