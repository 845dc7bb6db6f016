"""Fisher against autograd on explicit masks, one example at a time, for every task that has labels."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers.cli import run
from helpers.data import sentences, tiny_image_folder, tiny_text_csv
from helpers.gradients import mask_gradients
from helpers.models import opened, saved_model, shared_model, tiny_model
from torch.nn import functional as F

from optin_cli.artefacts.ranking import read_ranking, read_sketch
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError
from optin_cli.scoring import score as stage
from optin_cli.scoring.estimate import estimate_seconds
from optin_cli.scoring.methods.registry import configured
from optin_cli.scoring.plan import Plan, ScoreSettings, make_plan
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

SMALL = ScoreSettings(method="fisher", samples=10, batch_size=4)
PER_BATCH = dataclasses.replace(SMALL, per_batch=True)


def tags(folder, rows: int = 14):
    path = folder / "train.jsonl"
    rng = np.random.default_rng(3)
    texts = [text.split() for text in sentences(rows, words=(1, 9))]
    data = [{"tokens": words, "tags": rng.integers(0, 2, len(words)).tolist()} for words in texts]
    path.write_text("\n".join(map(json.dumps, data)))
    return path


def answers(folder, rows: int = 14):
    path = folder / "train.jsonl"
    texts = zip(sentences(rows), sentences(rows, 7), strict=True)
    data = [
        {
            "question": one,
            "context": two,
            "answers": {"text": [two.split()[-1]], "answer_start": [two.rfind(" ") + 1]},
        }
        for one, two in texts
    ]
    path.write_text("\n".join(map(json.dumps, data)))
    return path


def table(folder, labels, name="train.csv"):
    """A CSV of as many sentences as labels; None leaves a cell empty."""
    path = folder / name
    with path.open("w", newline="") as stream:
        rows = zip(sentences(len(labels)), labels, strict=True)
        csv.writer(stream).writerows([("sentence", "label"), *rows])
    return path


def plan_for(case: str, folder, settings=SMALL) -> Plan:
    if case in ("bert", "electra"):
        model, data = shared_model(case), tiny_text_csv(folder, 14)
    elif case in ("vit", "timm-vit"):
        model, data = shared_model(case), tiny_image_folder(folder, 14)
    elif case == "tagger":
        model, data = shared_model("bert", "tagger"), tags(folder)
    elif case == "reader":
        model, data = shared_model("bert", "reader"), answers(folder)
    elif case == "value":
        model = opened(tiny_model("bert", folder / "value", num_labels=1))
        data = tiny_text_csv(folder, 14, labels="score")
    else:
        model, data = shared_model("bert", "encoder"), tiny_text_csv(folder, 14, labels="score")
    return make_plan(model, DataSpec(str(data)), settings)


def losses(plan: Plan, row: int) -> torch.Tensor:
    """The loss of one row as its task defines it, from inputs of that row alone."""
    model, examples = plan.model, plan.examples
    record = examples.rows[row]
    batches = plan.calibration.batches
    by_id = {i: (b, k) for b in range(len(batches)) for k, i in enumerate(batches.ids(b))}

    def alone(example):
        b, k = by_id[example]
        batch = batches[b]
        inputs = {key: value[k : k + 1] for key, value in batch.inputs.items()}
        if batch.valid is not None:
            inputs = {key: value[:, : int(batch.valid[k].sum())] for key, value in inputs.items()}
        return model.module(**inputs)

    if batches.separate:
        one, two = (alone(2 * row + side).last_hidden_state.mean(1)[0] for side in (0, 1))
        largest = max(examples.rows["label"][:])
        return (F.cosine_similarity(one, two, dim=0) - record["label"] / largest) ** 2
    out = alone(row)
    if "answers" in record:
        last = torch.tensor([out.end_logits.shape[1] - 2])  # the word before [SEP]
        return (F.cross_entropy(out.start_logits, last) + F.cross_entropy(out.end_logits, last)) / 2
    logits = out if isinstance(out, torch.Tensor) else out.logits
    if "tags" in record:
        labels = torch.tensor(batches.labels()[row])
        return F.cross_entropy(logits[0, labels >= 0], labels[labels >= 0])
    if logits.shape[-1] == 1:
        return (logits[0, 0] - record["label"]) ** 2
    return F.cross_entropy(logits, torch.tensor([record["label"]]))


def gradients(plan: Plan) -> dict[str, np.ndarray]:
    return mask_gradients(plan, lambda row: losses(plan, row))


def close(one, two) -> None:
    np.testing.assert_allclose(one, two, rtol=2e-3, atol=1e-4 * float(np.max(two)))


@pytest.mark.parametrize(
    "case",
    [
        "bert",
        "timm-vit",
        "tagger",
        "value",
        "pairs",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("electra", "vit", "reader")),
    ],
)
def test_scores_are_the_mean_squared_gradients_of_single_examples(case, tmp_path):
    plan = plan_for(case, tmp_path)
    ranking = stage.score(plan, tmp_path / "r.h5")
    expected = gradients(plan)
    for site in ranking.sites:
        close(site.score, (expected[site.name] ** 2).mean(0))
        np.testing.assert_array_equal(site.score, site.output)
        assert (site.score > 0).all()
        assert site.columns == [] and site.trajectory.shape == (site.units, 0)
    assert ranking.method == "fisher"


@pytest.mark.parametrize("case", ["bert", "pairs"])
def test_per_batch_squares_the_mean_gradient_of_a_batch(case, tmp_path):
    plan = plan_for(case, tmp_path, PER_BATCH)
    ranking = stage.score(plan, tmp_path / "r.h5")
    batches, size = plan.calibration.batches, 2 if case == "pairs" else 1
    rows = [sorted({i // size for i in batches.ids(b)}) for b in range(len(batches))]
    assert [len(r) for r in rows] == ([2, 2, 1] if case == "pairs" else [4, 4, 2])
    expected = gradients(plan)
    sketch = read_sketch(tmp_path / "r.h5")
    assert len(sketch) == len(rows)
    for site in ranking.sites:
        means = np.stack([expected[site.name][r].mean(0) for r in rows])
        weights = np.array([len(r) for r in rows]) / sum(map(len, rows))
        close(site.score, (weights[:, None] * means**2).sum(0))
        close(sketch.output[site.name], weights[:, None] ** 0.5 * means)


def test_per_batch_draws_its_batches(tmp_path):
    """Texts of one length are more alike than PTF's random batches."""
    ids = [plan_for("bert", tmp_path, s).calibration.batches.ids(0) for s in (SMALL, PER_BATCH)]
    other = dataclasses.replace(PER_BATCH, seed=1)
    assert sorted(ids[0]) != sorted(ids[1])
    assert ids[1] == plan_for("bert", tmp_path, PER_BATCH).calibration.batches.ids(0)
    assert ids[1] != plan_for("bert", tmp_path, other).calibration.batches.ids(0)


