"""Regression with several values: data in every layout, metrics, the loss and what scores compare."""

from __future__ import annotations

import csv
import functools
import json

import numpy as np
import pytest
import torch
from helpers.data import sentences, tiny_image_folder
from helpers.gradients import check_fisher
from helpers.lazy import Lazy
from helpers.models import new_folder, opened, tiny_model

from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.measure.evaluate import evaluate
from optin_cli.scoring import score as stage
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.transforms.masking import masked

datasets = Lazy("datasets")

stats = Lazy("scipy.stats")

NAMES = ["valence", "arousal", "dominance"]


def model_of(name: str = "bert", seed: int = 0, **overrides) -> OpenModel:
    names = {
        "label2id": {n: i for i, n in enumerate(NAMES)},
        "id2label": dict(enumerate(NAMES)),
        "num_labels": 3,
        "problem_type": "regression",
    }
    return opened(tiny_model(name, new_folder() / "m", seed=seed, **{**names, **overrides}))


@functools.cache
def dense_model() -> OpenModel:
    return model_of()


TEXTS = sentences(20, 6)
TRUTH = np.random.default_rng(4).normal(size=(20, 3)).round(3)


def json_lines(folder, values):
    path = folder / "train.jsonl"
    lines = [{"sentence": text, "labels": value} for text, value in zip(TEXTS, values, strict=True)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path, {}


def stored(folder, how: str):
    """(path, options of the data) of the same labels stored in another way."""
    if how == "lists":
        return json_lines(folder, TRUTH.tolist())
    if how == "float32":
        features = datasets.Features(
            {
                "sentence": datasets.Value("string"),
                "label": datasets.List(datasets.Value("float32"), length=3),
            }
        )
        datasets.Dataset.from_dict({"sentence": TEXTS, "label": TRUTH}, features=features).save_to_disk(
            str(folder / "data")
        )
        return folder / "data", {}
    path = folder / "train.csv"
    header = {"columns": NAMES[::-1], "unnamed": ["a", "b", "c"]}[how]
    values = TRUTH[:, ::-1] if how == "columns" else TRUTH
    with path.open("w", newline="") as stream:
        rows = [[text, *row] for text, row in zip(TEXTS, values.tolist(), strict=True)]
        csv.writer(stream).writerows([["sentence", *header], *rows])
    return path, {"label": "dominance, valence,arousal" if how == "columns" else "a,b,c"}


def batches(model, path, **options) -> Batches:
    found = sample(DataSpec(str(path), **options), model.family.modality, None, 0, reader=model.task.reader)
    return Batches(found, model.processor, 7, reader=model.task.reader)


@torch.no_grad()
def values(model: OpenModel) -> torch.Tensor:
    """Of each text, without batching, padding or `Task`."""
    tokenizer = model.processor.tokenizer
    return torch.cat([model.module(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])


@pytest.mark.parametrize("how", ["lists", "float32", "columns", "unnamed"])
def test_metrics_are_scipys_means_however_labels_are_stored(how, tmp_path):
    path, options = stored(tmp_path, how)
    data = batches(dense_model(), path, **options)
    np.testing.assert_allclose(dense_model().task.labels(data), TRUTH, rtol=1e-6)
    result = evaluate(dense_model(), data, dense_model())
    found = values(dense_model()).numpy()
    expected = {
        "pearson": 100 * np.mean([stats.pearsonr(found[:, i], TRUTH[:, i]).statistic for i in range(3)]),
        "spearman": 100 * np.mean([stats.spearmanr(found[:, i], TRUTH[:, i]).statistic for i in range(3)]),
        "mse": np.square(found - TRUTH).mean(),
    }
    assert result.metrics == pytest.approx(expected, abs=1e-3)
    assert (result.main, result.drop) == ("spearman", 0)


def test_correlations_are_over_the_values_that_vary(tmp_path):
    truth = TRUTH.copy()
    truth[:, 1] = 0.5
    metrics = evaluate(dense_model(), batches(dense_model(), json_lines(tmp_path, truth.tolist())[0])).metrics
    found = values(dense_model()).numpy()
    expected = np.mean([stats.pearsonr(found[:, i], truth[:, i]).statistic for i in (0, 2)])
    assert metrics["pearson"] == pytest.approx(100 * expected, abs=1e-3)
    assert metrics["mse"] == pytest.approx(np.square(found - truth).mean(), rel=1e-4)
    with pytest.raises(InputError, match="are equal"):
        evaluate(dense_model(), batches(dense_model(), json_lines(tmp_path, np.ones((20, 3)).tolist())[0]))


def test_fidelity_is_the_mean_difference(tmp_path):
    other = model_of(seed=5)
    result = evaluate(other, batches(other, stored(tmp_path, "lists")[0]), dense_model())
    expected = (values(other) - values(dense_model())).abs().mean()
    assert result.fidelity == pytest.approx({"mean_abs_difference": float(expected)}, rel=1e-4)


def test_the_loss_is_transformers_own(tmp_path):
    data = batches(dense_model(), stored(tmp_path, "lists")[0])
    targets, batch = dense_model().task.targets(data), data[0]
    wanted = [targets[i] for i in batch.example_ids]
    with torch.no_grad():
        whole = dense_model().module(**batch.inputs, labels=torch.tensor(np.array(wanted)).float()).loss
        found = dense_model().task.loss(dense_model().output(batch.inputs), wanted)
    torch.testing.assert_close(found.mean(), whole)


def test_fisher_is_the_squared_gradient_of_that_loss(tmp_path):
    path, options = stored(tmp_path, "columns")
    plan = make_plan(dense_model(), DataSpec(str(path), **options), ScoreSettings(method="fisher", samples=8))
    check_fisher(plan, tmp_path / "r.h5", TEXTS, TRUTH, torch.nn.functional.mse_loss)


@pytest.mark.parametrize("method", ["ablation", "curvature"])
def test_the_output_term_is_the_squared_error_of_a_full_forward(method, tmp_path):
    settings = ScoreSettings(method=method, samples=20, probes=64)
    plan = make_plan(dense_model(), DataSpec(str(stored(tmp_path, "lists")[0])), settings)
    ranking = stage.score(plan, tmp_path / "r.h5")
    dense, kept = values(dense_model()), 0.0 if method == "ablation" else 0.98
    site = next(site for site in ranking.sites if site.name == "blocks.1.heads")
    for unit in range(site.units):
        mask = torch.ones(site.units)
        mask[unit] = kept
        with masked(dense_model().module, dense_model().anatomy, {site.name: mask}):
            changed = values(dense_model())
        exact = (changed - dense).double().square().sum(1).mean() / (1 - kept) ** 2
        assert site.output[unit] == pytest.approx(float(exact), rel=1e-3 if method == "ablation" else 0.35)


def test_images_have_values_too(tmp_path):
    model = model_of("vit")
    assert (model.task.name, model.task.term) == ("image-classification", "squares")
    paths = sorted(map(str, tiny_image_folder(tmp_path / "images", 12).rglob("*.png")))[:12]
    table = {"image": paths, "label": TRUTH[: len(paths)].tolist()}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.List(datasets.Value("float64"))}
    )
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(tmp_path / "data"))
    data = batches(model, tmp_path / "data")
    with torch.no_grad():
        found = torch.cat([model.module(**batch.inputs).logits for batch in data])
    order = [i for batch in data for i in batch.example_ids]
    expected = np.square(found.numpy() - TRUTH[order]).mean()
    assert evaluate(model, data).metrics["mse"] == pytest.approx(expected, rel=1e-4)


