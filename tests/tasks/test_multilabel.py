"""Several labels at once, against scikit-learn, torch's own losses and full forwards."""

from __future__ import annotations

import csv
import functools
import json

import numpy as np
import pytest
import torch
from helpers.data import sentences
from helpers.gradients import check_fisher
from helpers.lazy import Lazy
from helpers.models import new_folder, opened, tiny_model
from torch.nn import functional as F

from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.measure.evaluate import evaluate
from optin_cli.scoring import score as stage
from optin_cli.scoring.losses import output_change
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.transforms.masking import masked

datasets = Lazy("datasets")

oracle = Lazy("sklearn.metrics")

NAMES = ["joy", "anger", "fear", "other"]


def model_of(**overrides) -> OpenModel:
    names = {
        "label2id": {n: i for i, n in enumerate(NAMES)},
        "id2label": dict(enumerate(NAMES)),
        "num_labels": 4,
    }
    settings = {**names, "problem_type": "multi_label_classification", **overrides}
    return opened(tiny_model("bert", new_folder() / "m", **settings))


@functools.cache
def dense_model() -> OpenModel:
    return model_of()


TEXTS = sentences(20, 6)
TRUTH = np.random.default_rng(8).integers(0, 2, (20, 4))


def json_lines(folder, values):
    path = folder / "train.jsonl"
    lines = [{"sentence": text, "labels": value} for text, value in zip(TEXTS, values, strict=True)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path, {}


def stored(folder, how: str):
    """(path, options of the data) of the same labels stored in another way."""
    numbers = [np.flatnonzero(row).tolist() for row in TRUTH]
    if how == "numbers":
        return json_lines(folder, numbers)
    if how == "names":
        return json_lines(folder, [[NAMES[i].upper() for i in row] for row in numbers])
    if how == "ones":
        return json_lines(folder, TRUTH.astype(float).tolist())
    if how == "classes":  # numbered otherwise than the model does
        features = datasets.Features(
            {
                "sentence": datasets.Value("string"),
                "labels": datasets.List(datasets.ClassLabel(names=NAMES[::-1])),
            }
        )
        table = {"sentence": TEXTS, "labels": [[NAMES[i] for i in row] for row in numbers]}
        datasets.Dataset.from_dict(table, features=features).save_to_disk(str(folder / "data"))
        return folder / "data", {}
    path = folder / "train.csv"
    with path.open("w", newline="") as stream:
        rows = [[text, *row] for text, row in zip(TEXTS, TRUTH[:, ::-1].tolist(), strict=True)]
        csv.writer(stream).writerows([["sentence", *NAMES[::-1]], *rows])
    return path, {"label": "fear, joy,other,anger"}


def batches(model, path, **options) -> Batches:
    found = sample(DataSpec(str(path), **options), "text", None, 0, reader=model.task.reader)
    return Batches(found, model.processor, 7, reader=model.task.reader)


@torch.no_grad()
def logits(model: OpenModel) -> torch.Tensor:
    tokenizer = model.processor.tokenizer
    return torch.cat([model.module(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])


@pytest.mark.parametrize("how", ["numbers", "names", "ones", "classes", "columns"])
def test_metrics_are_sklearns_however_labels_are_stored(how, tmp_path):
    path, options = stored(tmp_path, how)
    data = batches(dense_model(), path, **options)
    np.testing.assert_array_equal(dense_model().task.labels(data), TRUTH)
    result = evaluate(dense_model(), data, dense_model())
    found = logits(dense_model())
    guess = found.sigmoid() > 0.5
    assert result.metrics == pytest.approx(
        {
            "micro_f1": 100 * oracle.f1_score(TRUTH, guess, average="micro"),
            "macro_f1": 100 * oracle.f1_score(TRUTH, guess, average="macro"),
            "mean_average_precision": 100 * oracle.average_precision_score(TRUTH, found, average="macro"),
        }
    )
    assert (result.main, result.drop) == ("micro_f1", 0)
    assert result.fidelity == pytest.approx({"agreement": 100, "kl": 0})


def test_fidelity_is_of_single_labels(tmp_path):
    other = opened(
        tiny_model(
            "bert",
            new_folder() / "o",
            seed=5,
            num_labels=4,
            problem_type=dense_model().module.config.problem_type,
        )
    )
    found = evaluate(other, batches(other, stored(tmp_path, "numbers")[0]), dense_model()).fidelity
    ours, dense = logits(other).double(), logits(dense_model()).double()
    p, q = (torch.stack([x.sigmoid(), (-x).sigmoid()]) for x in (dense, ours))
    assert found["agreement"] == pytest.approx(100 * float(((ours > 0) == (dense > 0)).double().mean()))
    assert 0 < found["agreement"] < 100
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum() / len(ours)), rel=1e-5)


