"""Reference against a slow transcription of what docs/method.md says that OPTIN's released code does."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import shared_model
from torch.nn import functional as F

from optin_cli.artefacts.ranking import read_sketch
from optin_cli.data.sources import DataSpec
from optin_cli.scoring import score as stage
from optin_cli.scoring.estimate import estimate_seconds
from optin_cli.scoring.methods import reference
from optin_cli.scoring.plan import Plan, ScoreSettings, make_plan
from optin_cli.scoring.runner import Worker
from optin_cli.selection.select import select
from optin_cli.transforms.masking import masked

# more rows than a batch has tokens: then which are drawn does not matter
SMALL = ScoreSettings(method="reference", samples=16, batch_size=5, rows=10_000)
FEED_FORWARD = {
    "bert": ["encoder.layer.{}.output.dense", "bert"],
    "distilbert": ["transformer.layer.{}.ffn.lin2", "distilbert"],
}


def plan_for(name: str, folder, settings=SMALL, head="classifier") -> Plan:
    image = name in ("vit", "timm-vit")
    data = tiny_image_folder(folder, 16) if image else tiny_text_csv(folder, 16, labels=None)
    return make_plan(shared_model(name, head), DataSpec(str(data)), settings)


def literal(plan: Plan, name: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Scores as docs/method.md, section 2 lists them, one full masked forward for every unit.

    And which way KD was rescaled.
    """
    model, anatomy = plan.model, plan.model.anatomy
    depth, scores, ways = len(anatomy.blocks), {}, []
    path, prefix = FEED_FORWARD[name]
    modules = [model.module.get_submodule(f"{prefix}.{path.format(z)}") for z in range(depth)]

    def forward(inputs, masks):
        features = []
        handles = [m.register_forward_hook(lambda _, __, out: features.append(out)) for m in modules]
        with torch.inference_mode(), masked(model.module, anatomy, masks):
            logits = model.module(**inputs).logits
        for handle in handles:
            handle.remove()
        return features, logits

    for kind, batch in (("heads", 0), ("neurons", 1)):  # one batch, another one for neurons
        inputs = plan.calibration.batch(batch).inputs
        features, logits = forward(inputs, {})
        masks, scalings = {}, []
        for block in range(depth):
            site = anatomy[f"blocks.{block}.{kind}"]
            scores[site.name] = np.zeros(site.units)
            for unit in range(site.units):
                mask = torch.ones(site.units)
                mask[unit] = 0
                # the mask of heads is never taken back; that of neurons is
                masks = {**masks, site.name: mask} if kind == "heads" else {site.name: mask}
                changed, without = forward(inputs, masks)
                md = 0.0
                for z in range(depth):
                    if z > block or z == block == depth - 1:
                        one, two = (
                            F.normalize(f[z].double(), dim=-1).flatten(0, 1) for f in (features, changed)
                        )
                        md += float((one @ one.t() - two @ two.t()).square().sum())  # padding is in it
                p, q = (F.log_softmax(x.double(), dim=-1) for x in (logits, without))  # no temperature
                kd = 4.0**2 * float((p.exp() * (p - q)).sum())
                if md > kd:
                    scaling = 10.0 ** int(math.log10(md) - math.log10(kd) - math.log10(10))
                    scalings.append(scaling)
                    ways.append("smaller" if scaling < 1 else "larger" if scaling > 1 else "same")
                else:
                    scaling = np.mean(scalings) if scalings else 1
                    ways.append("mean" if scalings else "first")
                most = 10 if kind == "heads" else 100
                envelope = list(np.geomspace(1, most, site.units))[::-1][unit]
                decay = (0.5 if block == depth - 1 else 1) * (0.5 if kind == "heads" else 1)
                scores[site.name][unit] = (md + scaling * kd) * envelope * decay
    return scores, ways


@pytest.mark.parametrize("name", ["bert", pytest.param("distilbert", marks=pytest.mark.slow)])
def test_scores_are_those_of_the_released_code(name, tmp_path):
    plan = plan_for(name, tmp_path)
    ranking = stage.score(plan, tmp_path / "r.h5")
    expected, ways = literal(plan, name)
    assert {"same", "mean"} <= set(ways)
    for site in ranking.sites:
        largest = expected[site.name].max()
        np.testing.assert_allclose(site.score, expected[site.name], rtol=2e-3, atol=1e-7 * largest)


def test_the_power_of_ten_is_that_of_the_ratio():
    """By hand: log10(trajectory / KD) - log10(10), truncated toward zero; the mean so far where KD is larger."""
    powers = reference._Powers(0.1)
    pairs = [(1, 5), (5000, 2), (5000, 0.02), (3, 2), (2, 50), (2, 0), (1e-3, 9e-4), (7e5, 1)]
    expected = [1, 100, 10_000, 1, 10_101 / 3, 10_101 / 3, 1, 10_000]
    assert [powers.of(*pair) for pair in pairs] == pytest.approx(expected)
    assert reference._Powers(0.01).of(20, 10) == 0.1  # -1.7 is truncated toward zero
    assert reference._Powers(0).of(20, 10) == 0


def test_both_batches_are_drawn_and_padded(tmp_path):
    plan = plan_for("bert", tmp_path)
    one, two = (plan.calibration.batch(index) for index in (0, 1))
    assert not set(one.example_ids) & set(two.example_ids)
    assert not one.valid.all()
    other = plan_for("bert", tmp_path, dataclasses.replace(SMALL, seed=1))
    assert set(other.calibration.batch(0).example_ids) != set(one.example_ids)
    assert {(item.site.rpartition(".")[2], item.batch) for item in Worker(plan).items()} == {
        ("heads", 0),
        ("neurons", 1),
    }


