"""Depth: block influence by its definition, and masks of whole blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.cli import FAST, run
from helpers.data import tiny_text_csv
from helpers.models import saved_model, shared_model
from helpers.pruning import data_for
from torch.nn import functional as F

from optin_cli.artefacts.mask import read_mask
from optin_cli.artefacts.ranking import read_ranking
from optin_cli.errors import InputError, UsageError
from optin_cli.scoring import score as stage
from optin_cli.scoring.plan import Plan, make_plan
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.selection.select import emptied_sites, select
from optin_cli.selection.settings import Request


def plan_for(name: str) -> Plan:
    model = shared_model(name)
    settings = ScoreSettings(method="depth", samples=12, batch_size=4)
    return make_plan(model, data_for(model), settings)


def influence(plan: Plan) -> np.ndarray:
    """[blocks]: 1 - the mean cosine over the real tokens of a batch, a mean over the examples."""
    blocks, total = plan.model.anatomy.blocks, np.zeros(len(plan.model.anatomy.blocks))
    for batch in plan.calibration.batches:
        cosines = []

        def keep(module, args, kwargs, output, cosines=cosines):
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines.append(F.cosine_similarity(before, after, dim=-1))

        handles = [
            plan.model.module.get_submodule(path).register_forward_hook(keep, with_kwargs=True)
            for path in dict.fromkeys(blocks)
        ]
        with torch.inference_mode():
            plan.model.output(batch.inputs)
        for handle in handles:
            handle.remove()
        for z, found in enumerate(cosines):
            real = batch.real(plan.model.anatomy.stream_of(z).mask)
            mean = float((found if real is None else found[real]).double().mean())
            total[z] += (1 - mean) * len(batch) / plan.calibration.batches.count
    return total


@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma3", "gpt-neox", "t5", "timm-vit", "albert"])
def test_the_units_of_a_block_share_its_influence(name, tmp_path):
    plan = plan_for(name)
    found = stage.score(plan, tmp_path / "r.h5")
    anatomy, each = plan.model.anatomy, influence(plan)
    expected = {z: sum(each[np.array(anatomy.blocks) == path]) for z, path in enumerate(anatomy.blocks)}
    for block in {site.block for site in anatomy}:
        sites = [site for site in found.sites if site.block == block]
        assert sum(site.score.sum() for site in sites) == pytest.approx(expected[block], rel=1e-3)
        worth = np.concatenate([site.score / site.macs_per_unit(found.tokens) for site in sites])
        assert np.ptp(worth) <= 1e-6 * worth.max()
        assert all(np.allclose(site.output, expected[block], rtol=1e-3) for site in sites)


def test_blocks_that_change_the_shape_have_no_angle(tmp_path):
    with pytest.raises(InputError, match=r"block \d .* there is no angle"):
        stage.score(plan_for("swin"), tmp_path / "r.h5")


@pytest.mark.parametrize("flops", [0.95, 0.7, 0.67, 0.4, 0.34])
def test_masks_hold_whole_blocks_the_most_influential_ones(flops, tmp_path):
    plan = plan_for("bert")
    mask = select(stage.score(plan, tmp_path / "r.h5"), flops)
    expected = influence(plan)
    there = {}
    for site in plan.model.anatomy:
        kept = len(mask.keep[site.name])
        assert kept in (0, site.units)
        assert there.setdefault(site.block, bool(kept)) == bool(kept)
    count = int(3 * flops)  # three blocks of one size
    assert {block for block, kept in there.items() if kept} == set(np.argsort(-expected)[:count].tolist())
    assert mask.reached["flops"] == pytest.approx(count / 3) and mask.objective["optimal"]


def test_a_pruned_model_has_lost_whole_blocks(tmp_path):
    data, output = tiny_text_csv(tmp_path), tmp_path / "out"
    arguments = ["prune", saved_model("gpt2"), "--data", data, "--flops", 0.5, "-o", output, *FAST]
    run(*arguments, "--method", "depth", "--ranking", tmp_path / "r.h5", "--compensate", "none")
    ranking = read_ranking(tmp_path / "r.h5")
    mask = select(ranking, 0.5)
    assert len(emptied_sites(mask)) == 4  # two of three blocks
    run("select", tmp_path / "r.h5", "--flops", 0.5, "-o", tmp_path / "m.json")
    assert read_mask(tmp_path / "m.json").keep == mask.keep


def test_requests_that_part_a_block_are_refused(tmp_path):
    ranking = stage.score(plan_for("bert"), tmp_path / "r.h5")
    for request in (Request(flops=0.5, uniform=True), Request(flops=0.5, merge="joint")):
        with pytest.raises(UsageError, match="whole blocks"):
            select(ranking, request)
