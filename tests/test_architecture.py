"""The arrows of the house: who may import whom, and what must stay light."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "optin_cli"
ROWS = [
    {"main"},
    {"commands"},
    {"api"},
    {"trials", "reporting"},
    {"pipeline", "runtimes", "vocabulary"},
    {"pruning"},
    {"scoring", "selection", "compensation", "measure", "tracing"},
    {"execution"},
    {"loading"},
    {"transforms"},
    {"architectures"},
    {"tasks", "importance"},
    {"data"},
    {"artefacts"},
    {"structure", "console", "sizes"},
    {"log_file"},
    {"errors", "interrupts", "standalone"},
]
LEVEL = {room: level for level, rooms in enumerate(ROWS) for room in rooms}
MODULES = sorted(PACKAGE.rglob("*.py"))
OUTSIDE = {"__init__", "__main__"}
"""Modules that are above all rows: nothing imports them but the name of the package."""
LONGEST = 500


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imported(path: Path) -> set[str]:
    """optin_cli modules that a file imports, anywhere in it."""
    found = set()
    for node in nodes_of(path):
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
    if here in OUTSIDE:
        return
    for module in imported(path):
        there = room(module)
        if there in LEVEL and there != here:
            assert LEVEL[there] > LEVEL[here], f"{here} imports {module}"


def test_every_package_has_a_row():
    names = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert names - OUTSIDE == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_console_prints(path):
    if path.name == "console.py":
        return
    for node in nodes_of(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_holds_one_concept(path):
    """No test can count concepts; a file of this length holds more than one."""
    assert len(path.read_text().splitlines()) <= LONGEST


def test_no_module_needs_one_that_needs_it():
    """Also where an import is hidden in a function or from the interpreter."""
    modules = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in MODULES}
    needs = {name: {other for other in imported(path) if other in modules} for name, path in modules.items()}
    assert len(needs) > 150
    while loose := {name for name, others in needs.items() if not others & set(needs)} or {
        name for name in needs if not any(name in others for others in needs.values())
    }:
        needs = {name: others for name, others in needs.items() if name not in loose}
    assert not needs, f"these import each other: {sorted(needs)}"


def test_no_package_outgrows_the_house():
    """models/ had 26 % of the code before it was split by reason to change."""
    lines: dict[str, int] = {}
    for path in MODULES:
        here = path.relative_to(PACKAGE).parts[0]
        lines[here] = lines.get(here, 0) + len(path.read_text().splitlines())
    assert max(lines.values()) <= 0.15 * sum(lines.values()), lines
