# SPDX-License-Identifier: BSD-3-Clause
"""Notices of clouds by a metadata service of the test, the autoscaler's rule, and the user data."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from nbagent import termination
from nbagent.config import host_config
from nbagent.core.events import Event

CLOUD = Path(__file__).resolve().parents[2] / "packaging/cloud"
AWS_TOKEN = ("PUT", "/latest/api/token")
AWS_SPOT = ("GET", "/latest/meta-data/spot/instance-action")
AWS_GROUP = ("GET", "/latest/meta-data/autoscaling/target-lifecycle-state")
GCP = ("GET", "/computeMetadata/v1/instance/preempted")
AZURE = ("GET", "/metadata/scheduledevents?api-version=2020-07-01")
# Each cloud requires one of these.
HEADERS = {AWS_SPOT: ("X-aws-ec2-metadata-token", "t1"), AWS_GROUP: ("X-aws-ec2-metadata-token", "t1"),
           AWS_TOKEN: ("X-aws-ec2-metadata-token-ttl-seconds", "60"), GCP: ("Metadata-Flavor", "Google"),
           AZURE: ("Metadata", "true")}
Answers = Mapping[tuple[str, str], str]


class Service(ThreadingHTTPServer):
    """A metadata service or a control API with some answers; all else is 404."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: Answers = {}
        self.requests: list[tuple[str, str]] = []


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        asked = (self.command, self.path)
        self.server.requests.append(asked)
        name, value = HEADERS.get(asked, ("Host", self.headers["Host"]))
        body = self.server.answers.get(asked, "").encode() if self.headers[name] == value else b""
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST = do_GET  # noqa: N815  names of the base class

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def azure_events(*kinds: str) -> str:
    return json.dumps({"DocumentIncarnation": 1, "Events": [
        {"EventId": "1", "EventType": kind, "EventStatus": "Scheduled", "NotBefore": "Mon, 19 Sep 2026 18:29:47 GMT"}
        for kind in kinds
    ]})


NOTICES = [
    ("aws", {AWS_TOKEN: "t1", AWS_SPOT: '{"action": "stop", "time": "2026-09-18T08:22:00Z"}'}, "spot stop at 2026"),
    ("aws", {AWS_TOKEN: "t1", AWS_GROUP: "Terminated"}, "Auto Scaling group"),
    ("gcp", {GCP: "TRUE"}, "preemption"),
    ("azure", {AZURE: azure_events("Freeze", "Preempt")}, "Preempt not before Mon, 19 Sep"),
]


@pytest.mark.parametrize(("provider", "answers", "text"), NOTICES, ids=["spot", "group", "gcp", "azure"])
def test_a_notice_of_each_cloud_drains_the_host(
    service: Service, monkeypatch: pytest.MonkeyPatch, provider: str, answers: Answers, text: str
) -> None:
    events: list[tuple[Event, dict[str, object]]] = []
    monkeypatch.setattr(termination, "emit", lambda event, **fields: events.append((event, fields)))
    monkeypatch.setattr(termination, "POLL_S", 0.01)
    monkeypatch.setattr(termination, "API", service.server_address)
    request = termination.requests_to
    monkeypatch.setattr(termination, "requests_to", lambda host, port=80: request("127.0.0.1", service.server_port))
    service.answers = dict(answers) | {("POST", "/drain"): "{}"}
    assert termination.main([provider]) == 0
    assert service.requests[-1] == ("POST", "/drain")
    (event, fields), = events
    assert event is Event.TERMINATION_NOTICED and fields["provider"] == provider and text in str(fields["text"])


@pytest.mark.parametrize(("provider", "answers"), [
    ("aws", {AWS_TOKEN: "t1"}), ("aws", {AWS_TOKEN: "t1", AWS_GROUP: "InService"}), ("aws", {AWS_SPOT: "no token"}),
    ("gcp", {GCP: "FALSE"}), ("azure", {AZURE: azure_events("Freeze")}), ("azure", {AZURE: "<html>"}), ("gcp", {}),
])
def test_no_notice_is_none(service: Service, provider: str, answers: Answers) -> None:
    service.answers = answers
    assert termination.notice(provider, termination.requests_to("127.0.0.1", service.server_port)) is None


def test_a_metadata_service_that_does_not_respond_announces_nothing() -> None:
    def refused(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        raise ConnectionRefusedError

    assert {termination.notice(provider, refused) for provider in termination.PROVIDERS} == {None}
    assert termination.drain(refused) is False


def test_an_unknown_cloud_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert termination.main(["unknown"]) == 2
    assert "aws|azure|gcp" in capsys.readouterr().err


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    loader = SourceFileLoader("scale", str(CLOUD / "scale"))
    spec = importlib.util.spec_from_loader("scale", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"], former = module, sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    loader.exec_module(module)
    sys.dont_write_bytecode = former
    return module


def host(in_use: int, capacity: int = 10, **more: bool) -> dict[str, Any]:
    return {"in_use": in_use, "capacity": capacity, "available": capacity - in_use, **more}


@pytest.mark.parametrize(("hosts", "decision"), [
    ({}, "out"),
    ({"a": host(9)}, "out"),
    ({"a": host(5)}, None),
    ({"a": host(0)}, None),                              # the last host stays
    ({"a": host(9), "b": host(9)}, "out"),
    ({"a": host(9), "b": host(9), "c": host(9)}, None),  # as many as may be
    ({"a": host(3), "b": host(0)}, "b"),
    ({"a": host(3), "b": host(2)}, None),                # 50 % of one host would be free
    ({"a": host(9), "b": host(0, draining=True), "c": {"down": True, "capacity": 0, "available": 0}}, "out"),
])
def test_the_rule_of_the_autoscaler(scale: ModuleType, hosts: dict[str, Any], decision: str | None) -> None:
    stats = {"hosts": {f"http://{label}": figures for label, figures in hosts.items()}}
    assert scale.decide(stats, scale.Rule(hosts_max=3)) == decision


def test_the_user_data_names_units_and_settings_that_exist() -> None:
    text = (CLOUD / "user-data.yaml").read_text()
    assert text.startswith("## template: jinja\n#cloud-config\n")
    data = yaml.safe_load(text)
    units = {path.name for path in (CLOUD.parents[1] / "units").iterdir()}
    enabled = [command[-1].replace("<cloud>", "") for command in data["runcmd"] if command[0] == "systemctl"]
    assert len(enabled) == 2 and set(enabled) <= units
    files = {file["path"]: file for file in data["write_files"]}
    assert files["/etc/nbagent/dns-key"]["permissions"] == "0600"
    settings = files["/etc/nbagent/conf.d/fleet.toml"]["content"]
    for name, value in (("<gateway>", "10.1.0.2"), ("<DNS server>", "10.1.0.53"), ("<hosts.example.org>", "h.example")):
        settings = settings.replace(name, value)
    found = host_config.parse(tomllib.loads(
        settings.replace("{{ (v1.instance_id | lower | replace('-', ''))[-16:] }}", "bcdef0123456789a")))
    assert found.label == "bcdef0123456789a" and found.dns.zone == "h.example"
