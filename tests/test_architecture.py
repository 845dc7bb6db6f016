"""The arrows of the house: who may import whom, and what must stay light."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "optin_cli"
ROWS = [
    {"commands"},
    {"api"},
    {"pipeline"},
    {"scoring", "selection", "surgery", "measure"},
    {"export"},
    {"models", "importance"},
    {"tasks"},
    {"data", "artefacts"},
    {"errors"},
]
LEVEL = {room: level for level, rooms in enumerate(ROWS) for room in rooms}
MODULES = sorted(PACKAGE.rglob("*.py"))
# data holds digests that artefacts define
ALLOWED = {("data", "artefacts")}


def imported(path: Path) -> set[str]:
    """optin_cli modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("optin_cli.")}


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here not in LEVEL:
        return
    for module in imported(path):
        there = room(module)
        if there in LEVEL and there != here:
            assert LEVEL[there] > LEVEL[here] or (here, there) in ALLOWED, f"{here} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_console_prints(path):
    if path.name == "console.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_outgrows_a_sitting(path):
    assert len(path.read_text().splitlines()) <= 350


def test_no_module_of_scoring_needs_one_that_needs_it():
    """Also where an import is hidden in a function or from the interpreter."""
    modules = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in MODULES}
    needs = {
        name: {
            other for other in imported(path) if other in modules and other.startswith("optin_cli.scoring.")
        }
        for name, path in modules.items()
        if name.startswith("optin_cli.scoring.")
    }
    assert len(needs) > 20
    while loose := {name for name, others in needs.items() if not others & set(needs)} or {
        name for name in needs if not any(name in others for others in needs.values())
    }:
        needs = {name: others for name, others in needs.items() if name not in loose}
    assert not needs, f"these import each other: {sorted(needs)}"
