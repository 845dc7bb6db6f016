"""Write the tables of fields in anatomy.md from the classes: `python docs/field_tables.py`.

A row has a field's name, what it holds and its docstring. tests/structure/test_fields.py fails where page and classes
differ.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from textwrap import dedent

from optin_cli.architectures.schema import Family, SiteTable, StreamTable, TokenTable
from optin_cli.structure.anatomy import Bypass, Producer, Ranks, RelativePositions, UnitInput
from optin_cli.structure.fields import described, is_required, kind_of

PAGE = Path(__file__).parent / "anatomy.md"
CLASSES = (Family, SiteTable, Producer, UnitInput, RelativePositions, Bypass, Ranks, StreamTable, TokenTable)
_TABLE = re.compile(r"(<!-- fields of (\w+) -->\n\n).*?(?=\n\n<!-- end -->)", re.DOTALL)


def docstrings(cls: type) -> dict[str, str]:
    """Field -> the docstring below it, on one line."""
    body = ast.parse(dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            found[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


def field_table(cls: type) -> str:
    """The fields of a class as a Markdown table."""
    meaning = docstrings(cls)
    rows = ["| field | is | meaning |", "|---|---|---|"]
    for one in described(cls):
        needed = "; needed" if is_required(one) else ""
        rows.append(f"| `{one.name}` | {kind_of(one).words}{needed} | {meaning[one.name]} |")
    return "\n".join(rows)


def with_tables(page: str) -> str:
    """The page with every table between its two comments written anew."""
    tables = {cls.__name__: field_table(cls) for cls in CLASSES}
    return _TABLE.sub(lambda found: found[1] + tables[found[2]], page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
