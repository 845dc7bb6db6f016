"""GLUE by name: splits, columns, labels and metrics, from a stand-in for the hub and from folders."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from helpers.data import sentences
from helpers.lazy import Lazy
from helpers.models import new_folder, opened, tiny_model

from optin_cli.data import glue
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec, open_split
from optin_cli.errors import UsageError
from optin_cli.measure.evaluate import evaluate

datasets = Lazy("datasets")

oracle = Lazy("sklearn.metrics")

PAIR = ("sentence1", "sentence2")
TWO = ["not_entailment", "entailment"]
# name -> (text columns, names of the classes or None for a score), as on the hub
SCHEMAS = {
    "cola": (("sentence",), ["unacceptable", "acceptable"]),
    "sst2": (("sentence",), ["negative", "positive"]),
    "mrpc": (PAIR, ["not_equivalent", "equivalent"]),
    "qqp": (("question1", "question2"), ["not_duplicate", "duplicate"]),
    "stsb": (PAIR, None),
    "mnli": (("premise", "hypothesis"), ["entailment", "neutral", "contradiction"]),
    "qnli": (("question", "sentence"), TWO[::-1]),
    "rte": (PAIR, TWO[::-1]),
    "wnli": (PAIR, TWO),
}


def table(name: str) -> datasets.Dataset:
    texts, classes = SCHEMAS[name]
    rng = np.random.default_rng(1)
    label = datasets.ClassLabel(names=classes) if classes else datasets.Value("float32")
    values = rng.integers(0, len(classes), 24) if classes else rng.uniform(0, 5, 24)
    columns = {text: sentences(24, i) for i, text in enumerate(texts)}
    features = {
        **dict.fromkeys(texts, datasets.Value("string")),
        "label": label,
        "idx": datasets.Value("int32"),
    }
    rows = {**columns, "label": values.tolist(), "idx": list(range(24))}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for `datasets.load_dataset`: gives the tables of GLUE, and keeps what it was asked."""
    asked = []

    def load_dataset(path, name=None, *, split):
        assert path == "nyu-mll/glue"
        asked.append((name, split))
        return table(name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def model_for(name: str):
    """A classifier of the task's classes, which numbers them from the last and writes them in capitals."""
    classes = SCHEMAS[name][1]
    if classes is None:
        return opened(tiny_model("bert", new_folder() / "m", num_labels=1))
    mine = [name.upper() for name in classes[::-1]]
    names = {"label2id": {n: i for i, n in enumerate(mine)}, "id2label": dict(enumerate(mine))}
    return opened(tiny_model("bert", new_folder() / "m", num_labels=len(mine), **names))


def expected(name: str, logits: torch.Tensor, truth: list) -> dict[str, float]:
    """The metrics of the GLUE paper, in the data's own numbers of the classes."""
    classes = SCHEMAS[name][1]
    if classes is None:
        value = logits[:, 0]
        return {
            "spearman": 100
            * torch.corrcoef(
                torch.stack([value.argsort().argsort(), torch.tensor(truth).argsort().argsort()]).double()
            )[0, 1].item(),
            "pearson": 100 * np.corrcoef(value, truth)[0, 1],
        }
    guess = len(classes) - 1 - logits.argmax(-1)
    by_name = {
        "accuracy": oracle.accuracy_score(truth, guess),
        "f1": oracle.f1_score(truth, guess) if len(classes) == 2 else None,
        "matthews": oracle.matthews_corrcoef(truth, guess),
    }
    return {metric: 100 * by_name[metric] for metric in glue.TASKS[name].metrics}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_task_by_name(name, hub):
    model = model_for(name)
    module = copy.deepcopy(model.module)
    module.classifier.weight.data *= -1
    other = dataclasses.replace(model, module=module)
    found = sample(DataSpec(f"glue/{name}", "validation"), "text", None, 0, reader=model.task.reader)
    assert found.columns.text == SCHEMAS[name][0]
    assert found.columns.label == "label"
    assert hub == [(name, "validation_matched" if name == "mnli" else "validation")]
    result = evaluate(other, Batches(found, model.processor, 8), model)
    texts = [found.rows[column][:] for column in found.columns.text]
    with torch.no_grad():
        encoded = (model.processor.tokenizer(*row, return_tensors="pt") for row in zip(*texts, strict=True))
        logits = torch.cat([module(**inputs).logits for inputs in encoded])
    metrics = expected(name, logits, found.rows["label"][:])
    assert list(result.metrics)[: len(metrics)] == list(metrics) == list(glue.TASKS[name].metrics)
    assert {key: result.metrics[key] for key in metrics} == pytest.approx(metrics, abs=1e-3)
    assert result.main == glue.TASKS[name].metrics[0]
    assert result.drop == result.baseline_metrics[result.main] - result.metrics[result.main]


@pytest.mark.parametrize(
    ("spec", "config", "split", "asked"),
    [
        ("glue/mnli", None, "dev", ("mnli", "validation_matched")),
        ("glue/mnli", None, "mismatched", ("mnli", "validation_mismatched")),
        ("glue/mnli", None, "validation_mismatched", ("mnli", "validation_mismatched")),
        ("glue/mnli", None, "train", ("mnli", "train")),
        ("glue/SST-2", None, "validation", ("sst2", "validation")),
        ("glue", "mnli", "validation", ("mnli", "validation_matched")),
        ("nyu-mll/glue", "sts-b", "train", ("stsb", "train")),
    ],
)
def test_splits_and_spellings(hub, spec, config, split, asked):
    open_split(DataSpec(spec, split, config))
    assert hub == [asked]


@pytest.mark.parametrize(("spec", "config"), [("glue/snli", None), ("glue", None), ("nyu-mll/glue", "boolq")])
def test_a_task_that_glue_lacks(hub, spec, config):
    with pytest.raises(UsageError, match=r"GLUE has no task(.|\n)*cola, sst2, mrpc"):
        open_split(DataSpec(spec, "train", config))
    assert hub == []


def test_a_folder_in_the_hubs_layout(tmp_path):
    folder = tmp_path / "glue" / "mnli"
    folder.mkdir(parents=True)
    rows = table("mnli")
    for split, part in {"train": 4, "validation_matched": 3, "validation_mismatched": 2}.items():
        rows.select(range(part)).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    found = {s: len(open_split(DataSpec(str(folder), s))) for s in ("train", "validation", "mismatched")}
    assert found == {"train": 4, "validation": 3, "mismatched": 2}
    assert glue.glue_task(str(folder), None) is glue.TASKS["mnli"]
    assert glue.glue_task(str(tmp_path / "mnli"), None) is None
