"""What callers send, made safe: the shape of ids, query, body and headers, before anybody asks
the supervisor.

Bounds come first: nothing is read that is longer than a request may be. What a value means is
checked in the supervisor by `model.parse_options`, which knows the host; here it is only made
sure that it is text or a number under a known name, and that files are files. Raises BadRequest's kin, always with the
field and what would be right.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn
from urllib.parse import unquote_to_bytes

from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType
from werkzeug.wrappers import Request

from nbagent.core import claim_content
from nbagent.core.errors import InvalidBody, InvalidField, SlotNotFound
from nbagent.core.model import ID_EXPECTED, is_slot_id

BODY_MAX_BYTES = 64 * 1024
# As text that json escapes, an option may grow sixfold on its way over the control socket.
OPTIONS_MAX_BYTES = 32 * 1024
KEY_EXPECTED = "1 to 255 visible ASCII characters"
VALUE_EXPECTED = "text or a number"


def read_options(request: Request, fields: tuple[str, ...]) -> dict[str, Any]:
    """The options of a request out of its query and its body, each named at most once."""
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
    """The Idempotency-Key, if one is given."""
    key = request.headers.get("Idempotency-Key")
    if key is None or (1 <= len(key) <= 255 and all("!" <= character <= "~" for character in key)):
        return key
    raise InvalidField(field="Idempotency-Key", value=key[:80], expected=KEY_EXPECTED)


def check_slot_id(text: str, label: str) -> str:
    """`text`, when it is shaped as an id of this host. Raises SlotNotFound."""
    if is_slot_id(text, label):
        return text
    raise SlotNotFound(
        f"{text[:80]!r} is not an id of this host, whose label is {label}",
        field="slot", value=text[:80], expected=ID_EXPECTED,
    )


def _check_option(name: str, value: Any, fields: tuple[str, ...]) -> object:
    if name not in fields:
        near = difflib.get_close_matches(name[:64], fields, 1)
        known = f"one of {', '.join(fields)}" if fields else "no field"
        hint = f"; did you mean {near[0]!r}?" if near else f"; expected {known}"
        raise InvalidField(f"unknown field {name[:64]!r}{hint}", field=name[:64], expected=known)
    if name == "files":
        # The same on every host, and so refused before it is carried to the supervisor.
        try:
            return claim_content.parse_files(value)
        except ValueError as error:
            raise InvalidField(field=name, value=json.dumps(value)[:80], expected=str(error)) from None
    if isinstance(value, (list, dict)) or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidField(field=name, value=json.dumps(value)[:80], expected=VALUE_EXPECTED)
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
        raise InvalidField(field=name, value=value[:80], expected="text without NUL or lone surrogates")
    return value


def _read_query(request: Request) -> dict[str, Any]:
    # Read from the raw query: Werkzeug replaces what is not UTF-8 and keeps every duplicate.
    options: dict[str, Any] = {}
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


def _read_body(request: Request, limit_bytes: int) -> Mapping[str, Any]:
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
    # wsgi.input itself: Flask 2.2 puts no bound on a chunked body.
    stream = request.environ["wsgi.input"]
    length = request.content_length
    if "chunked" in request.headers.get("Transfer-Encoding", "").lower():
        length = limit_bytes + 1
    elif length is None:
        return b""
    elif length > limit_bytes:
        _refuse_length(limit_bytes)
    try:
        raw: bytes = stream.read(length)
    except OSError:  # gunicorn's error for a chunk that is not one, and for a caller that left
        raise InvalidBody("the body ended early or its chunks are malformed") from None
    if len(raw) > limit_bytes:
        _refuse_length(limit_bytes)
    return raw


def _refuse_length(limit_bytes: int) -> NoReturn:
    raise RequestEntityTooLarge(f"the body is longer than {limit_bytes} bytes")


def _parse_object(raw: bytes) -> Mapping[str, Any]:
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
    raise InvalidBody("the body is valid JSON but no object", expected='an object such as {"memory": "1G"}')


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)[:64]
    raise InvalidBody(f"{twice!r} is given twice in one object; expected once", field=twice, expected="once")


def _no_constant(name: str) -> NoReturn:
    raise InvalidBody(f"{name} is not JSON; expected a finite number")
