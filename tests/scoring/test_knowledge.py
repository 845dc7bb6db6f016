"""Knowledge: each part against what it stands for, on every kind of family and task."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import opened, shared_model, tiny_model
from torch.nn import functional as F

from optin_cli.artefacts.ranking import read_sketch
from optin_cli.data.sources import DataSpec
from optin_cli.scoring import score as stage
from optin_cli.scoring.plan import Plan, ScoreSettings, make_plan
from optin_cli.scoring.runner import Worker
from optin_cli.transforms.masking import masked

SMALL = ScoreSettings(method="knowledge", samples=10, batch_size=4)


def plan_for(case: str, folder, settings=SMALL) -> Plan:
    image = case in ("vit", "timm-vit")
    data = tiny_image_folder(folder, 10) if image else tiny_text_csv(folder, 10, labels=None)
    if case == "value":
        return make_plan(
            opened(tiny_model("bert", folder / "value", num_labels=1)), DataSpec(str(data)), settings
        )
    name, _, head = case.partition("-") if not image else (case, "", "")
    return make_plan(shared_model(name, head or "classifier"), DataSpec(str(data)), settings)


def without(plan: Plan, masks: dict[str, torch.Tensor], consumer: str = "") -> tuple[list, list]:
    """(output rows, consumer's output on real tokens) of every batch under masks."""
    model, outputs, inner = plan.model, [], []
    for batch in plan.calibration.batches:

        def keep(_, __, output, valid=batch.valid):
            inner.append(output if valid is None else output[valid])

        inside = model.module.get_submodule(consumer) if consumer else None
        handle = inside.register_forward_hook(keep) if inside else None
        with torch.inference_mode(), masked(model.module, model.anatomy, masks):
            output = model.output(batch.inputs)
        outputs.append(output[model.task.row_weights(batch.inputs) > 0])
        if handle:
            handle.remove()
    return outputs, inner


def mask_of(site, unit: int, value: float = 0.0) -> dict[str, torch.Tensor]:
    mask = torch.ones(site.units)
    mask[unit] = value
    return {site.name: mask}


@pytest.mark.parametrize(
    "case", ["bert", pytest.param("mpnet", marks=pytest.mark.slow), "timm-vit", "bert-tagger", "bert-encoder"]
)
def test_representational_is_the_change_of_the_sub_layers_output(case, tmp_path):
    plan = plan_for(case, tmp_path)
    ranking = stage.score(plan, tmp_path / "r.h5")
    count = plan.calibration.batches.count
    for site, ranked in zip(plan.model.anatomy, ranking.sites, strict=True):
        assert ranked.columns == [site.block]
        assert ranked.trajectory.shape == (site.units, 1)
        _, dense = without(plan, {}, site.consumer)
        for unit in (1, site.units - 1):
            _, variant = without(plan, mask_of(site, unit), site.consumer)
            change = sum(float((a - b).square().sum()) for a, b in zip(dense, variant, strict=True))
            assert ranked.trajectory[unit, 0] == pytest.approx(change / count, rel=1e-3)


def divergence(plan: Plan, dense: list, variant: list) -> float:
    """tau^2 KL, or the squared error, a mean over examples (and tokens) in float64."""
    tau, total, rows = 2.0, 0.0, 0
    for one, two in zip(dense, variant, strict=True):
        if plan.model.task.term == "squares":
            total += float((one - two).double().square().sum())
        else:
            p, q = (F.log_softmax(x.double() / tau, -1) for x in (one, two))
            total += tau**2 * float((p.exp() * (p - q)).sum())
        rows += len(one)
    return total / rows


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("bert", marks=pytest.mark.slow),
        "vit",
        "bert-tagger",
        pytest.param("value", marks=pytest.mark.slow),
        "bert-encoder",
    ],
)
def test_predictive_is_the_curvature_of_the_divergence(case, tmp_path):
    """Oracle: a small step of one mask, where the second-order term is all there is."""
    probes = dataclasses.replace(SMALL, batch_size=10, probes=100, sketch_rows=0)
    plan = plan_for(case, tmp_path, probes)
    ranking = stage.score(plan, tmp_path / "r.h5")
    dense, _ = without(plan, {})
    step, ratios = 0.02, []
    for site, ranked in zip(plan.model.anatomy, ranking.sites, strict=True):
        for unit in (0, site.units - 1):  # both ends: an index that is off by one shows
            variants = (without(plan, mask_of(site, unit, 1 + s))[0] for s in (step, -step))
            exact = np.mean([divergence(plan, dense, v) for v in variants]) / step**2
            ratios.append(ranked.output[unit] / exact)
    assert np.mean(ratios) == pytest.approx(1, abs=0.06)
    np.testing.assert_allclose(ratios, 1, atol=0.4)


