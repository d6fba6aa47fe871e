# SPDX-License-Identifier: BSD-3-Clause
"""Validation of untrusted input: the ids, queries, bodies and headers of requests.

Lengths are checked before anything is read. Options are checked for known names, and their values for
being text, numbers or files; the supervisor checks their meaning by `model.parse_options`, because that
depends on the host. Errors are subclasses of BadRequest that name the field and the expected value.
"""

from __future__ import annotations

import difflib
import json
import math
from typing import NoReturn
from urllib.parse import unquote_to_bytes

from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType
from werkzeug.wrappers import Request

from nbagent.core import claim_content
from nbagent.core.errors import InvalidBody, InvalidField, SlotNotFound
from nbagent.core.model import ID_EXPECTED, is_slot_id
from nbagent.web import keys

BODY_MAX_BYTES = 64 * 1024
# JSON escapes may make an option six times as long on the control socket.
OPTIONS_MAX_BYTES = 32 * 1024
VALUE_EXPECTED = "text or a number"


def read_options(request: Request, fields: tuple[str, ...]) -> dict[str, object]:
    """The options in the query and the body of a request. Raises InvalidField for an option that is in both."""
    options = _read_query(request)
    limit_bytes = claim_content.BODY_MAX_BYTES if "files" in fields else BODY_MAX_BYTES
    for name, value in _read_body(request, limit_bytes).items():
        if name in options:
            raise InvalidField(
                f"{name}: given in the query and in the body; expected once", field=name, expected="once"
            )
        options[name] = value
    for name, value in options.items():
        options[name] = _check_option(name, value, fields)
    if len(json.dumps({name: value for name, value in options.items() if name != "files"})) > OPTIONS_MAX_BYTES:
        raise RequestEntityTooLarge(f"the options are longer than {OPTIONS_MAX_BYTES} bytes")
    return options


def read_key(request: Request) -> str | None:
    """The Idempotency-Key of a request, None without one. Raises InvalidField when it is malformed."""
    return keys.check_key(request.headers.get(keys.HEADER))


def check_slot_id(text: str) -> str:
    """`text` when it is a well-formed slot id. Raises SlotNotFound.

    Its label is not compared with host.label, because slots keep their ids when the label changes.
    """
    if is_slot_id(text):
        return text
    raise SlotNotFound(f"{text[:80]!r} is not a slot id", field="slot", value=text[:80], expected=ID_EXPECTED)


def _check_option(name: str, value: object, fields: tuple[str, ...]) -> object:
    if name not in fields:
        near = difflib.get_close_matches(name[:64], fields, 1)
        known = f"one of {', '.join(fields)}" if fields else "no field"
        hint = f"; did you mean {near[0]!r}?" if near else f"; expected {known}"
        raise InvalidField(f"unknown field {name[:64]!r}{hint}", field=name[:64], expected=known)
    if name == "files":
        # Their bounds are the same on every host, so malformed files are refused before the supervisor receives them.
        try:
            return claim_content.parse_files(value)
        except ValueError as error:
            raise InvalidField(field=name, value=json.dumps(value)[:80], expected=str(error)) from None
    if isinstance(value, (list, dict)) or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidField(field=name, value=json.dumps(value)[:80], expected=VALUE_EXPECTED)
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise InvalidField(field=name, value=value[:80], expected="text without NUL or lone surrogates")
    return value


def _read_query(request: Request) -> dict[str, object]:
    # The raw query, because request.args replaces bytes that are not UTF-8.
    options: dict[str, object] = {}
    for part in filter(None, request.environ.get("QUERY_STRING", "").encode("latin-1").split(b"&")):
        raw_name, _, raw_value = part.partition(b"=")
        name = _query_text(raw_name, "query")
        if name in options:
            raise InvalidField(
                f"{name[:64]}: given twice in the query; expected once", field=name[:64], expected="once"
            )
        options[name] = _query_text(raw_value, name[:64])
    return options


def _query_text(raw: bytes, field: str) -> str:
    try:
        return unquote_to_bytes(raw.replace(b"+", b" ")).decode()
    except UnicodeDecodeError:
        shown = raw[:80].decode("ascii", "replace")
        raise InvalidField(field=field, value=shown, expected="percent-encoded UTF-8") from None


def _read_body(request: Request, limit_bytes: int) -> dict[str, object]:
    raw = _raw_body(request, limit_bytes)
    if not raw:
        return {}
    if request.method == "GET":
        raise InvalidBody("a GET has no body; send the options in the query, or use POST")
    kind = request.mimetype
    charset = request.mimetype_params.get("charset", "utf-8").lower()
    if not (kind == "application/json" or kind.endswith("+json")) or charset not in ("utf-8", "utf8"):
        raise UnsupportedMediaType("send the body as JSON, with 'Content-Type: application/json'")
    if "Content-Encoding" in request.headers:
        raise UnsupportedMediaType("send the body without a Content-Encoding")
    return _parse_object(raw)


def _raw_body(request: Request, limit_bytes: int) -> bytes:
    # The server has joined the chunks of the body and set its length.
    length = request.content_length or 0
    if length > limit_bytes:
        _refuse_length(limit_bytes)
    raw: bytes = request.environ["wsgi.input"].read(length)
    return raw


def _refuse_length(limit_bytes: int) -> NoReturn:
    raise RequestEntityTooLarge(f"the body is longer than {limit_bytes} bytes")


def _parse_object(raw: bytes) -> dict[str, object]:
    try:
        document = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except InvalidBody:
        raise
    except RecursionError:
        raise InvalidBody("the JSON is nested too deeply; expected one flat object") from None
    except json.JSONDecodeError as error:
        raise InvalidBody(
            f"not valid JSON: {error.msg} at line {error.lineno} column {error.colno}",
            expected="a JSON object", line=error.lineno, column=error.colno,
        ) from None
    except ValueError as error:  # UnicodeDecodeError, or a number of thousands of digits
        raise InvalidBody(f"not valid JSON: {error}"[:200], expected="a JSON object in UTF-8") from None
    if isinstance(document, dict):
        return document
    raise InvalidBody("the body is valid JSON, but not an object", expected='an object such as {"memory": "1G"}')


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) == len(pairs):
        return document
    names = [name for name, _ in pairs]
    duplicate = next(name for name in names if names.count(name) > 1)[:64]
    raise InvalidBody(f"{duplicate!r} is given twice in one object; expected once", field=duplicate, expected="once")


def _no_constant(name: str) -> NoReturn:
    raise InvalidBody(f"{name} is not JSON; expected a finite number")