def test_the_loss_is_transformers_own(tmp_path):
    data = batches(dense_model(), stored(tmp_path, "numbers")[0])
    targets, batch = dense_model().task.targets(data), data[0]
    wanted = [targets[i] for i in batch.example_ids]
    with torch.no_grad():
        whole = dense_model().module(**batch.inputs, labels=torch.tensor(np.array(wanted)).float()).loss
        found = dense_model().task.loss(dense_model().output(batch.inputs), wanted)
    torch.testing.assert_close(found.mean(), whole)


def test_fisher_is_the_squared_gradient_of_that_loss(tmp_path):
    path, options = stored(tmp_path, "columns")
    plan = make_plan(dense_model(), DataSpec(str(path), **options), ScoreSettings(method="fisher", samples=8))
    check_fisher(plan, tmp_path / "r.h5", TEXTS, TRUTH, F.binary_cross_entropy_with_logits)


@pytest.mark.parametrize("method", ["ablation", pytest.param("curvature", marks=pytest.mark.slow)])
def test_the_output_term_is_the_binary_kl_of_a_full_forward(method, tmp_path):
    settings = ScoreSettings(method=method, samples=20, temperature=2.0, probes=64)
    plan = make_plan(dense_model(), DataSpec(str(stored(tmp_path, "numbers")[0])), settings)
    ranking = stage.score(plan, tmp_path / "r.h5")
    dense, kept = logits(dense_model()), 0.0 if method == "ablation" else 0.98
    site = next(site for site in ranking.sites if site.name == "blocks.1.heads")
    for unit in range(site.units):
        mask = torch.ones(site.units)
        mask[unit] = kept
        with masked(dense_model().module, dense_model().anatomy, {site.name: mask}):
            changed = logits(dense_model())
        p, q = ((x.double() / 2).sigmoid() for x in (dense, changed))
        exact = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean() / (1 - kept) ** 2
        assert site.output[unit] == pytest.approx(float(exact), rel=1e-3 if method == "ablation" else 0.35)


def test_output_change_is_torchs_binary_kl():
    dense, variants = torch.randn(4, 1, 5), torch.randn(3, 4, 1, 5)
    found = output_change(dense, variants, torch.ones(4, 1), temperature=3.0, term="binary_kl")
    p, q = (torch.distributions.Bernoulli(logits=x / 3) for x in (dense.expand(3, -1, -1, -1), variants))
    expected = torch.distributions.kl_divergence(p, q).sum((1, 2, 3))
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-6)


def test_images_have_labels_too(tmp_path):
    settings = {"problem_type": "multi_label_classification", "num_labels": 4}
    model = opened(tiny_model("vit", tmp_path / "m", **settings))
    assert (model.task.name, model.task.term) == ("image-classification", "binary_kl")


def test_labels_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match="several labels at once"):
        evaluate(dense_model(), batches(dense_model(), json_lines(tmp_path, [1] * 20)[0]))
    with pytest.raises(InputError, match=r"label 4, but the model has classes 0\.\.3"):
        evaluate(dense_model(), batches(dense_model(), json_lines(tmp_path, [[4]] * 20)[0]))
    path, _ = stored(tmp_path, "columns")
    with pytest.raises(UsageError, match="no column 'hope'"):
        batches(dense_model(), path, label="joy,hope")
    with pytest.raises(
        InputError, match=r"2 label columns were given, but the model has 4(.|\n)*a column for each: "
    ):
        evaluate(dense_model(), batches(dense_model(), path, label="joy,anger"))
