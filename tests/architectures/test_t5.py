"""Encoder-decoders: T5's position biases that all blocks share, and generation with both caches."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.data import tiny_text_csv
from helpers.families import BLOCKS, ENCODER_DECODERS
from helpers.models import opened, randomise, saved_model, shared_model
from helpers.runs import outputs, random_inputs
from torch import nn

import optin_cli as optin
from optin_cli.architectures.resolve import dissect
from optin_cli.compensation.plan import make_plan as plan_compensation
from optin_cli.compensation.settings import Compensation
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.pruning.apply import apply
from optin_cli.scoring import score as scoring
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.selection.select import select
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import slice_model

every_one = pytest.mark.parametrize("name", ENCODER_DECODERS)


def some(model: OpenModel, empty: tuple[str, ...] = ()) -> dict[str, list[int]]:
    """Other units in each site, none of those whose names begin as one of `empty`."""
    return {
        site.name: [] if site.name.startswith(empty) else [u for u in range(site.units) if (u + i) % 3]
        for i, site in enumerate(model.anatomy)
    }


CASES = {
    "uneven": (),
    "no head makes the encoder's biases": ("blocks.0.heads",),
    "no head makes the decoder's biases": ("blocks.3.heads",),
    "no head in the middle": ("blocks.1.heads", "blocks.4"),
    "first cross-attention empty": ("blocks.3.cross",),
}


def generated(module: nn.Module, ids: torch.Tensor, **options) -> torch.Tensor:
    found = module.generate(
        input_ids=ids, max_new_tokens=7, min_new_tokens=7, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return torch.stack(found.logits)


@every_one
@pytest.mark.parametrize("case", CASES)
def test_a_sliced_model_generates_what_the_masked_one_does(name, case):
    model = opened(saved_model(name))
    keep = some(model, CASES[case])
    ids = random_inputs(model, batch=1)["input_ids"]
    with masked(model.module, model.anatomy, masks_from_keep(model.anatomy, keep)):
        expected = generated(model.module, ids, use_cache=False)
    smaller = copy.deepcopy(model.module)
    slice_model(smaller, model.anatomy, keep)
    for options in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.testing.assert_close(generated(smaller, ids, **options), expected, rtol=0, atol=1e-4)


@every_one
@pytest.mark.parametrize("case", CASES)
def test_pruned_twice_each_head_keeps_its_own_biases(name, case):
    model = shared_model(name)
    keep = some(model, CASES[case])
    smaller = copy.deepcopy(model.module)
    slice_model(smaller, model.anatomy, {site.name: list(range(1, site.units)) for site in model.anatomy})
    again = dissect(smaller, model.family)
    keep = {site: [unit for unit in kept if unit] for site, kept in keep.items()}
    slice_model(smaller, again, {site: [unit - 1 for unit in kept] for site, kept in keep.items()})
    with masked(model.module, model.anatomy, masks_from_keep(model.anatomy, keep)):
        expected = outputs(model, model.module, random_inputs(model))
    for module in (smaller, copy.deepcopy(smaller)):
        found = outputs(model, module, random_inputs(model))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_biases_are_no_longer_than_one_call():
    """Nothing of a batch is held when it is through."""
    model = shared_model("t5")
    smaller = copy.deepcopy(model.module)
    slice_model(smaller, model.anatomy, {site.name: [0, 2] for site in model.anatomy})
    model.task.output(smaller, random_inputs(model))
    kept = [module.optin_whole for module in smaller.modules() if hasattr(module, "optin_whole")]
    assert kept
    assert all(biases == {"position_bias": None} for biases in kept)


def test_an_encoder_alone_is_an_embedding_model(tmp_path):
    """Scored, pruned and compensated without its decoder, in texts of many lengths."""
    folder = str(saved_model("t5"))
    dense = opened(folder, task="embedding")
    assert len(dense.anatomy.blocks) == BLOCKS
    data = DataSpec(str(tiny_text_csv(tmp_path)))
    plan = make_plan(opened(folder, task="embedding"), data, ScoreSettings(samples=12, batch_size=4))
    mask = select(scoring.score(plan, tmp_path / "r.h5"), 0.5)
    wanted = plan_compensation(plan.model, mask, Compensation(batch_size=8), at_most=True)
    applied = apply(plan.model, mask, tmp_path / "pruned", plan=wanted)
    assert applied.deviation <= 1e-5
    assert any(fit.after < 0.95 * fit.before for fit in applied.fits)
    pruned = opened(tmp_path / "pruned")
    assert type(pruned.module).__name__ == "T5EncoderModel"
    assert {site.name: site.units for site in pruned.anatomy} == {n: len(k) for n, k in mask.keep.items()}


BARTS = ("BartForSequenceClassification", "MBartForConditionalGeneration", "PegasusForConditionalGeneration",
         "PLBartForConditionalGeneration", "BlenderbotForConditionalGeneration",
         "BlenderbotSmallForConditionalGeneration")  # fmt: skip


@pytest.mark.parametrize("class_name", BARTS)
def test_what_is_built_like_bart_has_its_sites(class_name):
    """Of a model in memory: sliced equals masked, with units of every site gone."""
    import transformers

    cls = getattr(transformers, class_name)
    module = randomise(cls(cls.config_class(**ENCODER_DECODERS["bart"][1]))).eval()
    model = optin.open_model(module)
    assert model.family.name == "bart"
    assert {site.label for site in model.anatomy} == {"heads", "cross", "neurons"}
    assert len(model.anatomy.blocks) == 2 * BLOCKS
    keep = some(model)
    inputs = random_inputs(model)
    inputs["input_ids"][:, 0] = (
        model.module.config.eos_token_id
    )  # a classifier reads the last one of each text
    if class_name.endswith("Classification"):
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    smaller = copy.deepcopy(model.module)
    slice_model(smaller, model.anatomy, keep)
    with masked(model.module, model.anatomy, masks_from_keep(model.anatomy, keep)):
        expected = outputs(model, model.module, inputs)
    torch.testing.assert_close(outputs(model, smaller, inputs), expected, rtol=0, atol=1e-5)
