"""The tracer on blocks made for one reason each."""

from __future__ import annotations

import pytest
import torch
from helpers.models import randomise
from helpers.traced import UNLISTED, reasons, traced
from torch import Tensor, nn

from optin_cli.architectures.resolve import dissect
from optin_cli.errors import InputError
from optin_cli.structure.anatomy import Producer
from optin_cli.tracing.propose import trace
from optin_cli.tracing.record import BATCH
from optin_cli.transforms.slicing import slice_model


def test_heads_whose_sharing_no_attribute_tells_are_left_out():
    from optin_cli.architectures.schema import SiteTable
    from optin_cli.tracing.describe import name_group
    from optin_cli.tracing.record import Call
    from optin_cli.tracing.verify import Trial, TrialFailure

    trial = Trial(Block(nn.Identity()), Call((), {}, None, (), ()), "")
    with pytest.raises(TrialFailure, match="2 heads share what k gives, and no attribute holds that number"):
        name_group(trial, SiteTable("heads", (Producer("q"), Producer("k", shared=True)), "o"), 2)


# ---- blocks made for one reason each ----


class Block(nn.Module):
    """x + down(between(act(up(x))))"""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.between = between
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.between(torch.relu(self.up(x))))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Roll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, -1)


class PerUnit(nn.Module):
    """What it gives depends on how many units there are."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.shape[-1]


def trace_stack(*blocks: nn.Module):
    torch.manual_seed(0)
    return trace(Stack(*blocks).eval(), {"x": torch.randn(BATCH, 5, 4)}, library="timm", modality="image")


def test_plain_blocks_of_no_library_are_traced():
    proposal = trace_stack(Block(nn.Identity()), Block(nn.Identity()))
    assert proposal.family.matches == ("Stack",) and proposal.family.blocks == "layers"
    assert [site.units for site in proposal.anatomy] == [6, 6]


@pytest.mark.parametrize(
    ("between", "said"),
    [(lambda: nn.LayerNorm(6), "its inputs are mixtures"), (Roll, "at other places")],
)
def test_units_that_mix_or_move_are_left_out(between, said):
    with pytest.raises(InputError, match=rf"no blocks are found in Stack.*layers\.\*\.down: .*{said}"):
        trace_stack(Block(between()), Block(between()))


def test_a_block_that_runs_without_units_but_computes_something_else_is_left_out():
    with pytest.raises(
        InputError, match=r"down \(all blocks\): the sliced block does not compute what the masked"
    ):
        trace_stack(Block(PerUnit()), Block(PerUnit()))


def test_blocks_between_which_hidden_states_change_in_place_are_no_chain():
    class Shifted(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                x += 1
            return x

    model = Shifted(Block(nn.Identity()), Block(nn.Identity())).eval()
    with pytest.raises(InputError, match=r"layers\.1 is not given what layers\.0 gives"):
        trace(model, {"x": torch.randn(BATCH, 5, 4)}, library="timm", modality="image")


def test_a_block_that_differs_is_told_from_the_others():
    """One block has a norm over its neurons: the table must leave it out, and only it."""
    proposal = trace_stack(Block(nn.Identity()), Block(nn.LayerNorm(6)), Block(nn.Identity()))
    assert [site.block for site in proposal.anatomy] == [0, 2]
    assert proposal.family.sites[0].must_be_identity == ("between",)
    assert "down (blocks 1): its inputs are mixtures" in reasons(proposal)


def test_blocks_that_share_a_weight_are_left_out_by_name():
    first, second = Block(nn.Identity()), Block(nn.Identity())
    second.up.weight = first.up.weight
    with pytest.raises(InputError, match=r"layers\.0\.up\.weight and layers\.1\.up\.weight are one weight"):
        trace_stack(first, second)


def test_a_dead_gain_hides_nothing():
    """A layer scale of 0, as freshly made models have: the site is there all the same."""
    blocks = [Block(nn.Identity()) for _ in range(2)]
    for block in blocks:
        nn.init.zeros_(block.down.weight)
    assert len(trace_stack(*blocks).anatomy.sites) == 2


def test_heads_of_queries_that_share_keys_are_one_unit():
    table = traced("granite").family.sites[0]
    assert table.group == "self_attn.num_key_value_groups" and table.unit_width == "self_attn.head_dim"
    assert [p.shared for p in table.producers] == [False, True, True]


@pytest.mark.parametrize("name", ["granite", "persimmon"])
def test_a_traced_decoder_generates_with_its_cache_when_a_block_has_no_heads(name):
    import transformers

    class_name, settings = UNLISTED[name]
    cls = getattr(transformers, class_name.replace("Model", "ForCausalLM"))
    model = randomise(cls(cls.config_class(**settings))).eval()
    family = traced(name).family
    assert family.arguments == {"use_cache": False}
    slice_model(model, dissect(model, family), {"blocks.0.heads": [], "blocks.2.heads": [1]})
    prompt = torch.tensor([[5, 9, 17, 4]])
    made = [model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)
            for cache in (True, False)]  # fmt: skip
    assert torch.equal(*made)


def test_a_head_that_reads_several_blocks_makes_them_no_chain():
    class Skip(Stack):
        def forward(self, x: Tensor) -> Tensor:
            first = self.layers[0](x)
            return self.layers[1](first) + first.clone()

    torch.manual_seed(0)
    model = Skip(Block(nn.Identity()), Block(nn.Identity())).eval()
    proposal = trace(model, {"x": torch.randn(BATCH, 5, 4)}, library="timm", modality="image")
    assert not proposal.family.chained
    assert trace_stack(Block(nn.Identity()), Block(nn.Identity())).family.chained
