# SPDX-License-Identifier: BSD-3-Clause
"""A failure as it travels from the process where a step failed to the process that reports it.

There is one document for it, {"failure": {"step": str, "errno": int, "text": str}}, and one exception, StepFailed,
which is raised where the step fails and again where the message is received. The supervisor raises StartFailed or
ContentFailed from it, whose details an HTTP response carries. Standard library only; Python 3.9 and up.
"""

from __future__ import annotations

from typing import Dict, Mapping, NamedTuple

from nbagent.wire import fields

STEP_MAX_CHARACTERS = 200
TEXT_MAX_CHARACTERS = 1000
# The step of a zygote whose slots would share open files. It fails each time, until the image changes.
INHERITED_STEP = "inherited files"
# The texts of a zygote about the modules and extensions that it left out.
NOTES_MAX, NOTE_MAX_CHARACTERS = 20, 300
# MAX_ERRNO of the kernel's include/linux/err.h.
ERRNO_MAX = 4095


class Failure(NamedTuple):
    """The step that failed, the kernel's error number or 0, and the cause as text."""

    step: str
    errno: int
    text: str

    def __str__(self) -> str:
        return f"{self.step}: {self.text}"

    @classmethod
    def of(cls, error: BaseException, step: str) -> Failure:
        """The failure that `error` means when it was raised in `step`."""
        if isinstance(error, StepFailed):
            return error.failure
        if isinstance(error, OSError):
            return cls(step, error.errno or 0, str(error))
        return cls(step, 0, repr(error))

    def save(self) -> Dict[str, object]:
        """The failure as a message."""
        shortened = {"step": self.step[:STEP_MAX_CHARACTERS], "text": self.text[:TEXT_MAX_CHARACTERS]}
        return {"failure": {**shortened, "errno": self.errno if 0 <= self.errno <= ERRNO_MAX else 0}}

    @classmethod
    def restore(cls, message: Mapping[str, object]) -> Failure:
        """The failure in a message, with control characters replaced. Raises MalformedMessage."""
        failure = fields.mapping(message, "failure")
        return cls(
            printable(fields.text(failure, "step"), STEP_MAX_CHARACTERS),
            fields.integer(failure, "errno", 0, ERRNO_MAX),
            printable(fields.text(failure, "text"), TEXT_MAX_CHARACTERS),
        )


class StepFailed(Exception):
    """A step failed, in this process or in the sender of a message."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def printable(text: str, most: int) -> str:
    """At most `most` characters of `text`; "?" replaces each that a terminal or the journal cannot show."""
    return "".join(character if character.isprintable() else "?" for character in text[:most])
