"""What evaluation refuses, and the gate on its result."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from helpers.data import sentences, tiny_text_csv
from helpers.evaluation import batches, json_lines, labelled, other_model, special_model, tagged
from helpers.models import shared_model

from optin_cli.errors import GateError, InputError, UsageError
from optin_cli.measure.evaluate import Evaluation, evaluate, gate


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([-1] * 8, r"8 of 8 labels .* hidden \(-1\)"),
        ([0, 1, -1, 1], r"1 of 4 labels .* hidden"),
        ([0, 1, 2, 1], r"label 2, but the model has classes 0..1"),
        ([0, 1, -7, 1], "label -7, but the model has classes"),
        ([0, 1, -100, 1], "label -100, but the model has classes"),
        ([0.5, 1.0], r"label 0\.5, but the model has classes"),
    ],
)
def test_class_labels_that_do_not_fit(tmp_path, labels, message):
    model = shared_model("bert")
    with pytest.raises(InputError, match=message):
        evaluate(model, batches(model, labelled(tmp_path, labels)))


@pytest.mark.parametrize("label", [None, [1, 0], {"a": 1}])
def test_labels_of_another_kind(tmp_path, label):
    model = shared_model("bert")
    rows = [{"sentence": s, "label": label} for s in sentences(4)]
    with pytest.raises(InputError, match="where a number is needed"):
        evaluate(model, batches(model, json_lines(tmp_path, rows)))


def test_labels_of_unknown_names(tmp_path):
    model = shared_model("bert")
    with pytest.raises(InputError, match="'maybe'"):
        evaluate(model, batches(model, labelled(tmp_path, ["maybe", "no"])))


def test_a_tagger_needs_words(tmp_path):
    model = shared_model("bert", "tagger")
    with pytest.raises(InputError, match="one label for each word"):
        evaluate(model, batches(model, labelled(tmp_path, [0, 1])))


def test_tags_out_of_range_and_hidden(tmp_path):
    model = shared_model("bert", "tagger")
    with pytest.raises(InputError, match=r"label 2, but the model has classes 0\.\.1"):
        evaluate(model, batches(model, tagged(tmp_path, classes=3)))
    rows = [{"tokens": ["a", "cat"], "tags": [-1, -1]}]
    with pytest.raises(InputError, match="hidden"):
        evaluate(model, batches(model, json_lines(tmp_path, rows)))


def test_hidden_and_constant_scores(tmp_path):
    model = special_model(num_labels=1)
    with pytest.raises(InputError, match="hidden"):
        evaluate(model, batches(model, labelled(tmp_path, [-1.0] * 5)))
    with pytest.raises(InputError, match="equal"):
        evaluate(model, batches(model, labelled(tmp_path, [2.5] * 5)))


def test_one_score_of_minus_one_is_a_score(tmp_path):
    model = special_model(num_labels=1)
    assert evaluate(model, batches(model, labelled(tmp_path, [-1.0, 0.5, 1.0]))).main == "spearman"


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("as_baseline", [False, True])
def test_outputs_that_are_not_finite(tmp_path, broken, as_baseline):
    model = shared_model("bert")
    module = copy.deepcopy(model.module)
    module.classifier.bias.data[0] = broken
    bad = dataclasses.replace(model, module=module)
    pair = (model, bad) if as_baseline else (bad, model)
    with pytest.raises(InputError, match="not finite for 8 of 8 examples"):
        evaluate(pair[0], batches(model, tiny_text_csv(tmp_path)), pair[1])


def test_nothing_to_measure(tmp_path):
    model = shared_model("bert")
    with pytest.raises(UsageError, match="nothing to measure"):
        evaluate(model, batches(model, tiny_text_csv(tmp_path, labels=None)))


def test_a_baseline_for_another_task_or_of_another_shape(tmp_path):
    model = shared_model("bert")
    data = batches(model, tiny_text_csv(tmp_path))
    with pytest.raises(UsageError, match=r"does sequence-classification, but the baseline .* does embedding"):
        evaluate(model, data, shared_model("bert", "encoder"))
    with pytest.raises(UsageError, match=r"shape \(1, 2\), but the baseline .* \(1, 3\)"):
        evaluate(model, data, special_model(num_labels=3))


class BrokenPadding(torch.nn.Module):
    """A tagger that gives NaN for padding, which nobody reads."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.config = module.config

    def forward(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> Any:
        result = self.module(attention_mask=attention_mask, **inputs)
        result.logits = result.logits.masked_fill(attention_mask[..., None] == 0, float("nan"))
        return result


def test_padding_is_not_looked_at(tmp_path):
    model, baseline = shared_model("bert", "tagger"), other_model("bert", "tagger")
    broken = dataclasses.replace(model, module=BrokenPadding(model.module))
    data = batches(model, tagged(tmp_path))
    assert evaluate(broken, data, baseline) == evaluate(model, data, baseline)


# --- the gate


def with_drop(drop: float | None) -> Evaluation:
    return Evaluation("sequence-classification", 10, {"accuracy": 87.0}, "accuracy", drop=drop)


def test_the_gate_names_both_numbers():
    with pytest.raises(
        GateError, match=r"accuracy drops by 1\.250 points, more than the 0\.5 allowed"
    ) as raised:
        gate(with_drop(1.25), 0.5)
    assert raised.value.exit_code == 5


@pytest.mark.parametrize(("drop", "allowed"), [(0.5, 0.5), (88.2 - 87.2, 1.0), (-3.0, 0.0)])
def test_the_gate_opens_up_to_the_limit(drop, allowed):
    gate(with_drop(drop), allowed)


def test_a_drop_that_is_no_number_does_not_pass():
    with pytest.raises(GateError):
        gate(with_drop(float("nan")), 50)


def test_a_gate_needs_a_baseline():
    with pytest.raises(UsageError, match="max_drop needs"):
        gate(with_drop(None), 1)
