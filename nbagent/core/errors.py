# SPDX-License-Identifier: BSD-3-Clause
"""The error tree. The HTTP status and the exit status of every error come from here.

    NbagentError
      BadRequest               the caller's input; names the field and the expected value
        InvalidField
        InvalidBody
      IdempotencyMismatch      the same Idempotency-Key with another request
      Unauthenticated          no token where one is needed
      Forbidden                a token or an origin that is not allowed
      SlotNotFound
      ImageNotFound
      IllegalMove              a slot cannot go from its state to the requested one
      Full                     no slot is left to hand out; has the time to retry after
        Draining               the host hands out no slots
        NotReady               no slot became ready in time, although there is room
      SupervisorUnavailable    no response on the control socket, or no descriptor to respond
      StartFailed              a slot did not become ready: the step, errno and text
      RecordFailed             the record of a slot cannot be written, because /run is full
      ContentFailed            a slot cannot take the files of a claim
        ArchiveFailed          an archive could not be fetched or unpacked
      ConfigError              a wrong setting; names the file, the key and the expected value
      ImageInvalid             an archive or manifest that is refused
      FetchFailed              an image could not be fetched from its source
      PublishFailed            the web assets of an image could not be published

Codes are stable, because clients and alerts match on them and never on the text. A code travels over the control
socket, and `from_wire` makes the same exception from it on the other side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class NbagentError(Exception):
    """The root of the tree.

    `str(error)` is one sentence for a person. `details` are machine-readable; the problem document and the control
    socket carry them unchanged.
    """

    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    http_status: ClassVar[int] = 500
    exit_status: ClassVar[int] = 1

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message or self.title)
        self.details = details

    def to_wire(self) -> dict[str, Any]:
        """The error as JSON for the control socket."""
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
    """An Idempotency-Key was used before with a different request."""

    code = "idempotency-mismatch"
    title = "Idempotency-Key reused"
    http_status = 422


class Unauthenticated(NbagentError):
    """The caller is not on a trusted network and sent no token."""

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
    """There is no slot with this id on this host."""

    code = "slot-not-found"
    title = "No such slot"
    http_status = 404
    exit_status = 3


class ImageNotFound(NbagentError):
    """There is no image with this name in the store."""

    code = "image-not-found"
    title = "No such image"
    http_status = 404
    exit_status = 3


class IllegalMove(NbagentError):
    """The state of a slot does not allow this change."""

    code = "illegal-move"
    title = "Illegal move"
    http_status = 409


class Full(NbagentError):
    """The capacity or the memory of the host is used up. Details: `retry_after_s`."""

    code = "full"
    title = "Host is full"
    http_status = 503
    exit_status = 75  # EX_TEMPFAIL of sysexits.h


class Draining(Full):
    """The host is draining. Details: `retry_after_s`."""

    code = "draining"
    title = "Host is draining"


class NotReady(Full):
    """No slot became ready within pool.claim_timeout, although the host has room. Details: `retry_after_s`."""

    code = "not-ready"
    title = "No slot became ready in time"


class SupervisorUnavailable(NbagentError):
    """There is no response from the supervisor, or it has no descriptor for the request. Details: `retry_after_s`."""

    code = "supervisor-unavailable"
    title = "Supervisor unavailable"
    http_status = 503
    exit_status = 75


class StartFailed(NbagentError):
    """A slot did not start. Details: `step`, and `errno` when a system call failed."""

    code = "start-failed"
    title = "Slot did not start"
    http_status = 503

    @classmethod
    def at(cls, step: str, errno: int, text: str) -> StartFailed:
        """The error of a wire.failure.Failure, whose fields these are."""
        return cls(f"{step}: {text}", step=step, errno=errno)


class RecordFailed(NbagentError):
    """The record of a slot cannot be written, so that it would not outlive the supervisor. Details: `errno`."""

    code = "record-failed"
    title = "The host cannot record slots"
    http_status = 503
    exit_status = 75


class ContentFailed(NbagentError):
    """The content of a claim could not be delivered into a slot."""

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
    """An image could not be fetched: it does not exist, there is no response, or no program can fetch it."""

    code = "fetch-failed"
    title = "Image not fetched"
    http_status = 502
    exit_status = 69  # EX_UNAVAILABLE of sysexits.h


class PublishFailed(NbagentError):
    """The web assets of an image could not be published: the target refuses them, or no program can upload them."""

    code = "publish-failed"
    title = "Assets not published"
    http_status = 502
    exit_status = 69


def _tree(root: type[NbagentError]) -> dict[str, type[NbagentError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def from_wire(document: Mapping[str, Any]) -> NbagentError:
    """The exception from a document of `to_wire`; an unknown code becomes a plain NbagentError."""
    kind = _tree(NbagentError).get(str(document.get("code")), NbagentError)
    details = document.get("details")
    facts = {str(name): value for name, value in details.items()} if isinstance(details, Mapping) else {}
    facts.pop("message", None)
    return kind(str(document.get("message", "")), **facts)
