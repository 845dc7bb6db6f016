"""Run a notebook without Jupyter, and show one as Markdown: `python docs/notebooks.py docs/tutorial.ipynb`.

A cell's output is what it prints and the value of its last expression, as in Jupyter. It is written into the file.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """A notebook as plain data."""
    return json.loads(path.read_text())


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Its cells of code, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any], names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run all cells in one namespace, which is returned, and keep their outputs in the notebook."""
    names = {"__name__": "__main__"} if names is None else names
    for number, cell in enumerate(code_cells(notebook), 1):
        printed, value = run_cell("".join(cell["source"]), names)
        cell["execution_count"], cell["outputs"] = number, outputs(printed, value, number)
    return names


def run_cell(source: str, names: dict[str, Any]) -> tuple[str, Any]:
    """What a cell prints, and the value of its last line where that is an expression; else None."""
    body = ast.parse(source)
    last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
    value, stdout = None, io.StringIO()
    with contextlib.redirect_stdout(stdout):
        exec(compile(body, "<cell>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    return stdout.getvalue(), value


def outputs(printed: str, value: Any, number: int) -> list[dict[str, Any]]:
    """The outputs of a cell in the notebook's format."""
    found: list[dict[str, Any]] = []
    if printed:
        found.append({"name": "stdout", "output_type": "stream", "text": printed.splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        found.append(
            {"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"}
        )
    return found


def as_markdown(notebook: dict[str, Any]) -> str:
    """Text, code and outputs as one page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            text = "".join(output.get("text") or output["data"]["text/plain"])
            parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def write(notebook: dict[str, Any], path: Path) -> None:
    """Write a notebook as Jupyter does."""
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        found = read(Path(name))
        run(found)
        write(found, Path(name))