def test_score_weighs_the_two_parts_and_the_heads(tmp_path):
    plain = stage.score(plan_for("bert", tmp_path), tmp_path / "a.h5")
    settings = dataclasses.replace(SMALL, output_weight=0.5, head_weight=64.0)
    weighted = stage.score(plan_for("bert", tmp_path, settings), tmp_path / "b.h5")
    assert plain.settings["output_weight"] == 0.00025
    assert plain.settings["temperature"] == 2
    assert plain.settings["head_weight"] == 1
    assert weighted.settings["head_weight"] == 64
    for one, two in zip(plain.sites, weighted.sites, strict=True):
        np.testing.assert_allclose(one.score, one.output + 0.00025 * one.trajectory[:, 0])
        factor = 64 if two.kind == "heads" else 1
        np.testing.assert_allclose(two.score, factor * (one.output + 0.5 * one.trajectory[:, 0]))


def test_rankings_of_its_own_combination_say_so(tmp_path):
    assert stage.score(plan_for("bert", tmp_path), tmp_path / "a.h5").settings["recombines"] is False
    auto = ScoreSettings(samples=4, batch_size=4)
    assert stage.score(plan_for("bert", tmp_path, auto), tmp_path / "b.h5").settings["recombines"] is True


def test_the_sketch_is_predictive_and_adds_up_over_all_its_probes(tmp_path):
    ranking = stage.score(plan_for("bert", tmp_path), tmp_path / "r.h5")
    sketch = read_sketch(tmp_path / "r.h5")
    assert sketch.trajectory == {}
    assert np.bincount(sketch.examples).tolist() == [2] * 10  # two probes of ten examples
    for site in ranking.sites:
        np.testing.assert_allclose((sketch.output[site.name] ** 2).sum(0), site.output, rtol=0.02, atol=1e-7)


def test_padding_adds_nothing(tmp_path):
    """One batch of all lengths scores as batches of one length each."""
    one = stage.score(
        plan_for("bert", tmp_path, dataclasses.replace(SMALL, batch_size=10)), tmp_path / "a.h5"
    )
    two = stage.score(plan_for("bert", tmp_path, dataclasses.replace(SMALL, batch_size=1)), tmp_path / "b.h5")
    for a, b in zip(one.sites, two.sites, strict=True):
        np.testing.assert_allclose(a.trajectory, b.trajectory, rtol=1e-4)


def test_smaller_pieces_give_the_same_representations(tmp_path):
    whole = stage.score(plan_for("bert", tmp_path), tmp_path / "a.h5")
    plan = plan_for("bert", tmp_path)
    plan.calibration.graph_slots = 1
    for a, b in zip(whole.sites, stage.score(plan, tmp_path / "b.h5").sites, strict=True):
        np.testing.assert_allclose(a.trajectory, b.trajectory, rtol=1e-4)


def test_out_of_memory_makes_the_pieces_smaller(tmp_path, monkeypatch):
    from optin_cli.scoring.methods import knowledge

    plan, real, sizes = plan_for("bert", tmp_path), knowledge._measured, []

    def tight(calibration, index, sites, pieces, *rest):
        sizes.append(max(len(piece) for piece in pieces))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("made up")
        return real(calibration, index, sites, pieces, *rest)

    monkeypatch.setattr(knowledge, "_measured", tight)
    found = Worker(plan).run(Worker(plan).items()[0])
    assert sizes[0] > 1 and sizes[-1] == 1
    assert (found["blocks.0.neurons/t"] > 0).all()


def test_an_interrupted_run_resumes_and_ends_the_same(tmp_path):
    whole = stage.score(plan_for("bert", tmp_path), tmp_path / "whole.h5")

    def stop(done, total, what):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.score(plan_for("bert", tmp_path), tmp_path / "r.h5", stop)
    assert 0 < len(list((tmp_path / ".r.h5.partial").glob("*.npz"))) < 3
    assert stage.score(plan_for("bert", tmp_path), tmp_path / "r.h5").digest == whole.digest
