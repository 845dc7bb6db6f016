"""Scores of ranks: those of a probe's gradients against cutting a little of the last dimensions off."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from helpers.brute_force import calibrate
from helpers.models import opened, saved_model, shared_model
from helpers.pruning import data_for

from optin_cli.errors import UsageError
from optin_cli.execution.hooks import block_outputs
from optin_cli.execution.rotation import with_turned_heads
from optin_cli.scoring.calibration import measured_blocks
from optin_cli.scoring.graphs import dimension_features, record_graph
from optin_cli.scoring.losses import output_change, relational_change, unit_rows
from optin_cli.scoring.methods.curvature import curvature
from optin_cli.scoring.methods.registry import configured
from optin_cli.scoring.plan import make_plan
from optin_cli.scoring.score import score
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.structure.anatomy import DIMENSIONS


def turned(name):
    """A calibration on a model whose heads are turned, with sites for their dimensions."""
    calibration = calibrate(shared_model(name))
    model = with_turned_heads(calibration.model, calibration.batches)
    calibration.model = dataclasses.replace(model, anatomy=model.anatomy.with_dimensions())
    return calibration


def forward(calibration, site, factor):
    """Features and output of batch 0 with the dimensions of queries and context multiplied by `factor` [width]."""
    model, batch, features = calibration.model, calibration.batch(0), {}
    context, queries = dimension_features(site)
    each = factor.repeat_interleave(site.width)  # dimension after dimension, head after head

    def scaled(tensor, of):
        whole = torch.ones(tensor.shape[-1], dtype=tensor.dtype).index_copy(0, of, each.to(tensor))
        return tensor * whole

    with ExitStack() as stack, torch.inference_mode(), block_outputs(model, features):
        query = model.module.get_submodule(site.attended[0][0].path)
        consumer = model.module.get_submodule(site.consumer)
        stack.callback(query.register_forward_hook(lambda _, __, out: scaled(out, queries)).remove)
        stack.callback(consumer.register_forward_pre_hook(lambda _, args: (scaled(args[0], context),)).remove)
        output = model.output(batch.inputs)
    rows = calibration.feature_rows(0, [batch], {z: [f.shape[1]] for z, f in features.items()})
    return {z: unit_rows(f.flatten(0, 1)[rows[z][0]]) for z, f in features.items()}, output


@pytest.mark.parametrize("name", ["bert", "mpnet", "timm-vit", "gpt2"])
def test_gradients_of_ranks_are_those_of_all_dimensions_that_go(name):
    """Oracle: the output moves by the gradient times the step when the last dimensions are scaled a little."""
    calibration = turned(name)
    model, batch = calibration.model, calibration.batch(0)
    site = next(s for s in model.anatomy if s.kind == DIMENSIONS and s.block == 1)
    graph = record_graph(model, batch, [site])
    seed = torch.randn(graph.output.shape, generator=torch.Generator().manual_seed(0))
    (found,) = graph.gradients([graph.output], [seed], [site], reduced=False)
    step = 0.01
    for rank in (0, site.units // 2, site.units - 1):
        ends = []
        for sign in (1, -1):
            factor = torch.ones(site.units)
            factor[rank:] += sign * step
            ends.append((forward(calibration, site, factor)[1] * seed).sum())
        assert float(found[:, rank].sum()) == pytest.approx(
            float(ends[0] - ends[1]) / (2 * step), rel=0.01, abs=1e-3
        )


@pytest.mark.parametrize("name", ["bert", pytest.param("timm-vit", marks=pytest.mark.slow)])
def test_curvature_estimates_the_second_order_change_of_a_lower_rank(name):
    """Oracle: a small part of the last dimensions taken off, where the second-order term is all there is."""
    calibration = turned(name)
    site = next(s for s in calibration.model.anatomy if s.kind == DIMENSIONS)
    found = curvature(calibration, 0, [site], range(64))
    dense, y = forward(calibration, site, torch.ones(site.units))
    task, step = calibration.model.task, 0.02
    weights = calibration.model.row_weights(calibration.batch(0).inputs, y)
    columns = measured_blocks(site, len(calibration.model.anatomy.blocks))
    expected = []
    for rank in range(site.units):
        factor = torch.ones(site.units)
        factor[rank:] -= step
        variant, changed = forward(calibration, site, factor)
        parts = [float(relational_change(dense[z], variant[z][None])) / step**2 for z in columns]
        settings = {"temperature": calibration.temperature, "term": task.term}
        expected.append(
            [*parts, float(output_change(y, changed[None], weights, **settings) / weights.sum()) / step**2]
        )
    probed = np.column_stack([found.trajectory[site.name], found.output[site.name]]) / 64
    for column in range(probed.shape[1]):
        want = np.array(expected)[:, column]
        # a few examples share much, which probes don't see: about the same, not the same
        ratio = np.log(probed[:, column] / want)
        assert np.abs(ratio).max() < np.log(4)
        assert np.corrcoef(np.log(probed[:, column]), np.log(want))[0, 1] > 0.9


def test_rankings_hold_ranks_beside_units_and_no_sketch_of_them(tmp_path):
    settings = ScoreSettings(samples=12, batch_size=6, probes=1, ranks=True)
    model = opened(saved_model("bert"))
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    ranking = score(make_plan(model, data_for(model), settings), tmp_path / "r.h5")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    heads = [site for site in ranking.sites if site.kind == "heads"]
    assert [one.site for one in ranking.rank_sites] == [site.name for site in heads]
    for one, site in zip(ranking.rank_sites, heads, strict=True):
        assert one.trajectory.shape == (site.width, len(site.columns))
        assert one.output.shape == (site.width,)
        assert (one.trajectory >= 0).all()
    assert {site.kind for site in ranking.sites} == {"heads", "neurons"}


def test_methods_without_curvature_have_no_ranks():
    with pytest.raises(UsageError, match="needs the curvature of ranks, and method='fisher' has none"):
        configured(ScoreSettings(method="fisher", ranks=True))
