"""`modeling_optin.py` as a careful user meets it."""

from __future__ import annotations

import ast

import pytest

from optin_cli.loading.standalone_file import code_for

PARTS = {
    "empty": "EmptyConv2d", "bypass": "bypass", "without heads": "attend_without_heads",
    "selects": "select_unit_input", "merging": "merge_tokens",
}  # fmt: skip
THIRD = {"torch", "transformers", "safetensors"}


def names_of(library: str, hows: list[str]) -> tuple[set[str], set[str], str]:
    """(what the file defines, the packages it imports beside the standard library, its text)."""
    import sys

    runs = {"block": [{"how": how} for how in hows if how != "merging"]}
    text = code_for(
        library, {"sizes": {}, "runs": runs, "merging": {} if "merging" not in hows else {"counts": [1]}}
    )
    tree = ast.parse(text)
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level
            imported.add(node.module.partition(".")[0])
    return defined, imported - sys.stdlib_module_names, text


@pytest.mark.parametrize("library", ["transformers", "timm", "torchvision"])
def test_it_needs_no_more_than_its_library_and_is_read_in_one_sitting(library):
    defined, imported, text = names_of(library, [])
    assert {"load", "resize", "check_sizes"} <= defined and imported <= THIRD
    assert ("OptinConfig" in defined) == (library == "transformers")
    assert not defined & set(PARTS.values())
    assert len(text.splitlines()) < 270


@pytest.mark.parametrize("how", PARTS)
def test_it_has_the_parts_that_the_model_needs(how):
    defined, imported, _ = names_of("transformers", [how])
    assert PARTS[how] in defined and imported <= THIRD
    assert len(defined & set(PARTS.values())) <= 2


def test_all_parts_together_define_every_name_once():
    _, _, text = names_of("transformers", list(PARTS))
    names = [n.name for n in ast.parse(text).body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    assert len(names) == len(set(names))
    assert text.count("\nfrom __future__") == 1
