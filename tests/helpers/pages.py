"""The pages that people read, and what is in them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^(?: {4}|\t).*\n?)+", re.MULTILINE)


def script(name: str) -> ModuleType:
    """A script of docs/, imported."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def pages() -> dict[str, str]:
    """Path from the repository's root -> text, of the front page, CONTRIBUTING and all pages of docs/."""
    paths = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
    found = {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}
    notebooks = script("notebooks")
    for path in sorted(DOCS.rglob("*.ipynb")):
        found[path.relative_to(ROOT).as_posix()] = notebooks.as_markdown(notebooks.read(path))
    return found


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of the fenced and indented blocks of a page, in order; indented ones have no language."""
    found = [(match.start(), match[1], match[2]) for match in _FENCED.finditer(text)]
    rest = _FENCED.sub(lambda match: re.sub(r"[^\n]", "-", match[0]), text)
    found += [
        (m.start(), "", re.sub(r"^(?: {4}|\t)", "", m[0], flags=re.M)) for m in _INDENTED.finditer(rest)
    ]
    return [(language, code) for _, language, code in sorted(found)]


def commands_in(code: str) -> list[str]:
    """What follows `optin` on each line that runs it; without comments, pipes and what comes before."""
    lines = re.findall(r"^(?:.*-m optin_cli|.*\$\(optin|[ \t]*optin)[ \t]+(.*)$", code, re.MULTILINE)
    return [re.split(r"\s#|\s\||\)", line)[0].strip() for line in lines]


PAGES_THAT_RUN = ("README.md", "docs/quickstart.md", "docs/api.md", "docs/guides/own-model.md")
"""Pages whose Python and commands a tiny model can run."""
