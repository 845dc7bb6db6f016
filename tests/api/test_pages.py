"""What README, quickstart and the other pages show runs as it is written, on a tiny model in place of MiniLM."""

from __future__ import annotations

import shlex

import pytest
import torch
from helpers.cli import run
from helpers.models import saved_model
from helpers.pages import DOCS, PAGES_THAT_RUN, blocks, commands_in, pages, script

import optin_cli as optin

DEMO = "demo:minilm"
# the same work, done sooner
SOONER = {
    "score": ["--samples", 64],
    "prune": ["--samples", 64, "--compensate-samples", 64],
    "apply": ["--samples", 64],
    "eval": ["--samples", 64],
    "bench": ["--seconds", 0, "--repeats", 1],
}
# models and data that a reader has and this machine has not
ABSENT = ("./", "reviews/", "glue/", "timm:", "torchvision:", "my-", "MODEL")


@pytest.fixture
def names(bert, tokenizer, batches):
    """What the pages take as given."""
    return {
        "torch": torch,
        "bert": bert.eval(),
        "tokenizer": tokenizer,
        "loader": batches,
        "__name__": "page",
    }


def run_page(text: str, names: dict) -> list[str]:
    """Run the commands and Python of a page in order, in the current folder; returns what was run."""
    tiny = str(saved_model("bert", "encoder"))
    done = []
    for language, code in blocks(text):
        if language == "python":
            exec(compile(code.replace(DEMO, tiny), "<page>", "exec"), names)
            done.append("python")
        for line in commands_in(code) if language in ("", "sh") else []:
            if not any(word in line for word in ABSENT):
                command, *rest = shlex.split(line.replace(DEMO, tiny))
                run(command, *rest, *SOONER.get(command, []))
                done.append(command)
    return done


LONG = ("docs/quickstart.md", "docs/api.md")


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in LONG)) for page in PAGES_THAT_RUN]
)
def test_a_page_runs_as_it_is_written(page, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prune = optin.prune

    def sooner(*args, **options):
        return prune(*args, **{"samples": 64, "compensate_samples": 64, **options})

    monkeypatch.setattr(optin, "prune", sooner)
    done = run_page(pages()[page], names)
    assert done.count("python") >= 1
    if page in ("README.md", "docs/quickstart.md"):
        assert {"prune", "eval", "bench"} <= set(done)


@pytest.mark.slow
def test_the_tutorial_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebooks = script("notebooks")
    notebook = notebooks.read(DOCS / "tutorial.ipynb")
    stored = [cell["outputs"] for cell in notebooks.code_cells(notebook)]
    for cell in notebooks.code_cells(notebook):
        source = "".join(cell["source"]).replace(DEMO, str(saved_model("bert", "encoder")))
        cell["source"] = source.replace("seconds=1", "seconds=0, repeats=1").splitlines(keepends=True)
    names = notebooks.run(notebook)
    assert names["small"].report.params < names["small"].report.dense_params
    made = [cell["outputs"] for cell in notebooks.code_cells(notebook)]
    # the file has been run: outputs of the same kinds are in it
    assert [[o["output_type"] for o in cell] for cell in made] == [
        [o["output_type"] for o in cell] for cell in stored
    ]
    assert "same as the masked model: True" in str(made)
