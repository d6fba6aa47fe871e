# SPDX-License-Identifier: BSD-3-Clause
"""The OpenAPI description lists exactly the routes that are served, and real responses match its schemas."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import LABEL, FakeSupervisor
from flask.testing import FlaskClient

from nbagent.api.app import create_app, flask_path
from nbagent.config import host_config
from nbagent.wire.control import ControlClient

METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[FlaskClient]:
    settings = host_config.parse({"host": {"label": LABEL}})
    with FakeSupervisor(tmp_path / "control.sock") as supervisor:
        yield create_app(settings, ControlClient(supervisor.path, 5), tmp_path / "token").test_client()


@pytest.fixture
def description(api: FlaskClient) -> Any:
    return api.get("/openapi.json").json


def operations(description: Any) -> dict[tuple[str, str], Any]:
    return {
        (method.upper(), path): item[method]
        for path, item in description["paths"].items()
        for method in METHODS & set(item)
    }


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from ([node["$ref"]] if "$ref" in node else [])
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from references(item)


def faults(value: Any, schema: Any, schemas: Any, where: str = "response") -> Iterator[str]:
    """The violations of `schema` in `value`, for the keywords that our schemas use."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
             "boolean": bool, "null": type(None)}
    named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(isinstance(value, kinds[kind]) for kind in named):
        yield f"{where} is {value!r}, not {named}"
        return
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from faults(item, schema["items"], schemas, f"{where}[{index}]")
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        yield from (f"{where} lacks {name}" for name in schema.get("required", ()) if name not in value)
        for name, item in value.items():
            additional = schema.get("additionalProperties")
            if name in properties:
                yield from faults(item, properties[name], schemas, f"{where}.{name}")
            elif isinstance(additional, dict):
                yield from faults(item, additional, schemas, f"{where}.{name}")
            elif "properties" in schema and additional is not True:
                yield f"{where}.{name} is not described"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where} is {value!r}"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{where} is {value!r}"


def test_every_route_is_described_and_every_description_served(api: FlaskClient, description: Any) -> None:
    served = {
        (method, rule.rule)
        for rule in api.application.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert served == {(method, flask_path(path)) for method, path in operations(description)}


def test_description_is_complete(description: Any) -> None:
    assert description["openapi"] == "3.1.0"
    assert set(description["info"]) >= {"title", "version"}
    names = [operation["operationId"] for operation in operations(description).values()]
    assert len(names) == len(set(names))
    for (_, path), operation in operations(description).items():
        item = description["paths"][path]
        parameters = [*item.get("parameters", []), *operation.get("parameters", [])]
        given = {(parameter["name"], parameter["in"]) for parameter in parameters}
        assert {(name, "path") for name in re.findall(r"{(\w+)}", path)} <= given
        assert all(re.fullmatch(r"[2-5]\d\d", code) for code in operation["responses"])
        assert all(response["description"] for response in operation["responses"].values())
        assert operation["summary"]


def test_every_reference_has_a_schema_and_every_schema_a_reference(description: Any) -> None:
    schemas = description["components"]["schemas"]
    targets = set(references(description))
    assert targets <= {f"#/components/schemas/{name}" for name in schemas}
    assert {f"#/components/schemas/{name}" for name in schemas} == targets


def test_responses_match_the_description(api: FlaskClient, description: Any) -> None:
    slot = api.post("/claim").json["slot"]
    bodies = {("PATCH", "/slots/{slot}"): {"ttl": "1h"}}
    order = sorted(operations(description).items(), key=lambda entry: entry[0][0] == "DELETE")
    for (method, path), operation in order:
        response = api.open(path.replace("{slot}", slot), method=method, json=bodies.get((method, path)))
        if (method, path) == ("POST", "/drain"):
            api.delete("/drain")
        assert response.status_code == 200, (method, path, response.text)
        content = operation["responses"]["200"]["content"]
        assert list(content) == [response.mimetype]
        value = response.json if response.is_json else response.text
        schema = content[response.mimetype]["schema"]
        found = list(faults(value, schema, description["components"]["schemas"], f"{method} {path}"))
        assert path == "/openapi.json" or found == []


def test_problems_match_the_description(api: FlaskClient, description: Any) -> None:
    schemas = description["components"]["schemas"]
    for path in ("/claim?memory=lots", f"/slots/{LABEL}-000000000000", "/slots/x", "/nowhere"):
        response = api.get(path)
        assert list(faults(response.json, schemas["Problem"], schemas)) == []
    claim = description["paths"]["/claim"]["post"]["responses"]
    assert {"400", "401", "403", "404", "413", "415", "422", "503"} <= set(claim)
    assert "Retry-After" in claim["503"]["headers"]
