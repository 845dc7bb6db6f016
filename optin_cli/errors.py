"""The errors a user can meet. Each says what happened, where, and what to do next.

The exit codes are part of the command line's contract: 1 failure, 2 usage, 3 artefacts that are damaged or
do not belong together, 4 the budget can't be met, 5 a quality gate failed, 130 interrupted.
"""

from __future__ import annotations


class OptinError(Exception):
    """Base of every error optin raises on purpose.

    `what` is one sentence, `hint` the way out. `str(error)` joins the two.
    """

    exit_code = 1

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n  {self.hint}" if self.hint else self.what


class UsageError(OptinError):
    """The command line asks for something that can't be: clashing options, a missing path, a wrong value."""

    exit_code = 2


class InputError(OptinError):
    """A model or a data set can't be used: unreadable, empty, without the columns or weights needed."""


class UnknownArchitecture(InputError):
    """No family table describes the model."""


class ArtefactError(OptinError):
    """An artefact is damaged, of another version, or belongs to another model."""

    exit_code = 3


class BudgetError(OptinError):
    """No mask fits the budget; the hint names the smallest budget that can be reached."""

    exit_code = 4


class GateError(OptinError):
    """A quality gate such as `--max-drop` failed."""

    exit_code = 5


class Followed(OptinError):
    """Another process of the team failed and has told why: this one ends with the same exit code, in silence."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of the team has failed")
        self.exit_code = exit_code


def first_line(error: BaseException, longest: int | None = None) -> str:
    """What an error says first, in at most `longest` characters; the name of its class where it says nothing.

    A heading, as torch puts above a list of mismatches, takes the line below it along.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])[:longest]
