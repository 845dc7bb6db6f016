"""Chains: a consumer's units come from the layer before it, in another block as a rule."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from optin_cli.architectures.families import family_from_dict, family_to_dict
from optin_cli.architectures.paths import joined, within
from optin_cli.architectures.resolve import dissect
from optin_cli.errors import InputError
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import slice_model

CHAIN = {
    "name": "chain",
    "matches": ["Chain"],
    "blocks": ["steps.*"],
    "modality": "image",
    "layout": "nchw",
    "sites": [
        {"kind": "channels", "producers": [], "consumer": "", "requires": ["out_channels"]},
        {"kind": "neurons", "producers": [], "consumer": "", "requires": ["out_features"]},
    ],
}


class Chain(nn.Module):
    """Modules one after another."""

    def __init__(self, *steps: nn.Module) -> None:
        super().__init__()
        self.steps = nn.Sequential(*steps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.steps(x)


def conv(inputs: int, outputs: int, **more) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **more)


def sites_of(*steps: nn.Module) -> dict[str, tuple]:
    anatomy = dissect(Chain(*steps), family_from_dict(CHAIN))
    return {site.name: (site.units, site.width, site.producers[0].path, site.carried) for site in anatomy}


def test_a_table_without_producers_survives_the_round_trip():
    family = family_from_dict(CHAIN)
    assert family.sites[0].producers == ()
    assert family_from_dict(family_to_dict(family)) == family


def test_the_layer_before_is_found_through_what_passes_units():
    steps = [
        conv(3, 4),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(),
        conv(4, 6),
        nn.GELU(),
        conv(6, 2),
    ]
    assert sites_of(*steps) == {
        "blocks.5.channels": (4, 1, "steps.0", ("steps.1", "steps.3")),
        "blocks.7.channels": (6, 1, "steps.5", ()),
    }


def test_a_flattened_map_gives_a_channel_all_of_its_positions():
    steps = [conv(3, 4), nn.Flatten(), nn.Linear(4 * 9, 5), nn.ReLU(), nn.Linear(5, 2)]
    assert sites_of(*steps) == {
        "blocks.2.neurons": (4, 9, "steps.0", ()),
        "blocks.4.neurons": (5, 1, "steps.2", ()),
    }
    model = Chain(*steps).eval()
    anatomy = dissect(model, family_from_dict(CHAIN))
    keep = {"blocks.2.neurons": [1, 3], "blocks.4.neurons": [0, 4]}
    x = torch.randn(2, 3, 3, 3)
    small = copy.deepcopy(model)
    slice_model(small, anatomy, keep)
    with torch.no_grad(), masked(model, anatomy, masks_from_keep(anatomy, keep)):
        torch.testing.assert_close(small(x), model(x))


@pytest.mark.parametrize(
    "between",
    [nn.GroupNorm(2, 4), nn.Softmax(1), nn.PixelShuffle(1), conv(4, 4, groups=4)],
    ids=lambda module: type(module).__name__,
)
def test_what_may_mix_units_ends_the_chain(between):
    assert set(sites_of(conv(3, 4), between, conv(4, 6), conv(6, 2))) == {"blocks.3.channels"}


def test_only_what_is_last_before_a_layer_is_a_feature():
    steps = [conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 6), nn.ReLU(), conv(6, 2)]
    anatomy = dissect(Chain(*steps), family_from_dict(CHAIN))
    assert {site.passed for site in anatomy} == {(0, 1, 3)}


def test_a_consumer_that_the_layer_before_does_not_feed_is_refused_naming_both():
    with pytest.raises(InputError, match=r"steps\.0 gives 4 features, and steps\.1 takes 6"):
        sites_of(conv(3, 4), conv(6, 2))


def test_a_convolution_reads_a_channel_once():
    """Else a channel would own neighbouring ones, which the layer before did not make from it."""
    with pytest.raises(InputError, match=r"steps\.0 gives 4 features, and steps\.1 takes 8"):
        sites_of(conv(3, 4), conv(8, 2))


def test_paths_inside_a_block_and_out_again():
    assert joined("a.b", "") == "a.b"
    assert within("a.b", "a.b") == ""
    assert within("a.b", joined("a.b", "c.d")) == "c.d"
    assert within("a.b", "a.bc.d") == "a.bc.d"
