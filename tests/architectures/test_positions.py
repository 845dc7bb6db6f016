"""Blocks found by pattern, hidden states of every layout, and positions that differ from block to block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from optin_cli.architectures.families import Family, SiteTable, family_from_dict, family_to_dict
from optin_cli.architectures.positions import count_positions
from optin_cli.architectures.resolve import dissect
from optin_cli.errors import InputError
from optin_cli.structure.anatomy import Producer
from optin_cli.structure.hidden_states import as_rows, hidden_argument, with_hidden


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 3 * width)
        self.fc2 = nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.fc1(x).relu())


class _Merge(nn.Module):
    """(b, h, w, d) -> (b, h / 2, w / 2, 2 d)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduction(torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1))


class _Stage(nn.Module):
    def __init__(self, width: int, merges: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(width), _Block(width)])
        self.downsample = merges

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Pyramid(nn.Module):
    """Two stages of an image of 16 pixels: 8 x 8 positions, then 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.default_cfg = {"input_size": (3, 16, 16)}
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.stages = nn.ModuleList([_Stage(8, _Merge(8)), _Stage(16, None)])
        self.stages[1].downsample = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        for stage in self.stages:
            x = stage(x)
        return x.mean((1, 2))


PYRAMID = Family(
    "pyramid",
    ("Pyramid",),
    ("stages.*.blocks.*", "stages.*.downsample"),
    (SiteTable("neurons", (Producer("fc1"),), "fc2", requires=("fc1",)),),
    "image",
    layout="nhwc",
    hierarchical=True,
)


def test_patterns_find_the_blocks_in_the_order_they_run():
    anatomy = dissect(Pyramid(), PYRAMID)
    assert anatomy.blocks == (
        "stages.0.blocks.0",
        "stages.0.blocks.1",
        "stages.0.downsample",
        "stages.1.blocks.0",
        "stages.1.blocks.1",  # an Identity is no block
    )
    assert [site.block for site in anatomy] == [0, 1, 3, 4]
    one = replace(PYRAMID, blocks="stages.*.bl*.1")
    assert dissect(Pyramid(), one).blocks == ("stages.0.blocks.1", "stages.1.blocks.1")


def test_a_pattern_without_a_match_is_named():
    table = Family("pyramid", ("Pyramid",), ("layers.*",), PYRAMID.sites)
    with pytest.raises(InputError, match=r"Pyramid has no blocks at layers"):
        dissect(Pyramid(), table)


def test_a_site_costs_as_many_positions_as_it_sees():
    anatomy = dissect(Pyramid(), PYRAMID)
    assert [site.macs_per_unit(64) for site in anatomy] == [64 * 2 * 8] * 2 + [16 * 2 * 16] * 2


def test_positions_are_counted_without_touching_the_model():
    model = Pyramid().train()
    seen = count_positions(model, "stages.0.blocks.0", "nhwc")
    assert (seen.reference, seen.rows["stages.1.blocks.0.fc1"], seen.rows["stem"]) == (64, 16, 64)
    assert model.training
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_whose_modules_cannot_be_copied_is_run_itself():
    model = Pyramid()
    stage = model.stages[0]
    whole, stage.forward = stage.forward, lambda x: whole(x)
    assert count_positions(model, "stages.0.blocks.0", "nhwc").rows["stages.1.blocks.0.fc1"] == 16


def test_a_model_that_does_not_run_on_its_own_size_is_refused():
    model = Pyramid()
    model.default_cfg = {"input_size": (4, 16, 16)}
    with pytest.raises(InputError, match="Pyramid does not run on an image of its own size"):
        dissect(model, PYRAMID)


def test_a_table_of_patterns_survives_as_data():
    assert family_from_dict(family_to_dict(PYRAMID)) == PYRAMID


def test_every_layout_becomes_rows_of_positions():
    rows = torch.randn(5, 2, 12, 7)  # (variants, batch, positions, d)
    square = rows.unflatten(2, (3, 4))
    assert torch.equal(as_rows(rows, "tokens"), rows)
    assert torch.equal(as_rows(square, "nhwc"), rows)
    assert torch.equal(as_rows(square.permute(0, 1, 4, 2, 3), "nchw"), rows)


def test_hidden_states_are_the_first_argument_whatever_its_name():
    x, y = torch.zeros(1), torch.ones(1)
    assert hidden_argument((x, y), {}) is x
    assert hidden_argument((), {"mask": y, "hidden_states": x}) is x
    assert hidden_argument((), {"input_feature": x, "mask": y}) is x
    assert with_hidden(((), {"input_feature": x, "mask": y}), y) == ((), {"input_feature": y, "mask": y})
