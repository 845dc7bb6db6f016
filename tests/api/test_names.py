"""The names that the library gives: complete, documented, with examples that run, and light to import."""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import optin_cli as optin
from optin_cli.architectures import families
from optin_cli.pruning import writers
from optin_cli.scoring.methods import registry
from optin_cli.selection import budgets

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name for name in optin.__all__ if name != "__version__"]
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(optin, name))]
# in the order of a run: what one example makes, the next ones use
RUN = [
    "open_model",
    "score",
    "select",
    "apply",
    "prune",
    "evaluate",
    "bench",
    "bench_generation",
    "latency_table",
    "sweep",
    "pick",
    "report",
    "save",
    "vocab",
]


def test_every_name_is_exported_once_and_there():
    assert set(NAMES) == set(optin._HOME_OF)
    assert len(set(optin.__all__)) == len(optin.__all__)
    assert set(optin.__all__) <= set(dir(optin))
    with pytest.raises(AttributeError):
        _ = optin.no_such_name


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_in_the_docs(name):
    assert re.search(rf"^#+ `{name}\b", (ROOT / "docs/api.md").read_text(), re.MULTILINE)


def test_the_docs_have_no_other_names():
    found = re.findall(r"^### `(\w+)", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(found) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_says_what_it_is(name):
    assert inspect.getdoc(getattr(optin, name))


@pytest.mark.parametrize("name", RUN)
def test_every_option_is_described_and_typed(name):
    function = getattr(optin, name)
    described = function.__doc__.partition("Args:")[2].partition("Returns:")[0]
    for option, parameter in inspect.signature(function).parameters.items():
        assert re.search(rf"^ +(\w+, )*{option}(,|:)", described, re.MULTILINE) or re.search(
            rf"\b{option}\b[^:]*:", described
        ), option
        assert parameter.annotation is not inspect.Parameter.empty


def test_the_examples_of_all_docstrings_run(bert, tokenizer, batches, tmp_path):
    globs = {"optin": optin, "torch": torch, "bert": bert, "tokenizer": tokenizer, "batches": batches}
    globs["folder"] = tmp_path
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    with_rankings = [*RUN, *(name for name in FUNCTIONS if name.startswith("write_"))]
    registries = (
        dict(families._REGISTRY),
        dict(writers._WRITERS),
        dict(registry.METHODS),
        dict(budgets._KINDS),
    )
    try:
        for name in dict.fromkeys([*with_rankings, *FUNCTIONS]):
            function = getattr(optin, name)
            parsed = doctest.DocTestParser().get_doctest(function.__doc__, globs, name, None, None)
            assert parsed.examples, f"{name} has no example"
            parsed.globs = globs
            runner.run(parsed, clear_globs=False)
    finally:
        families._REGISTRY.clear()
        families._REGISTRY.update(registries[0])
        writers._WRITERS.clear()
        writers._WRITERS.update(registries[1])
        registry.METHODS.clear()
        registry.METHODS.update(registries[2])
        budgets._KINDS.clear()
        budgets._KINDS.update(registries[3])
    assert runner.failures == 0


def test_the_examples_of_the_package_name_what_there_is():
    named = re.findall(r"optin\.(\w+)\(", optin.__doc__)
    assert named and set(named) <= set(NAMES)


def test_importing_is_light_and_silent():
    script = (
        "import sys, optin_cli\n"
        "optin_cli.OptinError, optin_cli.read_mask, optin_cli.Family\n"
        "heavy = {'torch', 'transformers', 'timm', 'datasets', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
