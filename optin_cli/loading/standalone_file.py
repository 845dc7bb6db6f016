"""`modeling_optin.py` of a pruned directory: what opens it without optin, put together from `standalone`."""

from __future__ import annotations

import ast
import functools
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optin_cli import standalone

NAME = "modeling_optin.py"
_HOME = Path(standalone.__file__).parent
_PARTS = {
    "empty": "empty_layers",
    "bypass": "without_heads",
    "without heads": "without_heads",
    "selects": "unit_inputs",
    "merging": "merging",
}


def code_for(library: str, resized: Mapping[str, Any]) -> str:
    """The file for a model of `library` that was changed as `resized` says: with the parts that it needs alone."""
    opening = "from_transformers" if library == "transformers" else "from_vision"
    needed = {change["how"] for changes in resized["runs"].values() for change in changes}
    needed |= {"merging"} if resized["merging"] else set()
    return _joined(opening, "sizes", *dict.fromkeys(part for how, part in _PARTS.items() if how in needed))


@functools.cache
def _joined(*names: str) -> str:
    """The sources as one file, with all imports at the top."""
    first, *others = parts = [_Part(_HOME / f"{name}.py") for name in names]
    chapters = [f"{_as_comment(part.docstring)}\n\n\n{part.body}" for part in others]
    return "\n\n\n".join([f"{first.docstring}\n\n{_imports(parts)}\n\n{first.body}", *chapters]) + "\n"


class _Part:
    """A source file: its docstring as it is written, its imports, and the rest."""

    def __init__(self, path: Path) -> None:
        lines = path.read_text().splitlines()
        nodes = ast.parse("\n".join(lines)).body
        self.docstring = "\n".join(lines[: nodes[0].end_lineno])
        self.imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        self.body = "\n".join(lines[self.imports[-1].end_lineno :]).strip("\n")


def _as_comment(docstring: str) -> str:
    return "\n".join(f"# {line}".rstrip() for line in docstring.strip('"').strip().splitlines())


def _imports(parts: Sequence[_Part]) -> str:
    """All imports but those of optin, one line a module: the standard library's first."""
    plain: set[str] = set()
    names: dict[str, set[str]] = defaultdict(set)
    for node in (node for part in parts for node in part.imports):
        if isinstance(node, ast.Import):
            plain |= {alias.name for alias in node.names}
        elif node.module and not node.module.startswith("optin_cli"):
            names[node.module] |= set(map(ast.unparse, node.names))
    lines = [f"import {module}" for module in sorted(plain)]
    lines += [f"from {module} import {', '.join(sorted(of))}" for module, of in sorted(names.items())]
    groups: tuple[list[str], ...] = ([], [], [])
    for line in lines:
        home = line.split()[1].partition(".")[0]
        groups[0 if home == "__future__" else 1 if home in sys.stdlib_module_names else 2].append(line)
    return "\n\n".join("\n".join(group) for group in groups if group)
