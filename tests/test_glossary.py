"""The glossary explains words that are used: each of its terms occurs in the code or on another page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = ROOT / "docs/glossary.md"
LINE = re.compile(r"- \*\*([a-z ]+)\*\*: (\S.*\.)")
ENTRIES = [LINE.fullmatch(line) for line in GLOSSARY.read_text().splitlines() if line.startswith("-")]
TERMS = [entry[1] for entry in ENTRIES if entry]


@pytest.fixture(scope="module")
def written() -> str:
    """All code and all other pages, in lower case, with words of code apart."""
    paths = [*(ROOT / "optin_cli").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    return "\n".join(path.read_text() for path in paths if path != GLOSSARY).lower().replace("_", " ")


def test_every_entry_is_one_line_in_alphabetical_order():
    assert all(ENTRIES)
    assert sorted(set(TERMS)) == TERMS
    assert len(TERMS) > 30


@pytest.mark.parametrize("term", TERMS)
def test_the_term_is_used(term, written):
    assert re.search(rf"\b{term}s?\b", written)


def test_a_term_that_nothing_uses_would_be_found(written):
    assert not re.search(r"\bbandwidth of the house\b", written)
