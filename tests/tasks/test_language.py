"""Language modelling: windows of running text, perplexity against its definition, and logits that are few."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.data import WORDS, sentences
from helpers.models import opened, saved_model, shared_model, tiny_model
from helpers.runs import random_inputs
from torch.nn import functional as F

from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.readers import RUNNING_TEXT
from optin_cli.data.sources import DataSpec
from optin_cli.errors import GateError
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.measure import evaluate as measuring
from optin_cli.measure.evaluate import evaluate, gate
from optin_cli.scoring.calibration import Calibration
from optin_cli.scoring.labels import read_labels
from optin_cli.scoring.methods.fisher import fisher
from optin_cli.tasks.language import LanguageModeling, spaced
from optin_cli.transforms.masking import masked


def text_file(folder, lines: int = 40, name: str = "text.txt"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("\n".join(sentences(lines)) + "\n")
    return path


def batches_of(
    model: OpenModel, path, max_length: int | None = 20, samples: int | None = None, size: int = 4
):
    examples = sample(DataSpec(str(path)), "text", samples, 0, reader=model.task.reader)
    return Batches(examples, model.processor, size, max_length=max_length, reader=model.task.reader)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_causal_model_is_a_language_model_unless_told_otherwise(name):
    assert opened(saved_model(name)).task.name == "language-modeling"
    bare = opened(saved_model(name), task="embedding")
    assert bare.task.name == "embedding"
    assert bare.anatomy.sites[0].units == 4


def test_windows_hold_the_whole_text_in_order(tmp_path):
    model = shared_model("gpt2")
    path = text_file(tmp_path)
    batches = batches_of(model, path, max_length=20)
    windows = [row["input_ids"] for row in batches.encoded.inputs]
    whole = model.processor.tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    assert batches.count == math.ceil(len(whole) / 20)
    assert {len(window) for window in windows} == {len(whole) // batches.count}
    assert [token for window in windows for token in window] == whole[
        : len(whole) // batches.count * batches.count
    ]


def test_a_window_begins_as_the_tokenizer_begins_a_text(tmp_path):
    model = shared_model("gpt2")
    processor = model.processor
    processor_with_bos = type(processor)(_Beginning(processor.tokenizer), processor.max_length)
    windows = processor_with_bos.running_text(["the cat runs\n", "a dog\n"], 4)
    ids = processor.tokenizer("the cat runs a dog", add_special_tokens=False)["input_ids"]
    assert [row["input_ids"] for row in windows] == [[7, *ids[:2]], [7, *ids[2:4]]]


class _Beginning:
    """A tokenizer that puts token 7 in front of a text."""

    bos_token_id = 7

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts, add_special_tokens=True, **options):
        found = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return {"input_ids": [7, *found] if add_special_tokens else found}


def by_hand(model: OpenModel, windows: list[list[int]]) -> tuple[float, float]:
    """(perplexity, accuracy) token by token, each from the tokens before it alone."""
    nats, right, count = 0.0, 0, 0
    with torch.no_grad():
        for window in windows:
            for stop in range(1, len(window)):
                logits = model.module(input_ids=torch.tensor([window[:stop]])).logits[0, -1]
                nats -= float(F.log_softmax(logits.double(), -1)[window[stop]])
                right += int(logits.argmax() == window[stop])
                count += 1
    return math.exp(nats / count), 100 * right / count


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_perplexity_is_that_of_every_token_after_those_before_it(name, tmp_path):
    model = shared_model(name)
    batches = batches_of(model, text_file(tmp_path, 12), max_length=20)
    perplexity, accuracy = by_hand(model, [row["input_ids"] for row in batches.encoded.inputs])
    found = evaluate(model, batches)
    assert found.main == "perplexity"
    assert found.metrics["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert found.metrics["accuracy"] == pytest.approx(accuracy)


def test_measuring_in_pieces_changes_nothing(tmp_path, monkeypatch):
    model, baseline = shared_model("gpt2"), opened(tiny_model("gpt2", tmp_path / "other", seed=1))
    batches = batches_of(model, text_file(tmp_path, 20), max_length=16)
    whole = evaluate(model, batches, baseline)
    monkeypatch.setattr(LanguageModeling, "slots", 16)
    seen = []
    forward = measuring._forward
    monkeypatch.setattr(
        measuring,
        "_forward",
        lambda model, piece, *how: seen.append(len(piece)) or forward(model, piece, *how),
    )
    pieces = evaluate(model, batches, baseline)
    assert set(seen) == {1}
    assert pieces.metrics == pytest.approx(whole.metrics, rel=1e-6)
    assert pieces.fidelity == pytest.approx(whole.fidelity, rel=1e-5)


def test_a_drop_of_perplexity_is_its_rise_in_per_cent(tmp_path):
    model, baseline = shared_model("gpt2"), opened(tiny_model("gpt2", tmp_path / "other", seed=1))
    found = evaluate(model, batches_of(model, text_file(tmp_path)), baseline)
    ratio = found.metrics["perplexity"] / found.baseline_metrics["perplexity"]
    assert found.drop == pytest.approx(100 * (ratio - 1))
    gate(found, found.drop + 0.1)
    with pytest.raises(GateError, match=r"perplexity rises by .* per cent"):
        gate(found, found.drop - 0.1)


def test_scores_compare_the_logits_of_a_few_tokens():
    model = shared_model("llama")
    inputs = random_inputs(model, tokens=50)
    with torch.no_grad():
        some, every = model.output(inputs), model.full_output(inputs)
    assert some.shape == (3, 16, 80)
    assert every.shape == (3, 50, 80)
    torch.testing.assert_close(some, every[:, spaced(50)])
    assert torch.equal(model.task.row_weights(inputs), inputs["attention_mask"][:, spaced(50)].float())
    assert torch.equal(spaced(9), torch.arange(9))


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "gpt-neox", "opt", "t5", "bart"])
def test_the_head_computes_the_logits_that_are_compared_alone(name):
    """Whatever the arguments of the model's forward: encoder-decoders know no `logits_to_keep`."""
    model = shared_model(name)
    inputs, given = random_inputs(model, tokens=50), []
    layer = model.module.get_output_embeddings()
    with torch.no_grad():
        every = model.full_output(inputs)
        handle = layer.register_forward_hook(lambda _, __, output: given.append(output.shape[1]))
        some = model.output(inputs)
    handle.remove()
    assert given == [16]
    assert not layer._forward_pre_hooks
    rows = spaced(50) if len(model.anatomy.streams) == 1 else torch.arange(16)
    torch.testing.assert_close(some, every[:, rows])


