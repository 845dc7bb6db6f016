"""What other people's errors become in ours, and how ours name parameters."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from optin_cli.commands.apply import apply
from optin_cli.commands.evaluate import evaluate
from optin_cli.commands.groups import flags_of, spelling_of
from optin_cli.commands.score import score
from optin_cli.commands.select import select
from optin_cli.errors import UsageError, first_line, param, spelled
from optin_cli.main import COMMANDS

PACKAGE = Path(__file__).resolve().parents[1] / "optin_cli"
_ROOMS = (
    "importance.py",
    "api",
    "artefacts",
    "data",
    "pruning",
    "measure",
    "models",
    "scoring",
    "selection",
    "surgery",
    "tasks",
    "pipeline.py",
    "sizes.py",
    "vocabulary",
)
_ALLOWED = r"`optin [^`]*`?|^ --[^`]*`|^optin bench MODEL --table$|`--flops[^`]*`|\"--heads\"|^--\w+$"
LIBRARY = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] in _ROOMS)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one  \ntwo"), "one"),
        (
            RuntimeError("Error(s) in loading:\n\tsize mismatch\n\tanother"),
            "Error(s) in loading: size mismatch",
        ),
        (RuntimeError("nothing below:"), "nothing below:"),
        (AssertionError(), "AssertionError"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_the_first_line_of_an_error(error, told):
    assert first_line(error) == told
    assert first_line(error, 5) == told[:5]


def test_an_error_writes_its_parameters_as_python_does():
    error = UsageError(f"{param('output_weight', -1)} is negative", f"leave {param('output_weight')} out")
    assert (error.what, error.hint) == ("output_weight=-1 is negative", "leave output_weight out")
    assert str(error) == "output_weight=-1 is negative\n  leave output_weight out"
    assert error.args == ("output_weight=-1 is negative",)
    assert error.params == ["output_weight"]
    assert spelled(param("method", "fisher")) == "method='fisher'"
    assert spelled(param("flops", 0.30000000000000004)) == "flops=0.3"
    assert spelled(param("baseline", meta="MODEL")) == "baseline=MODEL"
    assert spelled(param("sketch", False, python="sketch_rows=0")) == "sketch_rows=0"


@pytest.mark.parametrize(
    ("command", "text", "told"),
    [
        (score, param("output_weight", -1), "--lambda -1"),
        (score, param("sketch", False, python="sketch_rows=0"), "--no-sketch"),
        (score, param("force", True), "--force"),
        (score, param("family", meta="FILE.yaml"), "--anatomy FILE.yaml"),
        (apply, param("mask"), "--mask"),
        (select, param("max_prune", 2.0), "--max-prune-per-layer 2"),
        (evaluate, param("min_heads", 1), "--min-heads 1"),
        (evaluate, "a {brace}, 100 %", "a {brace}, 100 %"),
    ],
)
def test_the_command_line_writes_the_same_ones_as_its_flags(command, text, told):
    assert spelled(text, spelling_of(command, COMMANDS.values())) == told


def test_every_flag_is_that_of_one_parameter():
    """Else an error that names the parameter would send the reader to another command's flag."""
    flags: dict[str, set[str]] = {}
    for command in COMMANDS.values():
        for name, (flag, *_) in flags_of(command).items():
            flags.setdefault(flag, set()).add(name)
    assert {flag: names for flag, names in flags.items() if len(names) > 1} == {}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_below_the_commands_no_text_names_a_flag(path):
    """Whole command lines in backticks may, and the option that asks for a kind of budget."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = re.sub(_ALLOWED, "", node.value)
            assert not re.search(r"(?<![-\w])--[a-z]", text), f"line {node.lineno}: {node.value}"
