"""Text to text: which columns are source and target, padding apart, perplexity of targets."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.data import sentences, tiny_text_csv
from helpers.models import opened, saved_model, shared_model
from torch.nn import functional as F

from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.measure.evaluate import evaluate
from optin_cli.scoring.calibration import Calibration
from optin_cli.scoring.labels import read_labels
from optin_cli.scoring.methods.fisher import fisher


def batches_of(model, spec: DataSpec, size: int = 4) -> Batches:
    examples = sample(spec, "text", None, 0, reader=model.task.reader)
    return Batches(examples, model.processor, size, reader=model.task.reader)


@pytest.fixture
def pairs(tmp_path):
    return DataSpec(str(tiny_text_csv(tmp_path, rows=10)))


COLUMNS = {
    "a usual name": ("text,summary,label", {}, ("text", "summary")),
    "told": ("a,b,c", {"text": ("b",), "label": "a"}, ("b", "a")),
    "two texts": ("x,y,summary", {"text": ("x", "y")}, ("x", "y")),
    "a pair": ("sentence1,sentence2,label", {}, ("sentence1", "sentence2")),
    "the text itself": ("text", {}, ("text",)),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_source_and_target_are_found(case, tmp_path):
    header, options, expected = COLUMNS[case]
    path = tmp_path / "data.csv"
    cells = [",".join(f"{word} cat" for word in header.split(",")) for _ in range(3)]
    path.write_text("\n".join([header, *cells]) + "\n")
    model = shared_model("t5")
    examples = sample(DataSpec(str(path), **options), "text", None, 0, reader=model.task.reader)
    assert (examples.columns.text, examples.columns.label) == (expected, None)


def test_a_decoder_reads_its_target_shifted_and_padded_by_itself(pairs):
    model = shared_model("t5")
    batches = batches_of(model, pairs)
    tokenizer = model.processor.tokenizer
    rows = batches.examples.rows
    for batch in batches:
        assert set(batch.inputs) >= {"input_ids", "decoder_input_ids", "decoder_attention_mask"}
        for row, example in enumerate(batch.example_ids):
            target = tokenizer(rows["sentence2"][example])["input_ids"]
            given = batch.inputs["decoder_input_ids"][row][batch.inputs["decoder_attention_mask"][row].bool()]
            assert given.tolist() == [0, *target[:-1]]
            assert batches.encoded.details[example] == target
    assert model.task.name == "text-to-text"


def test_perplexity_is_that_of_the_targets(pairs):
    model = shared_model("t5")
    batches = batches_of(model, pairs)
    nats, right, count = 0.0, 0, 0
    for row, target in zip(batches.encoded.inputs, batches.encoded.details, strict=True):
        for stop in range(len(target)):  # token by token, by itself
            ids = torch.tensor([[0, *target[:stop]]])
            with torch.no_grad():
                logits = model.module(
                    input_ids=torch.tensor([row["input_ids"]]), decoder_input_ids=ids
                ).logits[0, -1]
            nats -= float(F.log_softmax(logits.double(), -1)[target[stop]])
            right += int(logits.argmax() == target[stop])
            count += 1
    found = evaluate(model, batches, model)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found.metrics["accuracy"] == pytest.approx(100 * right / count)
    assert (found.drop, found.fidelity["agreement"]) == (0, 100)


def test_fisher_learns_from_the_targets(pairs):
    model = opened(saved_model("t5"))
    batches = batches_of(model, pairs)
    calibration = Calibration(model, batches, 24, 4.0, seed=0)
    found = fisher(calibration, 0, list(model.anatomy), read_labels(model, batches, "fisher"))
    assert all((found.output[site.name] > 0).any() for site in model.anatomy)


def test_a_text_without_a_target_is_its_own(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(sentences(4)) + "\n")
    batches = batches_of(shared_model("t5"), DataSpec(str(path)))
    assert [row["input_ids"] for row in batches.encoded.inputs] == batches.encoded.details