def test_fisher_is_the_squared_gradient_of_the_loss(tmp_path):
    """Oracle: finite differences of a window's own mean negative log likelihood."""
    model = shared_model("gpt2")
    batches = batches_of(model, text_file(tmp_path, 6), max_length=12)
    labels = read_labels(model, batches, "fisher")
    calibration = Calibration(model, batches, 24, 4.0, seed=0)
    site = model.anatomy["blocks.1.heads"]
    found = fisher(calibration, 0, [site], labels)
    batch = calibration.batch(0)
    longest = batch.inputs["input_ids"].shape[1]

    def loss(mask: torch.Tensor) -> np.ndarray:
        with torch.no_grad(), masked(model.module, model.anatomy, {site.name: mask}):
            logits = model.module(**batch.inputs).logits.double()
        losses = []
        for row, example in zip(logits, batch.example_ids, strict=True):
            ids = labels[example]
            nats = [-F.log_softmax(row[i], -1)[ids[i]] for i in spaced(longest) if i < len(ids)]
            losses.append(float(torch.stack(nats).mean()))
        return np.array(losses)

    model.module.double()
    try:
        for unit in range(site.units):
            step = torch.zeros(site.units)
            step[unit] = 1e-4
            slope = (loss(1 + step) - loss(1 - step)) / 2e-4
            assert found.output[site.name][unit] == pytest.approx((slope**2).mean(), rel=2e-2)
    finally:
        model.module.float()


def test_one_text_column_is_read_and_the_label_ignored(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("title,text,label\n" + "".join(f"{w},{w} {w},1\n" for w in WORDS[:4]))
    examples = sample(DataSpec(str(path)), "text", None, 0, reader=RUNNING_TEXT)
    assert (examples.columns.text, examples.columns.label) == (("text",), None)


def test_a_folder_of_text_files_is_read_by_split(tmp_path):
    text_file(tmp_path, 5, "train.txt")
    text_file(tmp_path, 7, "test.txt")
    (tmp_path / "README.txt").write_text("no data\n")
    for split, rows in (("train", 5), ("test", 7)):
        assert sample(DataSpec(str(tmp_path), split), "text", None, 0, reader=RUNNING_TEXT).total == rows