def test_labels_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match="one number a row, but the model gives 3"):
        evaluate(dense_model(), batches(dense_model(), json_lines(tmp_path, [1.5] * 20)[0]))
    with pytest.raises(InputError, match=r"label \[1.5, 2.0\], but the model gives 3 values"):
        evaluate(dense_model(), batches(dense_model(), json_lines(tmp_path, [[1.5, 2.0]] * 20)[0]))
    with pytest.raises(InputError, match="without a label where a number is needed"):
        evaluate(dense_model(), batches(dense_model(), json_lines(tmp_path, [[1.5, 2.0, None]] * 20)[0]))
    path, _ = stored(tmp_path, "columns")
    with pytest.raises(InputError, match="2 label columns were given, but the model has 3"):
        evaluate(dense_model(), batches(dense_model(), path, label="valence,arousal"))


def test_one_value_may_stand_in_a_list_or_be_written_as_text(tmp_path):
    model = model_of(num_labels=1, label2id={"score": 0}, id2label={0: "score"}, problem_type=None)
    for held in ([[value] for value in TRUTH[:, 0].tolist()], [str(value) for value in TRUTH[:, 0]]):
        found = model.task.labels(batches(model, json_lines(tmp_path, held)[0]))
        np.testing.assert_array_equal(found, TRUTH[:, :1])
