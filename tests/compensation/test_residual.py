"""Where a consumer's output joins the residual, found in every family, and what is done where it doesn't."""

from __future__ import annotations

import pytest
import torch
from helpers.families import ALL
from helpers.models import new_timm_vit, shared_model
from helpers.runs import random_inputs, window_rows
from torch import nn

from optin_cli.architectures.resolve import dissect, family_of
from optin_cli.compensation.read_positions import read_positions
from optin_cli.compensation.residual import find_residual_sum
from optin_cli.data.batches import Batch
from optin_cli.execution.activation_cache import ActivationCache
from optin_cli.execution.block_runs import OUTPUT, Place, order_of, run_block
from optin_cli.execution.block_streams import BlockCalls
from optin_cli.structure.anatomy import HEADS, NEURONS

POST_NORM = {
    "bert": ("attention.output.LayerNorm", "output.LayerNorm"),
    "distilbert": ("sa_layer_norm", "output_layer_norm"),
    "mpnet": ("attention.LayerNorm", "output.LayerNorm"),
}
POST_NORM |= dict.fromkeys(("roberta", "xlm-roberta", "electra"), POST_NORM["bert"])
PRE_NORM = {"vit": "layernorm_after", "deit": "layernorm_after", "timm-vit": "norm2"}


def batch_of(model):
    inputs = random_inputs(model)
    mask = inputs.get("attention_mask")
    return Batch(inputs, None if mask is None else mask.bool(), [0, 1, 2])


def opened_block(model, block):
    """(the block, its own arguments on a real batch, site kind -> path of its consumer in it)."""
    path = model.anatomy.blocks[block]
    with ActivationCache(1 << 30) as store:
        calls = BlockCalls(model, store)
        hidden = calls.record(0, batch_of(model))
        for earlier in range(block):
            module = model.module.get_submodule(model.anatomy.blocks[earlier])
            hidden = run_block(module, calls.arguments(earlier, 0, hidden))[OUTPUT].detach()
        arguments = calls.arguments(block, 0, hidden)
    consumers = {s.kind: s.consumer.removeprefix(f"{path}.") for s in model.anatomy.in_block(block)}
    return model.module.get_submodule(path), arguments, consumers


@pytest.mark.parametrize("name", ALL)
def test_the_sum_is_found_in_every_family(name):
    model = shared_model(name)
    block, arguments, consumers = opened_block(model, 1)
    heads = find_residual_sum(block, consumers[HEADS], arguments)
    neurons = find_residual_sum(block, consumers[NEURONS], arguments)
    if name in POST_NORM:
        expected = [Place(module, 0, 0) for module in POST_NORM[name]]
    else:
        expected = [Place(PRE_NORM[name], 0, 0), OUTPUT]
    assert [heads.place, neurons.place] == expected
    for point in (heads, neurons):
        assert point.found
        torch.testing.assert_close(point.gain, torch.ones_like(point.gain))


@pytest.mark.parametrize("name", ALL)
def test_there_the_output_counts_once(name):
    """The definition, on the block itself: t with the consumer's output is t without it plus gain * output."""
    model = shared_model(name)
    block, arguments, consumers = opened_block(model, 2)
    for consumer in consumers.values():
        point = find_residual_sum(block, consumer, arguments)
        own = Place(consumer, 0, None)
        with torch.no_grad():
            found = run_block(block, arguments, {own, point.place})
            handle = block.get_submodule(consumer).register_forward_hook(lambda _, __, c: torch.zeros_like(c))
            without = run_block(block, arguments, {point.place})[point.place]
            handle.remove()
        expected = without + point.gain.float() * found[own]
        torch.testing.assert_close(found[point.place], expected, rtol=0, atol=1e-5)
        assert float(without.abs().max()) > 0.1