@pytest.mark.parametrize("case", ["bert", "pairs"])
def test_the_sketch_is_every_rows_gradient(case, tmp_path):
    plan = plan_for(case, tmp_path)
    stage.score(plan, tmp_path / "r.h5")
    sketch, expected = read_sketch(tmp_path / "r.h5"), gradients(plan)
    rows = sketch.examples // 2 if case == "pairs" else sketch.examples
    assert sorted(rows) == list(range(len(plan.examples.row_ids)))
    assert sketch.trajectory == {}
    for name, kept in sketch.output.items():
        close(kept, expected[name][rows] / len(rows) ** 0.5)


def test_no_sketch_when_none_is_asked_for(tmp_path):
    stage.score(plan_for("bert", tmp_path, dataclasses.replace(SMALL, sketch_rows=0)), tmp_path / "r.h5")
    assert read_sketch(tmp_path / "r.h5") is None


def test_parts_by_batch_add_up(tmp_path):
    ranking = stage.score(plan_for("pairs", tmp_path), tmp_path / "r.h5")
    for site in ranking.sites:
        mean = np.tensordot(ranking.batch_weights, site.by_batch[..., 1], 1)
        np.testing.assert_allclose(mean, site.output, rtol=1e-5)


def test_smaller_pieces_give_the_same_scores(tmp_path):
    """What happens when memory is short: the sides of a pair may then stand in different pieces."""
    whole = stage.score(plan_for("pairs", tmp_path), tmp_path / "a.h5")
    plan = plan_for("pairs", tmp_path)
    plan.calibration.graph_slots = 1
    assert len(plan.calibration.pieces(0, 1)) == 4
    for one, two in zip(whole.sites, stage.score(plan, tmp_path / "b.h5").sites, strict=True):
        np.testing.assert_allclose(one.score, two.score, rtol=1e-3, atol=1e-9)


def test_lambda_has_nothing_to_weigh(tmp_path):
    ranking = stage.score(plan_for("bert", tmp_path), tmp_path / "r.h5")
    assert ranking.settings["output_weight"] == 0
    select(ranking, Request(flops=0.5))
    with pytest.raises(UsageError, match="no parts"):
        select(ranking, Request(flops=0.5, output_weight=1.0))


