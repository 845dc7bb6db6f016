"""`builtin:docs`: sentences from the docstrings of the installed Python standard library.

Real English that every machine with Python has: no hub, no download. The sources are parsed, never imported.
The sentences depend on the Python version alone.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from optin_cli.data.prose import split_part

# parts that distributions leave out or patch, tests, and data
_SKIPPED = {
    "test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "turtledemo",
    "ensurepip", "distutils", "tkinter", "pydoc_data", "encodings", "config-3", "_sysconfigdata", "sitecustomize.py",
}  # fmt: skip
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PLAIN = re.compile(r"[A-Za-z ,;:'\"().!?-]+")
_WORDS = (5, 40)


@lru_cache(maxsize=1)
def sentences() -> tuple[str, ...]:
    """All distinct sentences of the standard library's docstrings, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED.intersection(path.relative_to(root).parts):
            found.update(_docstring_sentences(path))
    return tuple(sorted(found))


def split_sentences(split: str) -> list[str]:
    """The sentences of one split: see `split_part`."""
    return split_part(sentences(), split)


def _docstring_sentences(path: Path) -> set[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return set()  # templates and deliberately broken files are not a source of English
    found: set[str] = set()
    for node in _documented(tree):
        for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
            for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
                words = len(sentence.split())
                if (
                    _WORDS[0] <= words <= _WORDS[1]
                    and sentence[0].isupper()
                    and sentence.endswith((".", "!", "?"))
                    and _PLAIN.fullmatch(sentence)
                ):
                    found.add(sentence)
    return found


def _documented(
    tree: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every node that can have a docstring. Expressions, most of a tree, hold none and are not walked."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, part, None)
            if isinstance(inner, list):  # of a lambda or a conditional expression it is an expression
                waiting.extend(inner)
