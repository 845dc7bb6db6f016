"""A site of one unit is ablated: behind a norm its derivative says nothing."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.data import tiny_text_csv
from helpers.lazy import Lazy
from helpers.models import copy_of, randomise, saved_model

from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.scoring.plan import Plan, make_plan
from optin_cli.scoring.score import score
from optin_cli.scoring.settings import ScoreSettings

transformers = Lazy("transformers")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> OpenModel:
    """Gemma 3 with one head in each block, and a norm behind each sublayer."""
    source = saved_model("gemma3")
    folder = copy_of(source, tmp_path_factory.mktemp("lone") / "gemma")
    config = transformers.AutoConfig.from_pretrained(source)
    config.num_attention_heads = config.num_key_value_heads = 1
    named = getattr(transformers, config.architectures[0])
    randomise(named(config)).save_pretrained(folder)
    return open_model(str(folder))


def plan_for(model: OpenModel, folder, **settings) -> Plan:
    asked = ScoreSettings(samples=12, batch_size=6, **settings)
    return make_plan(model, DataSpec(str(tiny_text_csv(folder, pairs=False))), asked)


def test_an_attention_of_one_head_scores_what_ablation_gives(gemma, tmp_path):
    curved = score(plan_for(gemma, tmp_path), tmp_path / "c.h5")
    exact = score(plan_for(gemma, tmp_path, method="ablation"), tmp_path / "a.h5")
    lone = [site.name for site in curved.sites if site.units == 1]
    assert lone == [f"blocks.{block}.heads" for block in range(len(gemma.anatomy.blocks))]
    for one, other in zip(curved.sites, exact.sites, strict=True):
        if one.name in lone:
            np.testing.assert_allclose(one.trajectory, other.trajectory, rtol=1e-6)
            np.testing.assert_allclose(one.output, other.output, rtol=1e-6)
            assert one.trajectory.sum() > 0
        else:
            assert not np.allclose(one.output, other.output, rtol=1e-3)  # probed


def test_it_makes_another_ranking_than_before(gemma, tmp_path):
    assert plan_for(gemma, tmp_path).identity()["lone_units"] == "ablation"
    assert "lone_units" not in plan_for(gemma, tmp_path, method="ablation").identity()
    assert "lone_units" not in plan_for(open_model(str(saved_model("bert"))), tmp_path).identity()


def test_so_do_query_heads_that_are_units(tmp_path):
    """Before, all of a block were one."""
    one, several = (
        plan_for(open_model(str(saved_model(name))), tmp_path) for name in ("gemma3-one-group", "gemma3")
    )
    assert one.identity()["query_heads"] and "query_heads" not in several.identity()
    assert "lone_units" not in one.identity()
