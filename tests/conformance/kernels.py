# SPDX-License-Identifier: BSD-3-Clause
"""ipykernel's own tests, with kernels of slots and of a plain `jupyter lab` of the same image.

They come from the source archive of the image's version of ipykernel; of them those that talk to a kernel by its
sockets. jupyter_client's tests are not among them, because they are about managers in their own process, and its tests
of clients require a kernel `echo`. pytest runs in the file system and in the network of the kernels.
"""

from __future__ import annotations

import json
import shlex
import urllib.parse
from collections.abc import Mapping

import suite
from suite import HERE, HOME, PLACE, Server

# ipykernel's conftest.py imports it.
MORE = ("pytest-asyncio==1.2.0",)
FILES = ("test_message_spec.py", "test_kernel.py", "test_async.py", "test_debugger.py", "test_subshells.py")
RELAY_UNIT = "conformance-relay"
# Tests that pass with the plain server and not in a slot, each with the reason.
DIFFERENCES: dict[str, str] = {}
TIMEOUT_S = 1800


def run(server: Server, files: tuple[str, ...] = FILES, select: str = "test") -> dict[str, list[str]]:
    """Runs the tests; returns {test: [outcome, text]}."""
    host, enter = server.host, list(server.enter)
    server.unpack(suite.material("ipykernel", MORE))
    for name in ("external_kernels.py", "relay.py"):
        server.inside("sh", "-c", f"cat > {PLACE}/{name}", input=(HERE / name).read_text())
    address, socket = urllib.parse.urlsplit(server.url), f"{PLACE}/server"
    relay = ["python3", f"{PLACE}/relay.py", socket, str(address.port)]
    host.run(["systemd-run", "-q", "--collect", f"--unit={RELAY_UNIT}", *enter, *relay])
    try:
        server.inside("sh", "-c", f"for n in $(seq 100); do [ -S {socket} ] && exit; sleep .1; done; exit 1")
        variables = {
            "CONFORMANCE_SOCKET": socket, "CONFORMANCE_PATH": address.path, "CONFORMANCE_TOKEN": server.token,
            "CONFORMANCE_RESULTS": f"{PLACE}/results", "PYTHONPATH": f"{PLACE}:{PLACE}/packages", "HOME": HOME,
            "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1",
            **server.variables,
        }
        argv = ["env", "-i", f"--chdir={PLACE}", *(f"{name}={value}" for name, value in variables.items()),
                "python3", "-m", "pytest", "-q", "-p", "external_kernels", "-p", "no:cacheprovider", "--timeout=120",
                "-k", select, *(f"tests/{file}" for file in files)]
        command = [*enter, *argv]
        if enter[0] == "nsenter":
            command.insert(1, "-n")
        done = host.run(command, check=False, timeout=TIMEOUT_S)
        assert done.returncode in (0, 1), f"{shlex.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        found: dict[str, list[str]] = json.loads(server.inside("cat", f"{PLACE}/results"))
    finally:
        host.run(["systemctl", "stop", RELAY_UNIT], check=False)
        server.inside("rm", "-rf", PLACE)
    return found


def table(results: Mapping[str, Mapping[str, list[str]]]) -> str:
    """The passed tests by file and server, as text."""
    return suite.columns("ipykernel " + suite.version("ipykernel"), results, FILES, DIFFERENCES)
