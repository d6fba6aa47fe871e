# SPDX-License-Identifier: BSD-3-Clause
"""`python3 -m nbagent.termination PROVIDER`: nbagent-termination@PROVIDER.service, which drains before a machine ends.

It polls the metadata service of the cloud until that announces the end of this machine, and then has the agent drain by
its control API, so that no new user gets a notebook here. It ends no slot: users have the rest of the provider's time.
A notice is not repeated, and the drain outlives restarts of the agent.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Callable, Mapping

from nbagent.core.events import Event, emit

METADATA = "169.254.169.254"
API = ("127.0.0.1", 9000)
POLL_S = 2.0
_TIMEOUT_S = 5.0
_RESPONSE_MAX_BYTES = 1 << 16
_AZURE_ENDS = {"Preempt", "Terminate", "Reboot", "Redeploy"}

# The status and body of a request: method, path and headers.
Request = Callable[[str, str, Mapping[str, str]], tuple[int, bytes]]


def aws(request: Request) -> str | None:
    """A spot interruption, or the end that an Auto Scaling group has decided; 404 means that there is none."""
    status, token = request("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    headers = {"X-aws-ec2-metadata-token": token.decode()} if status == 200 else {}
    status, body = request("GET", "/latest/meta-data/spot/instance-action", headers)
    if status == 200:
        action = json.loads(body)
        return f"spot {action['action']} at {action['time']}"
    status, body = request("GET", "/latest/meta-data/autoscaling/target-lifecycle-state", headers)
    return "Auto Scaling group" if status == 200 and body.strip() == b"Terminated" else None


def gcp(request: Request) -> str | None:
    """A preemption of a spot machine."""
    status, body = request("GET", "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return "preemption" if status == 200 and body.strip() == b"TRUE" else None


def azure(request: Request) -> str | None:
    """A scheduled event that ends or restarts this machine. The scale set must have termination notifications."""
    status, body = request("GET", "/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
    if status != 200:
        return None
    for event in json.loads(body)["Events"]:
        if event["EventType"] in _AZURE_ENDS:
            return f"{event['EventType']} not before {event['NotBefore'] or 'now'}"
    return None


PROVIDERS: Mapping[str, Callable[[Request], str | None]] = {"aws": aws, "azure": azure, "gcp": gcp}


def requests_to(host: str, port: int = 80) -> Request:
    """Requests to a metadata service."""

    def request(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        try:
            connection.request(method, path, headers=dict(headers))
            response = connection.getresponse()
            return response.status, response.read(_RESPONSE_MAX_BYTES)
        finally:
            connection.close()

    return request


def notice(provider: str, request: Request) -> str | None:
    """The announcement of the machine's end, or None. A metadata service that does not respond announces nothing."""
    try:
        return PROVIDERS[provider](request)
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
        return None


def drain(request: Request) -> bool:
    """Whether the agent accepted the drain."""
    try:
        return request("POST", "/drain", {})[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def main(arguments: list[str]) -> int:
    """Polls until the end is announced and the agent drains. The exit status is 2 for an unknown provider."""
    if len(arguments) != 1 or arguments[0] not in PROVIDERS:
        print(f"usage: python3 -m nbagent.termination {'|'.join(PROVIDERS)}", file=sys.stderr)  # noqa: T201
        return 2
    provider, metadata = arguments[0], requests_to(METADATA)
    while (text := notice(provider, metadata)) is None:
        time.sleep(POLL_S)
    emit(Event.TERMINATION_NOTICED, provider=provider, text=text)
    while not drain(requests_to(*API)):
        time.sleep(POLL_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
