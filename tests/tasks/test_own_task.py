"""A task from outside the package: a class, and its name in the registry."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.cli import FAST, run
from helpers.data import tiny_text_csv
from helpers.models import new_model, saved_model

import optin_cli as optin
from optin_cli.tasks import registry
from optin_cli.tasks.base import Task


@dataclass(frozen=True)
class Grades(Task):
    """Classes in an order: a neighbour of the right one is nearly right."""

    name = "grades"
    auto_class = "AutoModelForSequenceClassification"
    architectures = ()
    main = ("within_one",)

    def metrics(self, kept, labels, batches):
        grades = torch.stack(list(kept)).argmax(-1)
        return {"within_one": 100 * float(((grades - torch.tensor(labels)).abs() <= 1).double().mean())}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(registry.TASKS, Grades.name, Grades)


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 30, (count, 8, 10), generator=generator)
    labels = torch.randint(5, (count, 8), generator=generator)
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y}
        for i, y in zip(ids, labels, strict=True)
    ]


def test_a_task_of_ones_own_is_scored_pruned_and_measured():
    module, data = new_model("bert", num_labels=5).eval(), batches(3)
    model = optin.open_model(module, task="grades")
    small = optin.prune(model, data, flops=0.6, samples=16, compensate_samples=16)
    found = optin.evaluate(small, data, baseline=model)
    for metrics, net in ((found.metrics, small.module), (found.baseline_metrics, module)):
        with torch.inference_mode():
            right = [
                abs(int(grade) - int(label)) <= 1
                for batch in data
                for grade, label in zip(
                    net(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1),
                    batch["labels"],
                    strict=True,
                )
            ]
        assert metrics == {"within_one": pytest.approx(100 * sum(right) / len(right))}
    assert found.drop == pytest.approx(found.baseline_metrics["within_one"] - found.metrics["within_one"])


def test_the_command_line_knows_it(tmp_path):
    data = tiny_text_csv(tmp_path)
    shown = run("eval", saved_model("bert"), "--data", data, "--split", "train", "--task", "grades").stdout
    assert "within_one" in shown
    run("score", saved_model("bert"), "--data", data, "--task", "grades", "-o", tmp_path / "r.h5", *FAST)
    assert optin.read_ranking(tmp_path / "r.h5").model["task"] == "grades"
