"""Replayed calls of blocks are the model's own."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from helpers.families import ALL
from helpers.models import shared_model
from helpers.runs import random_inputs
from torch import nn

from optin_cli.data.batches import Batch
from optin_cli.execution.activation_cache import ActivationCache
from optin_cli.execution.block_runs import OUTPUT, run_block
from optin_cli.execution.block_streams import BlockCalls
from optin_cli.structure.hidden_states import hidden_of


@pytest.mark.parametrize("name", [*ALL, "swin", "swinv2", "timm-swin"])
@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_blocks_called_one_by_one_give_what_the_model_gives(name, memory):
    model = shared_model(name)
    batch = Batch(random_inputs(model), None, [0, 1, 2])
    expected = []
    hooks = [
        model.module.get_submodule(path).register_forward_hook(lambda _, __, o: expected.append(hidden_of(o)))
        for path in model.anatomy.blocks
    ]
    with torch.no_grad(), ActivationCache(memory) as store:
        model.output(batch.inputs)
        for hook in hooks:
            hook.remove()
        calls = BlockCalls(model, store)
        hidden = calls.record(7, batch)
        for block, path in enumerate(model.anatomy.blocks):
            arguments = calls.arguments(block, 7, hidden)
            hidden = run_block(model.module.get_submodule(path), arguments)[OUTPUT]
            torch.testing.assert_close(hidden, expected[block], rtol=0, atol=1e-6)
    assert len(expected) == len(model.anatomy.blocks)


@pytest.mark.parametrize(("name", "runs"), [("vit", 0), ("swin", 5)])
def test_blocks_run_while_their_calls_are_recorded_only_if_some_change_the_shape(name, runs):
    model = shared_model(name)
    batch = Batch(random_inputs(model), None, [0, 1, 2])
    ran = []
    norms = [
        next(m for m in _block(model, i).modules() if isinstance(m, nn.LayerNorm)) for i in _blocks(model)
    ]
    with torch.no_grad(), ActivationCache(1 << 30) as store, ExitStack() as stack:
        calls = BlockCalls(model, store)
        calls.record(0, batch)  # the first time they run once, to see what they give
        for norm in norms:
            stack.callback(norm.register_forward_hook(lambda *_: ran.append(1)).remove)
        calls.record(1, batch)
    assert len(ran) == runs


def _blocks(model):
    return range(len(model.anatomy.blocks))


def _block(model, index):
    return model.module.get_submodule(model.anatomy.blocks[index])