def test_an_interrupted_run_resumes_and_ends_the_same(tmp_path):
    whole = stage.score(plan_for("bert", tmp_path), tmp_path / "whole.h5")

    def stop(done, total, what):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.score(plan_for("bert", tmp_path), tmp_path / "r.h5", stop)
    assert 0 < len(list((tmp_path / ".r.h5.partial").glob("*.npz"))) < 3
    assert stage.score(plan_for("bert", tmp_path), tmp_path / "r.h5").digest == whole.digest
    assert (tmp_path / "r.h5").stat().st_size == (tmp_path / "whole.h5").stat().st_size


def test_estimate_is_a_time(tmp_path):
    assert estimate_seconds(plan_for("bert", tmp_path)) > 0


# ---- labels that can't be used ----


def refused(error, words, model, data, settings=SMALL):
    with pytest.raises(error, match=words) as caught:
        plan = make_plan(model, DataSpec(str(data)), settings)
        stage.score(plan, data.with_name("r.h5"))
    assert not data.with_name("r.h5").exists()
    return caught.value


def test_data_without_labels_names_the_methods_that_need_none(tmp_path):
    data = tiny_text_csv(tmp_path, labels=None)
    error = refused(UsageError, "has no label column", shared_model("bert"), data)
    assert "knowledge" in error.hint and "with label;" in error.hint


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, None, 1], "row without a label"),
        ([1, 1, 1, 1], "only the label 1"),
        ([-1, -1, -1, -1], r"4 of 4 labels .* hidden \(-1\)"),
        ([0, 1, 2, 1], r"label 2, but the model has classes 0\.\.1"),
        ([0, 0.5, 1, 1], "label 0.5, but"),
        (["LABEL_0", "LABEL_1", ""], "row without a label"),
        (["LABEL_0", "LABEL_0"], "only the label 0"),
    ],
)
def test_labels_of_classes(labels, words, tmp_path):
    refused(InputError, words, shared_model("bert"), table(tmp_path, labels))


@pytest.mark.parametrize(
    ("labels", "words"),
    [([0.5, None, 1.5], "row without a label"), ([2.5, 2.5, 2.5], "only the label 2.5"), ("abc", "'a'")],
)
def test_labels_of_values(labels, words, tmp_path):
    model = opened(tiny_model("bert", tmp_path / "value", num_labels=1))
    refused(InputError, words, model, table(tmp_path, labels))


def test_tags_of_one_kind(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({"tokens": ["a", "cat"], "tags": [1, 1]}) for _ in range(3)))
    refused(InputError, "only the label 1", shared_model("bert", "tagger"), path)


def test_images_without_folders_of_classes(tmp_path):
    data = tiny_image_folder(tmp_path / "images", 4, classes=["cat"])
    refused(UsageError, "has no label column", shared_model("timm-vit"), data)


def test_embedding_models_need_pairs(tmp_path):
    refused(
        UsageError, "two text columns", shared_model("bert", "encoder"), tiny_text_csv(tmp_path, pairs=False)
    )


def test_similarities_that_are_all_negative(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("sentence1,sentence2,label\na cat,a dog,-2\nthe bird,a house,-1\n")
    refused(InputError, "largest similarity", shared_model("bert", "encoder"), path)


def test_question_answering_has_no_labels(tmp_path):
    refused(UsageError, "question answering", shared_model("bert", "reader"), tiny_text_csv(tmp_path))


def test_per_batch_is_fishers():
    with pytest.raises(UsageError, match="per_batch is about"):
        configured(ScoreSettings(method="curvature", per_batch=True))


def test_on_the_command_line(tmp_path):
    data, output = tiny_text_csv(tmp_path, 14), tmp_path / "r.h5"
    command = ["score", str(saved_model("bert")), "--data", str(data), "-o", str(output), "--samples", "10"]
    run(*command, "--batch-size", "4", "--method", "fisher", "--per-batch", "-q")
    plan = make_plan(shared_model("bert"), DataSpec(str(data)), PER_BATCH)
    for one, two in zip(
        read_ranking(output).sites, stage.score(plan, tmp_path / "again.h5").sites, strict=True
    ):
        np.testing.assert_array_equal(one.score, two.score)
    bare = tiny_text_csv(tmp_path / "bare", labels=None)
    found = run("score", command[1], "--data", bare, "-o", tmp_path / "n.h5", "--method", "fisher", code=2)
    assert "label column" in found.stderr