def test_a_layer_scale_is_the_gain():
    module = new_timm_vit(init_values=0.1)  # the tests' models then get random scales
    module.blocks[1].ls1.gamma.data *= 1e-5  # as small as some models start
    module.blocks[1].ls1.gamma.data[3] = 0
    anatomy = dissect(module, family_of(module))
    hidden = torch.randn(2, 7, 48)
    for site, scale, place in zip(
        anatomy.in_block(1), ("ls1", "ls2"), (Place("norm2", 0, 0), OUTPUT), strict=True
    ):
        point = find_residual_sum(module.blocks[1], site.consumer.removeprefix("blocks.1."), ((hidden,), {}))
        assert point.place == place
        gamma = getattr(module.blocks[1], scale).gamma.detach().double()
        torch.testing.assert_close(point.gain, gamma, rtol=1e-6, atol=1e-12)


class Odd(nn.Module):
    """A block whose first Linear meets no residual (its output is squared) and whose second runs twice."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.unused = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return x + self.twice(self.twice(self.first(x).square()))


def test_without_a_sum_the_consumers_own_output_is_the_target():
    point = find_residual_sum(Odd(), "first", ((torch.randn(2, 3, 4),), {}))
    assert (point.found, point.place) == (False, Place("first", 0, None))
    assert bool((point.gain == 1).all())


def test_the_order_is_that_of_running():
    paths = ["unused", "twice", "first"]
    assert order_of(Odd(), paths, ((torch.randn(2, 3, 4),), {})) == ["first", "twice", "twice"]


def test_a_run_can_stop_where_the_last_place_is_reached():
    block, x = Odd(), torch.randn(2, 3, 4)
    places = {Place("first", 0, None), Place("twice", 0, 0)}
    found = run_block(block, ((x,), {}), places, stop=True)
    assert found.keys() == places  # and no output: the rest did not run
    torch.testing.assert_close(found[Place("first", 0, None)], block.first(x))
    second = Place("twice", 1, 0)
    found = run_block(block, ((), {"x": x}), {second, OUTPUT}, stop=True)
    torch.testing.assert_close(found[second], block.twice(block.first(x).square()))
    torch.testing.assert_close(found[OUTPUT], block(x))
    assert not block.first._forward_hooks
    assert not block.twice._forward_pre_hooks


# ---- which tokens the head reads ----


@pytest.mark.parametrize("name", ALL)
def test_classifiers_read_the_class_token(name):
    model = shared_model(name)
    # DeiT's distillation token is there but this head leaves it alone
    assert read_positions(model, batch_of(model)) == [0]


@pytest.mark.parametrize("name", ["bert", "mpnet", "distilbert"])
@pytest.mark.parametrize("head", ["encoder", "tagger", "reader"])
def test_heads_that_read_every_token_are_seen(name, head):
    model = shared_model(name, head)
    assert read_positions(model, batch_of(model)) is None


# windows: rows that are added elsewhere than they stand


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("name", ["swin", "swin-padded", "timm-swin", "timm-swin-padded"])
def test_the_rows_of_shifted_windows_are_found_where_they_are_added(name, block):
    """Oracle: the numbers of the positions, padded, shifted and cut into windows."""
    model = shared_model(name)
    module, arguments, consumers = opened_block(model, block)
    point = find_residual_sum(module, consumers[HEADS], arguments)
    assert point.found
    torch.testing.assert_close(point.gain, torch.ones_like(point.gain))
    expected = window_rows(name, block)
    if torch.equal(expected, torch.arange(len(expected))):  # one window
        assert point.rows is None
    else:
        assert torch.equal(point.rows, expected)


@pytest.mark.parametrize("name", ["swin", "timm-swin"])
def test_rows_in_order_need_no_table(name):
    model = shared_model(name)
    block, arguments, consumers = opened_block(model, 1)
    point = find_residual_sum(block, consumers[NEURONS], arguments)
    assert (point.place, point.found, point.rows) == (OUTPUT, True, None)


def test_windows_whose_order_depends_on_the_example_are_not_taken_for_a_sum():
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.out(x)
            return x + torch.stack([y[0], *y[1:].flip(1)])

    point = find_residual_sum(Fickle(), "out", ((torch.randn(3, 5, 4),), {}))
    assert not point.found
