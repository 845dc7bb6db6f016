"""How a block is built is seen on a few examples of a batch."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.compensation import AUTO, batches_for, copied, half
from helpers.models import shared_model
from helpers.runs import random_inputs
from torch import Tensor, nn

from optin_cli.compensation import targets
from optin_cli.compensation.compensate import compensate
from optin_cli.compensation.targets import NO_RESIDUAL
from optin_cli.execution.block_runs import arguments_of
from optin_cli.structure.anatomy import SEQUENCE, TOKENS
from optin_cli.structure.hidden_states import hidden_argument
from optin_cli.transforms.slicing import slice_model

EXAMPLES = 12


def seen(model, block: int, arguments) -> list[tuple]:
    """What is found of a block's consumers and producers."""
    keep, pruned = half(model), copy.deepcopy(model.module)
    slice_model(pruned, model.anatomy, keep)
    found = targets.BlockTargets(model, model, pruned, keep, block, arguments)
    return [
        (one.path, one.place, one.axis, one.batch_axis, one.residual, one.norm, one.gain, one.order)
        for one in [*found.consumers().values(), *(t for made in found.producers().values() for t in made)]
    ]


@pytest.mark.parametrize("name", ["t5", "whisper", "swin"])
def test_targets_are_those_of_the_whole_batch(name, monkeypatch):
    model = shared_model(name)
    inputs = random_inputs(model, batch=EXAMPLES)
    for block in (1, len(model.anatomy.blocks) - 1):
        module = model.module.get_submodule(model.anatomy.blocks[block])
        with torch.no_grad():
            whole = arguments_of(lambda: model.output(inputs), module)
            few = targets.of_few_examples(module, whole, model.anatomy.stream_of(block).layout)
            assert 2 <= len(hidden_argument(*few)) < len(hidden_argument(*whole)) == EXAMPLES
            found = seen(model, block, whole)
            with monkeypatch.context() as patch:
                patch.setattr(targets, "of_few_examples", lambda _, arguments, __: arguments)
                expected = seen(model, block, whole)
        assert [one[:6] for one in found] == [one[:6] for one in expected]
        for (*_, gain, order), (*_, other, others) in zip(found, expected, strict=True):
            torch.testing.assert_close(gain, other)
            assert (order is None and others is None) or torch.equal(order, others)


class Counting(nn.Module):
    """Has as many rows in a table as there are examples."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(EXAMPLES, 4)

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        return hidden + self.out(hidden @ table.T)


def test_a_table_that_has_as_many_rows_by_chance_is_not_cut():
    hidden, table = torch.randn(EXAMPLES, 80, 4), torch.randn(EXAMPLES, 4)
    arguments = (hidden, table), {}
    assert targets.of_few_examples(Counting(), arguments, TOKENS) is arguments
    fewer = (hidden, torch.randn(EXAMPLES - 1, 4)), {}
    block = Counting()
    block.out = nn.Linear(EXAMPLES - 1, 4)
    (cut, rows), _ = targets.of_few_examples(block, fewer, TOKENS)
    assert (len(cut), len(rows)) == (2, EXAMPLES - 1)
    assert targets.of_few_examples(block, fewer, SEQUENCE) is fewer


def test_short_examples_are_looked_at_in_larger_numbers():
    block = nn.Linear(4, 4)
    for positions, count in ((80, 2), (9, 8), (1, EXAMPLES)):
        (hidden,), _ = targets.of_few_examples(block, ((torch.randn(EXAMPLES, positions, 4),), {}), TOKENS)
        assert len(hidden) == count


def test_consumers_behind_a_norm_are_named_in_one_line(caplog):
    """Of Gemma, all: a line for each would bury what else is said."""
    model = copied(shared_model("gemma3"))
    fits = compensate(model, half(model), batches_for(model, rows=40), AUTO)
    (warning,) = [record.message for record in caplog.records if "no sum with a residual" in record.message]
    sites = [site.name for site in model.anatomy]
    assert f"{sites[0]}, {sites[1]} and {len(sites) - 2} more" in warning
    assert {fit.site for fit in fits if NO_RESIDUAL in fit.note} == set(sites)


READ_ALIKE = [
    ("bert", [["query", "key", "value"], ["dense"]]),
    ("llama", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
    # a decoder's keys and values of the encoder's states belong to no stream of its own
    ("t5", [["q", "k", "v"], ["q"], ["wi"]]),
    ("timm-resnet", [["conv1"]]),
]


@pytest.mark.parametrize(("name", "expected"), READ_ALIKE, ids=[name for name, _ in READ_ALIKE])
def test_layers_that_read_one_tensor_say_so(name, expected):
    model = shared_model(name)
    block, keep, pruned = len(model.anatomy.blocks) - 1, half(model), copy.deepcopy(model.module)
    slice_model(pruned, model.anatomy, keep)
    module = model.module.get_submodule(model.anatomy.blocks[block])
    inputs = random_inputs(model, batch=4)
    with torch.no_grad():
        arguments = arguments_of(lambda: model.output(inputs), module)
        found = targets.BlockTargets(model, model, pruned, keep, block, arguments)
        producers = [target for made in found.producers().values() for target in made]
    groups: dict[tuple[str, str], list[str]] = {}
    for target in producers:
        groups.setdefault((target.name, target.reads), []).append(target.path.rpartition(".")[2])
    assert list(groups.values()) == expected
