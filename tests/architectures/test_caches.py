"""Encoder-decoders that were pruned and written: whatever caches hold, they write what full forwards say."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from helpers.models import new_folder, opened, saved_model
from helpers.pruning import sliced_copy
from helpers.runs import random_inputs

import optin_cli as optin
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.transforms.masking import masked, masks_from_keep

NAMES = ("t5", "bart", "whisper")
CASES = {
    "the decoder's first layer has no attention": ("blocks.3.heads", "blocks.3.cross"),
    "its last layer has no attention": ("blocks.5.heads", "blocks.5.cross"),
    "a layer of encoder and decoder is empty": ("blocks.1", "blocks.4"),
}
"""Beside them each site keeps other units."""
EACH = [
    pytest.param(name, case, marks=() if i % len(CASES) == j else pytest.mark.slow)
    for i, name in enumerate(NAMES)
    for j, case in enumerate(CASES)
]
"""At every run each model, and each case in one of them."""
_NEW = 6


def kept(model: OpenModel, empty: tuple[str, ...]) -> dict[str, list[int]]:
    return {
        site.name: []
        if site.name.startswith(empty or "none")
        else [u for u in range(site.units) if (u + i) % 3]
        for i, site in enumerate(model.anatomy)
    }


@cache
def written(name: str, case: str) -> tuple[OpenModel, dict[str, list[int]], torch.nn.Module]:
    """The dense model, the units that are kept, and what the directory of the pruned one loads as."""
    model = opened(saved_model(name))
    keep, folder = kept(model, CASES[case]), new_folder() / "pruned"
    sliced_copy(saved_model(name), folder, keep)
    return model, keep, optin.load(folder)


def read_by_the_encoder(model: OpenModel) -> dict[str, torch.Tensor]:
    """A batch of texts of different lengths, or of recordings."""
    return {name: tensor for name, tensor in random_inputs(model).items() if not name.startswith("decoder")}


@torch.no_grad()
def logits_of_each_step(model: OpenModel, inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """After each of `ids` [tokens], the logits of one full forward of one example, without a cache or padding."""
    if "attention_mask" in inputs:
        inputs = {name: tensor[inputs["attention_mask"].bool()][None] for name, tensor in inputs.items()}
    return model.module(**inputs, decoder_input_ids=ids[None], use_cache=False).logits[0]


@pytest.mark.parametrize(("name", "case"), EACH)
def test_a_batch_is_written_as_full_forwards_of_the_masked_model_say(name, case):
    model, keep, module = written(name, case)
    inputs = read_by_the_encoder(model)
    found = module.generate(
        **inputs, max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    start = torch.tensor([model.module.config.decoder_start_token_id])
    for row, logits in enumerate(torch.stack(found.logits, dim=1)):  # [steps, tokens]
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        ids = torch.cat([start, found.sequences[row, -_NEW:]])
        with masked(model.module, model.anatomy, masks_from_keep(model.anatomy, keep)):
            expected = logits_of_each_step(model, one, ids[:-1])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert float((logits_of_each_step(model, one, ids[:-1]) - expected).abs().max()) > 0.1
        expected[:, model.module.config.eos_token_id] = -torch.inf
        assert ids[1:].tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize(("name", "case"), EACH)
def test_beams_take_their_caches_along(name, case):
    """Every cache is put into another order as beams replace each other, where a layer has nothing in it, too."""
    model, _, module = written(name, case)
    inputs = read_by_the_encoder(model)
    options = {"num_beams": 3, "max_new_tokens": _NEW, "min_new_tokens": _NEW, "output_scores": True}
    with_cache, without = (
        module.generate(**inputs, **options, use_cache=use, return_dict_in_generate=True)
        for use in (True, False)
    )
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(with_cache.sequences_scores, without.sequences_scores, rtol=0, atol=1e-4)