def test_rows_are_drawn_again_for_every_unit(tmp_path):
    """Two neurons that are the same get other scores, unless all rows count."""
    found = []
    for rows in (10_000, 6):
        plan = plan_for("bert", tmp_path, dataclasses.replace(SMALL, rows=rows))
        module = copy.deepcopy(plan.model.module)
        layer = module.bert.encoder.layer[0]
        for parameter in (layer.intermediate.dense.weight, layer.intermediate.dense.bias):
            parameter[1] = parameter[0]
        layer.output.dense.weight[:, 1] = layer.output.dense.weight[:, 0]
        plan.calibration.model = dataclasses.replace(plan.model, module=module)
        site = plan.model.anatomy["blocks.0.neurons"]
        found.append(reference.Reference(plan.calibration, 1).score(site, np.array([0, 1]))[0])
    np.testing.assert_allclose(found[0][0], found[0][1], rtol=1e-4)
    assert (np.abs(found[1][0] / found[1][1] - 1) > 0.01).all()


def test_units_score_alike_in_any_company(tmp_path):
    """Items may be cut anywhere: what is drawn for a unit depends on the unit alone."""
    plan = plan_for("bert", tmp_path, dataclasses.replace(SMALL, rows=20))
    site = plan.model.anatomy["blocks.1.neurons"]
    together = reference.Reference(plan.calibration, 1).score(site, np.arange(8))
    alone = reference.Reference(plan.calibration, 1).score(site, np.array([5]))
    for one, two in zip(together, alone, strict=True):
        np.testing.assert_allclose(one[5:6], two, rtol=1e-4)


def test_reduced_products_change_little(tmp_path, reduced_products):
    plan = plan_for("bert", tmp_path)
    for name, batch in (("blocks.0.neurons", 1), ("blocks.1.heads", 0)):
        site = plan.model.anatomy[name]
        full, reduced = (
            reference.Reference(plan.calibration, batch, flag).score(site, np.arange(4))
            for flag in (False, True)
        )
        for one, two in zip(full, reduced, strict=True):
            np.testing.assert_allclose(one, two, rtol=0.03)


def test_out_of_memory_takes_fewer_variants(tmp_path, monkeypatch):
    plan = plan_for("bert", tmp_path)
    site, sizes = plan.model.anatomy["blocks.1.neurons"], []
    engine = reference.Reference(plan.calibration, 1)
    expected = engine.score(site, np.arange(8))
    real = engine._measure

    def tight(replay, site, units, *rest):
        sizes.append(len(units))
        if len(units) > 2:
            raise torch.OutOfMemoryError("made up")
        return real(replay, site, units, *rest)

    monkeypatch.setattr(engine, "_measure", tight)
    for one, two in zip(expected, engine.score(site, np.arange(8)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4)
    assert max(sizes) > 2 and sizes[-1] <= 2


def test_heads_of_image_models_stay(tmp_path):
    plan = plan_for("timm-vit", tmp_path)
    ranking = stage.score(plan, tmp_path / "r.h5")
    keep = select(ranking, 0.6).keep
    assert all(len(keep[s.name]) == s.units for s in ranking.sites if s.kind == "heads")
    assert sum(len(keep[s.name]) for s in ranking.sites if s.kind == "neurons") > 0
    assert all((s.score > 0).all() for s in ranking.sites)


def test_models_without_classes_have_no_divergence(tmp_path):
    ranking = stage.score(plan_for("bert", tmp_path, head="encoder"), tmp_path / "r.h5")
    assert all((s.output == 0).all() and (s.score > 0).all() for s in ranking.sites)


def test_lambda_is_the_papers(tmp_path):
    """A larger lambda keeps more of the divergence; 0 none of it."""
    plan = plan_for("bert", tmp_path)
    ranking = stage.score(plan, tmp_path / "r.h5")
    assert ranking.settings["output_weight"] == 0.1
    assert ranking.settings["recombines"] is False
    none, usual, more = (reference.combine(ranking.sites, weight) for weight in (0.0, 0.1, 10.0))
    for site in ranking.sites:
        envelope = none[site.name] / site.trajectory.sum(1)
        assert (np.diff(envelope) < 0).all()
        assert envelope[0] / envelope[-1] == pytest.approx(10 if site.kind == "heads" else 100)
        assert (usual[site.name] >= none[site.name]).all()
        assert more[site.name].sum() > usual[site.name].sum()


def test_nothing_is_kept_by_batch(tmp_path):
    ranking = stage.score(plan_for("bert", tmp_path), tmp_path / "r.h5")
    assert all(site.by_batch.shape == (0, site.units, 2) for site in ranking.sites)
    assert read_sketch(tmp_path / "r.h5") is None


def test_an_interrupted_run_resumes_and_ends_the_same(tmp_path):
    settings = dataclasses.replace(SMALL, rows=20)
    whole = stage.score(plan_for("bert", tmp_path, settings), tmp_path / "whole.h5")

    def stop(done, total, what):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.score(plan_for("bert", tmp_path, settings), tmp_path / "r.h5", stop)
    assert len(list((tmp_path / ".r.h5.partial").glob("*.npz"))) > 0
    assert stage.score(plan_for("bert", tmp_path, settings), tmp_path / "r.h5").digest == whole.digest


def test_estimate_is_a_time(tmp_path):
    assert estimate_seconds(plan_for("bert", tmp_path)) > 0
