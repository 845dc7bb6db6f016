"""What decoders add to the promises of all families: they generate after slicing, with a cache and without."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.data import tiny_text_csv
from helpers.families import BLOCKS, DECODERS, ENCODER_DECODERS
from helpers.lazy import Lazy
from helpers.models import in_dtype, opened, randomise, saved_model, shared_model
from helpers.runs import random_inputs
from torch import nn

from optin_cli.architectures.resolve import dissect, family_of
from optin_cli.artefacts.mask import Mask
from optin_cli.compensation.compensate import compensate
from optin_cli.compensation.read_positions import read_positions
from optin_cli.compensation.row_sampling import RowChoice
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.columns import Columns
from optin_cli.data.examples import Examples
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel, load
from optin_cli.pruning.apply import apply
from optin_cli.scoring import score as scoring
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.selection.select import select
from optin_cli.tasks.sequences import SequenceClassification
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import slice_model

datasets = Lazy("datasets")
transformers = Lazy("transformers")

every_decoder = pytest.mark.parametrize("name", DECODERS)
UNEVEN = {
    f"blocks.{block}.{kind}": units
    for block, (heads, neurons) in enumerate([([1, 3], range(0, 50, 3)), ([2], [5]), ([0, 1, 3], [])])
    for kind, units in {"heads": heads, "neurons": list(neurons)}.items()
}
"""Another number of heads in each block."""
KEPT = {
    "uneven": UNEVEN,
    "first block empty": {**UNEVEN, "blocks.0.heads": []},
    "no head at all": {**UNEVEN, **{f"blocks.{block}.heads": [] for block in range(BLOCKS)}},
}


def generated(module: nn.Module, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    """Greedy continuations of unpadded prompts, with the logits they were chosen by: (steps, batch, vocabulary)."""
    found = module.generate(
        input_ids=inputs["input_ids"], attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=8,
        min_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return torch.stack(found.logits)


@every_decoder
@pytest.mark.parametrize("case", KEPT)
def test_a_sliced_decoder_generates_what_the_masked_one_does(name, case):
    model = transformers.AutoModelForCausalLM.from_pretrained(saved_model(name)).eval()
    anatomy = dissect(model, family_of(model))
    prompts = random_inputs(shared_model(name))
    with masked(model, anatomy, masks_from_keep(anatomy, KEPT[case])):
        expected = generated(model, prompts, use_cache=False)
    smaller = copy.deepcopy(model)
    slice_model(smaller, anatomy, KEPT[case])
    for options in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.testing.assert_close(generated(smaller, prompts, **options), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_what_is_measured_fills_no_cache(name):
    """A block that is run again with the arguments of its first run would read its own keys there."""
    model = shared_model(name)
    with torch.no_grad():
        assert model.run(random_inputs(model)).past_key_values is None


def test_a_group_goes_with_the_query_heads_that_share_its_keys():
    """Oracle: the weights of a grouped attention, cut by hand."""
    model = shared_model("llama")
    smaller = copy.deepcopy(model.module)
    slice_model(smaller, model.anatomy, {"blocks.1.heads": [2]})
    whole, cut = (
        module.get_submodule(f"{model.anatomy.blocks[1]}.self_attn") for module in (model.module, smaller)
    )
    assert torch.equal(cut.q_proj.weight, whole.q_proj.weight[16:24])
    assert torch.equal(cut.k_proj.weight, whole.k_proj.weight[8:12])
    assert torch.equal(cut.v_proj.bias, whole.v_proj.bias[8:12])
    assert torch.equal(cut.o_proj.weight, whole.o_proj.weight[:, 16:24])


def test_a_fused_projection_by_head_loses_the_rows_of_its_heads():
    model = shared_model("gpt-neox")
    smaller = copy.deepcopy(model.module)
    slice_model(smaller, model.anatomy, {"blocks.0.heads": [1, 3]})
    path = f"{model.anatomy.blocks[0]}.attention.query_key_value"
    whole, cut = (module.get_submodule(path).weight for module in (model.module, smaller))
    assert torch.equal(cut, whole.view(4, 24, -1)[[1, 3]].flatten(0, 1))


def test_a_conv1d_is_cut_along_its_other_axis():
    model = shared_model("gpt2")
    smaller = copy.deepcopy(model.module)
    slice_model(smaller, model.anatomy, {"blocks.0.neurons": [3, 5], "blocks.1.neurons": []})
    whole, cut = (
        module.get_submodule(f"{model.anatomy.blocks[0]}.mlp") for module in (model.module, smaller)
    )
    assert torch.equal(cut.c_fc.weight, whole.c_fc.weight[:, [3, 5]])
    assert torch.equal(cut.c_proj.weight, whole.c_proj.weight[[3, 5]])
    assert (cut.c_fc.nf, cut.c_proj.nx) == (2, 2)
    empty = smaller.get_submodule(f"{model.anatomy.blocks[1]}.mlp")
    torch.testing.assert_close(empty(torch.randn(2, 3, 32)), empty.c_proj.bias.expand(2, 3, -1))


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_a_pruned_decoder_on_disk_generates(name, tmp_path):
    dense = opened(saved_model(name))
    prompts = random_inputs(dense)
    with masked(dense.module, dense.anatomy, masks_from_keep(dense.anatomy, UNEVEN)):
        expected = generated(dense.module, prompts, use_cache=False)
    mask = mask_of(dense, UNEVEN, tmp_path)
    assert apply(opened(saved_model(name)), mask, tmp_path / "pruned").deviation <= 1e-5
    loaded = load(tmp_path / "pruned")
    torch.testing.assert_close(generated(loaded, prompts), expected, rtol=0, atol=1e-4)
    record = json.loads((tmp_path / "pruned" / "optin.json").read_text())
    if name == "llama":
        assert record["per_layer_config"]["0"] == {
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 17
        }  # fmt: skip
    again = opened(tmp_path / "pruned")
    assert again.task.name == "language-modeling"
    assert {site.name: site.units for site in again.anatomy} == {n: len(k) for n, k in UNEVEN.items()}


def mask_of(model: OpenModel, keep: dict[str, list[int]], folder: Path) -> Mask:
    """A mask with units of our own choice."""
    data = DataSpec(str(tiny_text_csv(folder)))
    settings = ScoreSettings(method="magnitude", samples=8)
    mask = select(scoring.score(make_plan(model, data, settings), folder / "r.h5"), 0.5)
    return dataclasses.replace(mask, keep=keep)


def test_rotary_frequencies_keep_their_digits(tmp_path):
    """Where weights are computed with as they are stored, transformers' own choice of float32 holds."""
    folder = in_dtype(saved_model("llama"), tmp_path / "half", "bfloat16")
    model = opened(folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.module.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_last_token_that_stands_elsewhere_in_each_text_is_no_position_to_fit():
    """A classifying decoder reads its last token: in texts of one length that is one position, by chance."""
    config = transformers.GPT2Config(
        vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, num_labels=2
    )
    module = randomise(transformers.GPT2ForSequenceClassification(config)).eval().requires_grad_(False)
    family = family_of(module)
    model = dataclasses.replace(
        shared_model("gpt2"),
        module=module,
        anatomy=dissect(module, family),
        task=SequenceClassification({}, 2),
    )
    examples = [f"{' '.join(['cat'] * length)}" for length in (3, 3, 3, 3, 7, 7, 7, 7)]
    rows = datasets.Dataset.from_dict({"text": examples})
    found = Examples(DataSpec("memory"), Columns(("text",)), list(range(8)), rows, 8, "")
    batches = Batches(found, model.processor, 4)
    assert read_positions(model, batches[0]) != read_positions(model, batches[1])
    keep = {site.name: list(range(0, site.units, 2)) for site in model.anatomy}
    seen = []
    weights = RowChoice.weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RowChoice,
            "weights",
            lambda self, *args, **named: seen.append(self.read) or weights(self, *args, **named),
        )
        compensate(model, keep, batches, Compensation(method="full", held_out=2))
    assert seen
    assert set(map(str, seen)) == {"None"}
