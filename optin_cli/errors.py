"""The errors a user can meet. Each says what happened, where, and what to do next.

The exit codes are part of the command line's contract: 1 failure, 2 usage, 3 artefacts that are damaged or
do not belong together, 4 the budget can't be met, 5 a quality gate failed, 130 interrupted.

Messages name parameters by `param`. An error spells them as in Python, `output_weight=-1`; the command line spells the
same error with its flags, `--lambda -1`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

Spelling = Callable[[str, str | None, str | None], str]
"""(name of a parameter, its value as text, its value as Python writes it) -> how a message has it. No value: None."""

_START, _NEXT, _STOP = "\x02", "\x1f", "\x03"  # control characters, which no message has
_PARAM = re.compile(f"{_START}([^{_NEXT}]*){_NEXT}([^{_NEXT}]*){_NEXT}([^{_STOP}]*){_STOP}")
_NO_VALUE = object()


def param(name: str, value: object = _NO_VALUE, *, meta: str = "", python: str = "") -> str:
    """A parameter, perhaps with a value, for the message of an error: `f"{param('probes', 0)}: at least 1 is needed"`.

    `meta` is a value that the reader chooses (`MODEL`). `python` is what Python has instead, where it has no
    parameter of that name.
    """
    if value is _NO_VALUE:
        shown = written = meta
    else:
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        written = shown if isinstance(value, float) else repr(value)
    if python:
        written = f"={python}"
    return f"{_START}{name}{_NEXT}{shown}{_NEXT}{written}{_STOP}"


def in_python(name: str, shown: str | None, written: str | None) -> str:
    """`output_weight=-1`"""
    if written is not None and written.startswith("="):
        return written[1:]
    return name if written is None else f"{name}={written}"


def spelled(text: str, spelling: Spelling = in_python) -> str:
    """A text with its parameters written in one way."""
    return _PARAM.sub(lambda found: spelling(found[1], found[2] or None, found[3] or None), text)


class OptinError(Exception):
    """Base of every error optin raises on purpose.

    `what` is one sentence, `hint` the way out. `str(error)` joins the two. Parameters are spelled as in Python.
    """

    exit_code = 1

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(spelled(what))
        self.template = (what, hint)
        """Message and hint as they were raised: `spelled` writes their parameters."""

    @property
    def what(self) -> str:
        return spelled(self.template[0])

    @property
    def hint(self) -> str | None:
        hint = self.template[1]
        return None if hint is None else spelled(hint)

    def rename(self, names: Mapping[str, str]) -> None:
        """Name parameters as the caller does, old -> new, where the two differ."""
        what, hint = (
            part
            and _PARAM.sub(lambda found: found[0].replace(found[1], names.get(found[1], found[1]), 1), part)
            for part in self.template
        )
        self.template = (what or "", hint)

    @property
    def params(self) -> list[str]:
        """The parameters that the message names, in order."""
        return list(
            dict.fromkeys(found[1] for part in self.template for found in _PARAM.finditer(part or ""))
        )

    def __str__(self) -> str:
        return f"{self.what}\n  {self.hint}" if self.hint else self.what


class UsageError(OptinError):
    """The caller asks for something that can't be: clashing options, a missing path, a wrong value."""

    exit_code = 2


class OutputDiffers(UsageError):
    """An output is there already, and optin made it from other inputs."""


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
    """A quality gate failed: too much was lost."""

    exit_code = 5


class PeerFailure(OptinError):
    """Another process of the team failed and has reported why: this one ends with the same exit code, in silence."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of the team has failed")
        self.exit_code = exit_code


def first_line(error: BaseException, longest: int | None = None) -> str:
    """Return the first line of an error, in at most `longest` characters; the name of its class if it is empty.

    A heading, as torch puts above a list of mismatches, takes the line below it along.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])[:longest]
