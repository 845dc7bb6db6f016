"""The card of a pruned directory: what the hub reads from it, that it is true, and that nothing breaks out of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers.models import copy_of, opened, saved_model
from helpers.pruning import rank

from optin_cli.artefacts.pruned import read_pruned
from optin_cli.pruning.apply import apply
from optin_cli.pruning.model_card import (
    NAME,
    add_results,
    base_model,
    code,
    escaped,
    fenced,
    is_edited,
    public,
    slug,
    write_card,
)
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request


def written(folder: Path, name: str = "bert", card: str = "", output: str = "small", **request) -> Path:
    """A pruned model of a dense one with this card."""
    dense = copy_of(saved_model(name), folder / "dense")
    if card:
        (dense / NAME).write_text(card)
    model = opened(dense)
    mask = select(rank(model, folder), Request(**{"flops": 0.5, **request}))
    apply(model, mask, folder / output)
    return folder / output


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / NAME).read_text().split("---\n")[1])


def test_the_card_says_what_the_model_is(tmp_path):
    from huggingface_hub import ModelCard

    small = written(tmp_path, card="---\nlicense: apache-2.0\n---\n# Dense\n", min_heads=1)
    card = ModelCard.load(small / NAME)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.license == "apache-2.0"
    assert {"optin", "pruning", "custom_code"} <= set(card.data.tags)
    assert card.data.base_model is None  # a local directory
    record = read_pruned(small)
    assert f"{record.history[-1]['params']}"[:2] in card.text
    assert "optin select RANKING --flops 0.5 --min-heads 1 -o MASK" in card.text
    assert "trust_remote_code=True" in card.text and "optin_cli.load" in card.text
    for block in range(3):
        left = [len(record.kept[f"blocks.{block}.{kind}"]) for kind in ("heads", "neurons")]
        assert f"| {block} | {left[0]} | {left[1]} |" in card.text
    assert str(tmp_path) not in card.content  # paths of this machine
    assert not is_edited(small / NAME)


def test_the_card_of_a_uniform_model_needs_no_remote_code(tmp_path):
    small = written(tmp_path, "vit", uniform=True, flops=0.8)
    text = (small / NAME).read_text()
    assert "custom_code" not in front_matter(small)["tags"]
    assert "trust_remote_code" not in text and "--uniform" in text
    assert front_matter(small)["pipeline_tag"] == "image-classification"


@pytest.mark.parametrize(
    ("front", "stated"),
    [
        ("license: mit", {"license": "mit"}),
        (
            "license: other\nlicense_name: own\nlicense_link: LICENSE",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("license: [mit, gpl]", {}),
        ('license: "mit\\n---\\n<script>"', {}),
        ("license: {", {}),
        ("a: &a [x, x]\nb: &b [*a, *a]\nlicense: mit", {"license": "mit"}),
    ],
)
def test_the_licence_is_that_of_the_dense_models_card(tmp_path, front, stated):
    found = front_matter(written(tmp_path, card=f"---\n{front}\n---\ntext"))
    assert {key: value for key, value in found.items() if key.startswith("license")} == stated


@pytest.mark.parametrize("card", ["no front matter", "---\n", "---\n---\n", "\x00\xff"])
def test_cards_without_a_licence_are_passed_over(tmp_path, card):
    assert "license" not in front_matter(written(tmp_path, card=card))


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("org/name", "org/name"),
        ("demo:minilm", "sentence-transformers/all-MiniLM-L6-v2"),
        ("/home/me/model", None),
        ("./model", None),
        ("BertModel", None),
        ("org/name\n---", None),
    ],
)
def test_the_base_is_a_name_of_the_hub_or_none(spec, found):
    assert base_model(spec, opened(saved_model("bert"))) == found


def test_an_edited_card_stays(tmp_path, caplog):
    small = written(tmp_path)
    edited = (small / NAME).read_text().replace("## Size", "## My notes\n\n## Size")
    (small / NAME).write_text(edited)
    assert is_edited(small / NAME)
    model = opened(tmp_path / "dense")
    mask = select(rank(model, tmp_path / "dense"), 0.7)
    with caplog.at_level(logging.WARNING, "optin"):
        apply(model, mask, small)  # replaces the directory, as --force and --update do
    assert (small / NAME).read_text() == edited
    assert "was edited" in caplog.text


def test_a_card_that_nobody_edited_follows_the_model(tmp_path):
    small = written(tmp_path)
    before = (small / NAME).read_text()
    model = opened(tmp_path / "dense")
    apply(model, select(rank(model, tmp_path / "dense"), 0.7), small)
    assert (small / NAME).read_text() != before and not is_edited(small / NAME)


def test_what_was_measured_is_added(tmp_path):
    from huggingface_hub import ModelCard

    small = written(tmp_path)
    evaluation = {
        "data": {"spec": "glue/sst2"}, "examples": 872, "metrics": {"accuracy": 91.5},
        "baseline_metrics": {"accuracy": 92.0}, "task": "sequence-classification",
    }  # fmt: skip
    timing = {
        "batch_size": 8, "size": 64, "dense_ms": 10.0, "ms": 5.0, "speedup": 2.0, "device": "cpu", "threads": 2,
        "dtype": "float32",
    }  # fmt: skip
    for _ in range(2):  # a second time replaces the first
        add_results(small, evaluation, [timing])
    card = ModelCard.load(small / NAME)
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("glue/sst2", "accuracy", 91.5)
    assert result.task_type == "text-classification"
    assert card.text.count("## Measured") == 1
    assert "| accuracy | 92.00 | 91.50 |" in card.text and "| 8 | 64 | 10.00 | 5.00 | 2.00 |" in card.text
    assert not is_edited(small / NAME)
    (small / NAME).write_text("mine")
    add_results(small, evaluation, [])
    assert (small / NAME).read_text() == "mine"


HOSTILE = "a`b\n---\n<script>alert(1)</script> [x](http://y) | ```` \x1b[31m"


def test_hostile_names_stay_text(tmp_path):
    model = opened(saved_model("bert"))
    mask = select(rank(model, tmp_path), 0.5)
    out = tmp_path / "out"
    apply(model, mask, out)
    record = read_pruned(out)
    record.dense["id"] = HOSTILE
    record.history[-1]["compensation"] = {"method": "auto", "rows": 3, "data": {"spec": HOSTILE}}
    record.history[-1]["versions"] = {HOSTILE: HOSTILE}
    (out / NAME).unlink()
    write_card(out, replace(opened(out)), record, tmp_path / "name | <b>")
    text = (out / NAME).read_text()
    assert "\x1b" not in text and "<script>" not in text.replace("```", "").split("## How")[0]
    assert text.count("\n---\n") == 1  # the end of the front matter
    assert front_matter(out)["tags"][0] == "optin"
    fences = [line for line in text.splitlines() if line.startswith("```")]
    assert len(fences) % 2 == 0


def test_texts_are_escaped():
    assert escaped("a|b <i> *x* [l](u)\nc") == r"a\|b &lt;i&gt; \*x\* \[l\]\(u\) c"
    assert code("a`b\nc") == "a'b c"
    assert fenced("sh", ["echo ````"])[0] == "`````sh"
    assert slug("my data/x y!") == "my-data/x-y"


@pytest.mark.parametrize(
    ("spec", "shown"),
    [
        ("glue/sst2", "glue/sst2"),
        ("/home/me/secret/x.csv", "x.csv"),
        ("./x.csv", "x.csv"),
        ("builtin:docs", "builtin:docs"),
    ],
)
def test_of_local_paths_the_name_is_shown(spec, shown):
    assert public(spec) == shown
