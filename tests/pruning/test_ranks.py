"""From scores to a directory with heads at lower ranks, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.data import tiny_text_csv
from helpers.models import opened, saved_model, shared_model
from helpers.pruning import data_for
from helpers.runs import outputs, random_inputs

from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.pruned import read_pruned
from optin_cli.artefacts.ranking import Ranking, read_ranking
from optin_cli.compensation.plan import make_plan as plan_compensation
from optin_cli.compensation.settings import Compensation
from optin_cli.data.sources import DataSpec
from optin_cli.errors import ArtefactError, InputError
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.loading.from_module import copy_of
from optin_cli.pruning.apply import apply, existing, prune_model
from optin_cli.scoring.plan import make_plan
from optin_cli.scoring.score import score
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

FAMILIES = [
    "bert",
    "mpnet",
    "distilbert",
    "vit",
    "timm-vit",
    "gpt2",
    "opt",
    "t5",
    "whisper",
    "clip-vision",
    "swin",
]


def ranked(model: OpenModel, folder, data: DataSpec | None = None) -> Ranking:
    settings = ScoreSettings(samples=12, batch_size=6, probes=1, ranks=True)
    return score(make_plan(model, data or data_for(model), settings), folder / "r.h5")


def cut(ranking: Ranking, flops: float = 0.5) -> Mask:
    """A mask that cuts heads, whatever the scores of a random model say of heads and ranks."""
    mask = select(ranking, Request(flops=flops, ranks=True))
    ranks = {one.site: len(one.output) // 2 for one in ranking.rank_sites[::2] if mask.keep[one.site]}
    return replace(mask, ranks=ranks or {ranking.rank_sites[0].site: 1})


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_what_was_masked_and_opens_again(name, tmp_path):
    model = opened(saved_model(name))
    ranking = ranked(model, tmp_path)
    assert [one.site for one in ranking.rank_sites] == [s.name for s in model.anatomy if s.ranks]
    assert read_ranking(tmp_path / "r.h5").digest == ranking.digest
    mask = cut(ranking)
    plan = plan_compensation(model, mask, Compensation(batch_size=6, samples=12), at_most=True)
    applied = apply(model, mask, tmp_path / "out", plan=plan)
    assert applied.deviation <= 1e-5
    smaller = opened(tmp_path / "out")
    for site in smaller.anatomy:
        assert site.units == len(mask.keep[site.name])
        if site.name in mask.ranks and site.units:
            assert site.width == mask.ranks[site.name]
            label = "head_dim" if site.label == "heads" else "cross_head_dim"
            assert smaller.record.per_layer_config[str(site.block)][label] == site.width
    again = existing(tmp_path / "out", shared_model(name), mask, plan)
    assert again is not None
    assert again.reused


def test_without_data_at_hand_the_mask_remembers_rows_to_turn_heads_on(tmp_path):
    model = opened(saved_model("bert"))
    path = tiny_text_csv(tmp_path)
    mask = cut(ranked(model, tmp_path, DataSpec(str(path))))
    assert apply(model, mask, tmp_path / "out").deviation <= 1e-5
    path.unlink()
    with pytest.raises(InputError, match="can't be read again to turn its heads"):
        apply(opened(saved_model("bert")), mask, tmp_path / "other")
    rows = DataSpec(str(tiny_text_csv(tmp_path / "more")))
    model = opened(saved_model("bert"))
    plan = plan_compensation(model, mask, Compensation(samples=12), rows, at_most=True)
    assert apply(model, mask, tmp_path / "other", plan=plan).deviation <= 1e-5


def test_a_second_pruning_cuts_further_and_follows_the_dense_model(tmp_path):
    model = opened(saved_model("bert"))
    mask = cut(ranked(model, tmp_path), 0.7)
    plan = plan_compensation(model, mask, Compensation(samples=12), at_most=True)
    apply(model, mask, tmp_path / "first", plan=plan)
    smaller = opened(tmp_path / "first")
    name = next(iter(mask.ranks))
    (tmp_path / "second").mkdir()
    second = select(ranked(smaller, tmp_path / "second"), Request(flops=0.5, ranks=True))
    second = replace(second, ranks={name: mask.ranks[name] - 1})
    plan = plan_compensation(smaller, second, Compensation(samples=12), at_most=True)
    applied = apply(smaller, second, tmp_path / "twice", plan=plan, teacher=shared_model("bert"))
    assert applied.deviation <= 1e-5
    twice = opened(tmp_path / "twice")
    assert twice.anatomy[name].width == mask.ranks[name] - 1
    refitted = {fit.layer for fit in applied.fits if fit.site == name}
    assert refitted == {twice.anatomy[name].consumer}  # what made the heads did so in other bases
    assert read_pruned(tmp_path / "twice").per_layer_config["0"]["head_dim"] == mask.ranks[name] - 1


def test_a_rank_of_nothing_is_no_head(tmp_path):
    model = opened(saved_model("bert"))
    mask = select(ranked(model, tmp_path), Request(flops=0.9, ranks=False))
    name = "blocks.1.heads"
    without = replace(mask, keep={**mask.keep, name: []})
    nothing = replace(mask, ranks={name: 0})
    inputs = random_inputs(model)
    one, two = (prune_model(copy_of(model), m) for m in (without, nothing))
    torch.testing.assert_close(
        outputs(one, one.module, inputs), outputs(two, two.module, inputs), rtol=0, atol=0
    )


def test_masks_of_ranks_that_a_model_can_t_have_are_refused(tmp_path):
    model = opened(saved_model("bert"))
    mask = cut(ranked(model, tmp_path))
    with pytest.raises(ArtefactError, match=r"keeps 9 dimensions of blocks\.0\.heads, and .* has heads of 8"):
        apply(
            model,
            replace(mask, keep={**mask.keep, "blocks.0.heads": [0]}, ranks={"blocks.0.heads": 9}),
            tmp_path / "o",
        )
    with pytest.raises(ArtefactError, match="has neurons that have no rank"):
        apply(
            model,
            replace(mask, keep={**mask.keep, "blocks.0.neurons": [0]}, ranks={"blocks.0.neurons": 1}),
            tmp_path / "o",
        )
    llama = opened(saved_model("llama"))
    (tmp_path / "llama").mkdir()
    settings = ScoreSettings(method="magnitude", samples=8)
    whole = score(make_plan(llama, data_for(llama), settings), tmp_path / "llama" / "r.h5")
    with pytest.raises(InputError, match="no heads that can be cut to a lower rank"):
        apply(llama, replace(select(whole, 0.9), ranks={"blocks.0.heads": 2}), tmp_path / "o")
    with pytest.raises(InputError, match="no heads that can be cut to a lower rank"):
        make_plan(llama, data_for(llama), ScoreSettings(samples=8, ranks=True))


def test_records_say_what_is_left_of_heads(tmp_path):
    model = opened(saved_model("vit"))
    mask = cut(ranked(model, tmp_path))
    apply(model, mask, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "optin.json").read_text())
    for name, rank in mask.ranks.items():
        assert told["per_layer_config"][name.split(".")[1]]["head_dim"] == rank
