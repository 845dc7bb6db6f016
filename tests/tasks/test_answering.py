"""Question answering against windows cut by hand, brute force over spans, and SQuAD's own definitions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import WORDS
from helpers.families import MAX_LENGTH
from helpers.models import shared_model

from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError
from optin_cli.measure.evaluate import evaluate
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.tasks.metrics import squad


def asked(rows: int = 12, words: tuple[int, int] = (20, 120), without: int = 0) -> list[dict]:
    """Questions on contexts of which most need several windows; every `without`-th has no answer."""
    rng = np.random.default_rng(0)
    found = []
    for row in range(rows):
        context = list(rng.choice(WORDS, rng.integers(*words)))
        first = int(rng.integers(0, len(context) - 3))
        answers = [
            {"text": " ".join(context[i : i + 3]), "answer_start": len(" ".join([*context[:i], ""]))}
            for i in (first, max(0, first - 1))
        ]
        impossible = bool(without) and row % without == 0
        question = " ".join(rng.choice(WORDS, rng.integers(2, 8)))
        found.append(
            {
                "id": str(row), "question": question, "context": " ".join(context),
                "answers": [] if impossible else answers, "is_impossible": impossible,
            }
        )  # fmt: skip
    return found


def squad_file(folder: Path, rows: list[dict]) -> Path:
    """One paragraph for each question."""
    path = folder / "dev-v2.0.json"
    articles = [
        {"title": "T", "paragraphs": [{"context": row["context"], "qas": [{**row, "context": None}]}]}
        for row in rows
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return path


def batches_of(model, path: Path, **options) -> Batches:
    examples = sample(DataSpec(str(path)), "text", None, 0, reader=model.task.reader)
    return Batches(examples, model.processor, 5, reader=model.task.reader, **options)


def windows(model, row: dict, limit: int = MAX_LENGTH) -> list[tuple[list[int], list[int]]]:
    """(token ids, position in the context of each of its tokens) of each window, by hand."""
    tokenizer = model.processor.tokenizer
    question, context = (
        tokenizer(row[k], add_special_tokens=False)["input_ids"] for k in ("question", "context")
    )
    room = limit - len(question) - 3
    step, found, start = room - min(128, room // 2), [], 0
    while True:
        part = context[start : start + room]
        ids = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id, *part, tokenizer.sep_token_id]
        found.append((ids, list(range(start, start + len(part)))))
        if start + room >= len(context):
            return found
        start += step


@torch.no_grad()
def logits(model, ids: list[int], question: int) -> tuple[np.ndarray, np.ndarray]:
    inputs = {"input_ids": torch.tensor([ids])}
    if "token_type_ids" in model.processor.tokenizer.model_input_names:
        inputs["token_type_ids"] = torch.tensor([[int(i >= question + 2) for i in range(len(ids))]])
    result = model.module(**inputs)
    return result.start_logits[0].numpy(), result.end_logits[0].numpy()


def predicted(model, row: dict, may_be_silent: bool) -> str:
    """The best answer by brute force over all windows and spans."""
    tokenizer = model.processor.tokenizer
    question = len(tokenizer(row["question"], add_special_tokens=False)["input_ids"])
    offsets = tokenizer(row["context"], add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    best, silence = (-np.inf, 0, 0), np.inf
    for ids, places in windows(model, row):
        start, end = logits(model, ids, question)
        silence = min(silence, float(start[0] + end[0]))
        for i in range(len(places)):
            for j in range(i, min(i + 30, len(places))):
                score = float(start[question + 2 + i] + end[question + 2 + j])
                best = max(best, (score, offsets[places[i]][0], offsets[places[j]][1]))
    return "" if may_be_silent and silence > best[0] else row["context"][best[1] : best[2]]


def official_f1(guess: str, gold: str) -> float:
    def words(text):
        kept = "".join(c for c in text.lower() if c.isalnum() or c.isspace()).split()
        return [w for w in kept if w not in ("a", "an", "the")]

    one, two = words(guess), words(gold)
    common = sum(min(one.count(w), two.count(w)) for w in set(one))
    if not one or not two:
        return float(one == two)
    return 2 * common / (len(one) + len(two))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_windows_are_those_cut_by_hand(tmp_path, name):
    model, rows = shared_model(name, "reader"), asked()
    batches = batches_of(model, squad_file(tmp_path, rows))
    expected = [ids for row in rows for ids, _ in windows(model, row)]
    assert [inputs["input_ids"] for inputs in batches.encoded.inputs] == expected
    assert batches.count == len(expected) > len(rows)
    assert batches.rows == [i for i, row in enumerate(rows) for _ in windows(model, row)]


def test_a_long_question_leaves_half_of_a_window(tmp_path):
    model = shared_model("bert", "reader")
    [row] = asked(1)
    row["question"] = " ".join(WORDS * 5)
    batches = batches_of(model, squad_file(tmp_path, [row]))
    assert max(len(inputs["input_ids"]) for inputs in batches.encoded.inputs) == MAX_LENGTH
    shown = {tuple(pair) for window in batches.encoded.details for pair in window.offsets.tolist()} - {
        (-1, -1)
    }
    tokens = model.processor.tokenizer(row["context"], add_special_tokens=False, return_offsets_mapping=True)
    assert shown == set(map(tuple, tokens["offset_mapping"]))


@pytest.mark.parametrize("without", [0, 3])
def test_metrics_are_squads_on_brute_forced_spans(tmp_path, without):
    model, rows = shared_model("bert", "reader"), asked(without=without)
    result = evaluate(model, batches_of(model, squad_file(tmp_path, rows)), model)
    guesses = [predicted(model, row, without > 0) for row in rows]
    golds = [[a["text"] for a in row["answers"]] or [""] for row in rows]
    f1 = [max(official_f1(guess, g) for g in gold) for guess, gold in zip(guesses, golds, strict=True)]
    exact = [
        max(f1 == 1 and len(guess) == len(g) for g in gold)
        for guess, gold, f1 in zip(guesses, golds, f1, strict=True)
    ]
    assert 0 < np.mean(f1) < 1
    assert result.metrics["f1"] == pytest.approx(100 * np.mean(f1))
    assert result.metrics["exact_match"] == pytest.approx(100 * np.mean(exact))
    assert (result.main, result.drop) == ("f1", 0)


def test_the_hubs_columns_are_the_same_data(tmp_path):
    """Answers as lists of both in Parquet, and as pairs in JSON lines."""
    model, rows = shared_model("bert", "reader"), asked(without=3)
    table = batches_of(model, squad_file(tmp_path, rows)).examples.rows
    table.to_parquet(tmp_path / "validation.parquet")
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        evaluate(model, batches_of(model, tmp_path / name)).metrics
        for name in ("dev-v2.0.json", "validation.parquet", "rows.jsonl")
    ]
    assert found[0] == found[1] == found[2]


def test_squad_normalises():
    assert squad(["The  Cat!"], [["a cat"]]) == {"exact_match": 100, "f1": 100}
    assert squad(["a red cat", ""], [["red cat", "dog"], []]) == {"exact_match": 100, "f1": 100}
    assert squad(["red dog"], [["red cat", "blue"]]) == {"exact_match": 0, "f1": 50}
    assert squad(["", "cat"], [["cat"], []]) == {"exact_match": 0, "f1": 0}


def test_targets_are_the_tokens_of_the_first_answer(tmp_path):
    model, rows = shared_model("bert", "reader"), asked(without=4)
    batches = batches_of(model, squad_file(tmp_path, rows))
    targets = model.task.targets(batches)
    answered = set()
    for row, inputs, (first, last) in zip(batches.rows, batches.encoded.inputs, targets, strict=True):
        if (first, last) == (0, 0):
            continue
        words = model.processor.tokenizer.decode(inputs["input_ids"][first : last + 1])
        assert words.replace(" ##", "") == rows[row]["answers"][0]["text"]
        answered.add(row)
    assert answered == {i for i in range(len(rows)) if i % 4}
    assert targets.count((0, 0)) > 3


def test_the_loss_is_transformers_own(tmp_path):
    model = shared_model("bert", "reader")
    batches = batches_of(model, squad_file(tmp_path, asked()))
    targets = model.task.targets(batches)
    for batch in batches:
        for place, example in enumerate(batch.example_ids):
            length = int(batch.valid[place].sum())
            inputs = {key: value[place : place + 1, :length] for key, value in batch.inputs.items()}
            first, last = (torch.tensor([token]) for token in targets[example])
            with torch.no_grad():
                expected = model.module(**inputs, start_positions=first, end_positions=last).loss
                found = model.task.loss(model.output(inputs), [targets[example]])
            torch.testing.assert_close(found[0], expected)


def test_windows_are_the_examples_that_scores_are_made_on(tmp_path):
    path = squad_file(tmp_path, asked())
    plan = make_plan(
        shared_model("bert", "reader"), DataSpec(str(path)), ScoreSettings(method="fisher", samples=4)
    )
    assert len(plan.examples.row_ids) == 4
    assert plan.calibration.batches.count == len(plan.labels) > 4


def test_answers_of_another_kind(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"question": "a cat", "context": "the dog", "answers": "dog"}))
    model = shared_model("bert", "reader")
    with pytest.raises(InputError, match="where answers are needed"):
        evaluate(model, batches_of(model, path))


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "dev.json"
    path.write_text('{"data": [{"paragraphs": [{"context": "a"}]}]}')
    with pytest.raises(InputError, match="SQuAD's layout"):
        batches_of(shared_model("bert", "reader"), path)
