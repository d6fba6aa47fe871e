"""The one error tree. HTTP status and exit status of every failure come from here.

    NbagentError
      BadRequest               the caller's input; names the field and what would be right
        InvalidField
        InvalidBody
      IdempotencyMismatch      the same Idempotency-Key with another request
      Unauthenticated          no token where one is needed
      Forbidden                a token or an origin that is not allowed
      SlotNotFound
      ImageNotFound
      IllegalMove              a slot cannot go from its state to the one asked for
      Full                     no slot left to hand out; carries when to come back
      Draining                 the host hands out nothing; carries when to come back
      SupervisorUnavailable    the control socket does not answer
      StartFailed              a slot did not become ready: the step, errno and text
      ContentFailed            a slot cannot take the files that a claim brings
        ArchiveFailed          an archive could not be had, or is not fit to be unpacked
      ConfigError              a setting; names file, key and what would be right
      ImageInvalid             an archive or manifest that is refused
      FetchFailed              an image did not come from where it is

Codes are stable: clients and alerts match on them, never on the text. A code travels over the
control socket, and `from_wire` makes the same exception of it on the other side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class NbagentError(Exception):
    """Something nbagent can explain.

    `str(error)` is one sentence for a person. `details` are the machine-readable facts beside
    it; they go into the problem document and over the control socket as they are.
    """

    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    http_status: ClassVar[int] = 500
    exit_status: ClassVar[int] = 1

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message or self.title)
        self.details: dict[str, Any] = details

    def to_wire(self) -> dict[str, Any]:
        """The error as the control socket carries it."""
        return {"code": self.code, "message": str(self), "details": self.details}


class BadRequest(NbagentError):
    """The caller's input is wrong."""

    code = "bad-request"
    title = "Bad request"
    http_status = 400
    exit_status = 2


class InvalidField(BadRequest):
    """One field of the input is wrong. Details: `field`, `value`, `expected`."""

    code = "invalid-field"
    title = "Invalid field"

    def __init__(self, message: str = "", **details: Any) -> None:
        field, expected = details.get("field"), details.get("expected")
        super().__init__(message or f"{field}: expected {expected}", **details)


class InvalidBody(BadRequest):
    """The body as a whole is unreadable or too large."""

    code = "invalid-body"
    title = "Invalid body"


class IdempotencyMismatch(BadRequest):
    """An Idempotency-Key came back with a different request."""

    code = "idempotency-mismatch"
    title = "Idempotency-Key reused"
    http_status = 422


class Unauthenticated(NbagentError):
    """The caller is not on a trusted network and showed no token."""

    code = "unauthenticated"
    title = "Authentication required"
    http_status = 401
    exit_status = 4


class Forbidden(NbagentError):
    """The caller's token or origin is not allowed."""

    code = "forbidden"
    title = "Forbidden"
    http_status = 403
    exit_status = 4


class SlotNotFound(NbagentError):
    """No slot of this id lives on this host."""

    code = "slot-not-found"
    title = "No such slot"
    http_status = 404
    exit_status = 3


class ImageNotFound(NbagentError):
    """No image of this name is in the store."""

    code = "image-not-found"
    title = "No such image"
    http_status = 404
    exit_status = 3


class IllegalMove(NbagentError):
    """A slot cannot make this move from the state it is in."""

    code = "illegal-move"
    title = "Illegal move"
    http_status = 409


class Full(NbagentError):
    """Capacity or memory is used up. Details: `retry_after_s`."""

    code = "full"
    title = "Host is full"
    http_status = 503
    exit_status = 75  # EX_TEMPFAIL of sysexits.h


class Draining(Full):
    """The host is draining. Details: `retry_after_s`."""

    code = "draining"
    title = "Host is draining"


class SupervisorUnavailable(NbagentError):
    """The supervisor does not answer. Details: `retry_after_s`."""

    code = "supervisor-unavailable"
    title = "Supervisor unavailable"
    http_status = 503
    exit_status = 75


class StartFailed(NbagentError):
    """A slot did not start. Details: `step`, and `errno` where the kernel said one."""

    code = "start-failed"
    title = "Slot did not start"
    http_status = 503


class ContentFailed(NbagentError):
    """What a claim brings does not fit into a slot."""

    code = "content-failed"
    title = "Content cannot be brought into the slot"
    http_status = 422


class ArchiveFailed(ContentFailed):
    """The archive of a claim could not be fetched or unpacked."""

    code = "archive-failed"
    title = "Archive cannot be brought into the slot"
    http_status = 502


class ConfigError(NbagentError):
    """A setting is wrong. Details: `file`, `key`, `expected`."""

    code = "config"
    title = "Configuration error"
    exit_status = 78  # EX_CONFIG of sysexits.h


class ImageInvalid(NbagentError):
    """An image archive or its manifest is refused."""

    code = "image-invalid"
    title = "Image refused"
    http_status = 400
    exit_status = 65  # EX_DATAERR of sysexits.h


class FetchFailed(NbagentError):
    """An image could not be fetched: nothing there, no answer, or no program to fetch it."""

    code = "fetch-failed"
    title = "Image not fetched"
    http_status = 502
    exit_status = 69  # EX_UNAVAILABLE of sysexits.h


def _tree(root: type[NbagentError]) -> dict[str, type[NbagentError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def from_wire(document: Mapping[str, Any]) -> NbagentError:
    """The exception that `to_wire` described; an unknown code becomes a plain NbagentError."""
    kind = _tree(NbagentError).get(str(document.get("code")), NbagentError)
    details = document.get("details")
    facts = {str(name): value for name, value in details.items()} if isinstance(details, Mapping) else {}
    facts.pop("message", None)
    return kind(str(document.get("message", "")), **facts)
