"""A family of several streams gives what one chain of the same blocks gives, by running the whole model."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.data import tiny_image_folder, tiny_masks, tiny_text_csv
from helpers.models import saved_model
from torch import nn

from optin_cli.architectures.families import Family, SiteTable, StreamTable, family_from_dict, family_to_dict
from optin_cli.architectures.resolve import dissect
from optin_cli.compensation.compensate import compensate
from optin_cli.compensation.residual import find_residual_sum
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batch, Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.execution.block_runs import OUTPUT
from optin_cli.execution.block_streams import UnchainedStream
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.scoring.calibration import Calibration
from optin_cli.scoring.methods.ablation import Ablation
from optin_cli.scoring.methods.curvature import curvature
from optin_cli.structure.anatomy import NEURONS, Producer, Stream
from optin_cli.structure.hidden_states import as_rows

NAMES = ["bert", "vit"]


def in_two(model: OpenModel) -> OpenModel:
    """The same model, described as two streams."""
    (table,) = model.family.all_streams
    streams = StreamTable((f"{table.blocks}.0",)), StreamTable((f"{table.blocks}.[1-9]",))
    family = dataclasses.replace(model.family, blocks="", streams=streams)
    return dataclasses.replace(model, family=family, anatomy=dissect(model.module, family))


def batches_of(model: OpenModel, folder) -> Batches:
    image = model.family.modality == "image"
    data = tiny_image_folder(folder) if image else tiny_text_csv(folder)
    return Batches(sample(DataSpec(str(data)), model.family.modality, 16, 0), model.processor, 8)


def batches_for(model: OpenModel, folder) -> Batches:
    """Of the task's own data."""
    image = model.family.modality == "image"
    data, reader = str((tiny_masks if image else tiny_text_csv)(folder)), model.task.reader
    return Batches(
        sample(DataSpec(data), model.family.modality, 9, 0, reader=reader), model.processor, 3, reader=reader
    )


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_a_chain(name, tmp_path):
    model = open_model(str(saved_model(name)))
    batches = batches_of(model, tmp_path)
    chain, streams = (Calibration(m, batches, 24, 4.0, seed=0) for m in (model, in_two(model)))
    assert not streams.model.anatomy.chained
    assert [s.first for s in streams.model.anatomy.streams] == [0, 1]
    one, two = Ablation(chain, 0), Ablation(streams, 0)
    for site in chain.model.anatomy:
        units = np.arange(site.units)[::3]
        for mine, theirs in zip(two.score(site, units), one.score(site, units), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-9)
    probed = [curvature(c, 0, list(c.model.anatomy), range(3), sketched=1) for c in (chain, streams)]
    for site in chain.model.anatomy:
        for field in ("trajectory", "output", "trajectory_rows", "output_rows"):
            mine, theirs = (getattr(p, field)[site.name] for p in probed)
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_compensation_is_that_of_a_chain(name, tmp_path):
    fits, weights = [], []
    for change in (lambda model: model, in_two):
        model = change(open_model(str(saved_model(name))))
        keep = {site.name: list(range(0, site.units, 2)) for site in model.anatomy}
        fits.append(compensate(model, keep, batches_of(model, tmp_path), Compensation(method="full")))
        weights.append([model.module.get_submodule(site.consumer).weight for site in model.anatomy])
    for one, two in zip(*fits, strict=True):
        assert (one.site, one.method, one.rows) == (two.site, two.method, two.rows)
        assert one.before == pytest.approx(two.before, rel=1e-4)
        assert one.after == pytest.approx(two.after, rel=1e-3)
    for one, two in zip(*weights, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "t5",
        "segformer",
        pytest.param("mask2former-swin", marks=pytest.mark.slow),
        pytest.param("maskformer-resnet", marks=pytest.mark.slow),
    ],
)
def test_blocks_that_were_passed_give_what_they_gave(name, tmp_path, monkeypatch):
    """Oracle: every run begins at the inputs and runs every block."""
    calls, fits, weights = [], [], []
    for remembers in (False, True):
        model = open_model(str(saved_model(name)))
        batches = batches_for(model, tmp_path)
        keep = {site.name: list(range(0, site.units, 2)) for site in model.anatomy}
        class_ = type(model.module.get_submodule(model.anatomy.blocks[0]))
        counted = mock.Mock(side_effect=class_.forward)
        with monkeypatch.context() as patched:
            if not remembers:
                patched.setattr(UnchainedStream, "advance", lambda *_: None)
            patched.setattr(class_, "forward", lambda *args, _run=counted, **named: _run(*args, **named))
            fits.append(compensate(model, keep, batches, Compensation(method="full", memory=10_000)))
        calls.append(counted.call_count)
        weights.append([model.module.get_submodule(site.consumer).weight for site in model.anatomy])
    assert calls[1] < 0.7 * calls[0]
    assert fits[0] == fits[1]
    for one, two in zip(*weights, strict=True):
        assert torch.equal(one, two)


class SequenceFirst(nn.Module):
    """A block of (tokens, batch, d) whose first half works on (batch, tokens, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(6, 10), nn.Linear(10, 6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, hidden):
        mixed = self.out(self.mix(hidden.transpose(0, 1)).relu())
        hidden = torch.tanh(hidden + mixed.transpose(0, 1))
        return hidden + self.down(self.up(hidden).relu())


@pytest.mark.parametrize("examples", [3, 5])
def test_the_sum_is_found_where_tokens_come_first(examples):
    block, hidden = SequenceFirst(), torch.randn(5, examples, 6)
    own = find_residual_sum(block, "down", ((hidden,), {}), layout="sequence", batch_axis=1)
    assert own.place == OUTPUT and own.batch_axis == 1
    # tanh hides the first sum from every module, so its own output is all there is
    inner = find_residual_sum(block, "out", ((hidden,), {}), layout="sequence", batch_axis=0)
    assert not inner.found and inner.batch_axis == 0
    assert torch.equal(as_rows(hidden, "sequence"), hidden.transpose(0, 1))


def test_inputs_of_a_decoder_are_cut_to_their_own_length():
    inputs = {
        "input_ids": torch.arange(8).reshape(2, 4),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
        "decoder_input_ids": torch.arange(10).reshape(2, 5),
        "decoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
    }
    batch = Batch(inputs, inputs["attention_mask"].bool(), [0, 1])
    one, two = batch.split(0, 1)
    assert {name: value.shape[1] for name, value in one.inputs.items()} == {
        "input_ids": 2,
        "attention_mask": 2,
        "decoder_input_ids": 5,
        "decoder_attention_mask": 5,
    }
    assert two.inputs["decoder_input_ids"].tolist() == [[5, 6]]
    assert two.real("decoder_attention_mask").tolist() == [[True, True]]
    assert batch.real("attention_mask") is batch.valid


def test_streams_survive_as_data():
    table = SiteTable(NEURONS, (Producer("up"),), "down", batch_axis=1)
    streams = (
        StreamTable("encoder.block"),
        StreamTable(("a.*", "b.*"), "sequence", "decoder_attention_mask"),
    )
    family = Family("two", ("two",), "", (table,), streams=streams)
    assert family_from_dict(family_to_dict(family)) == family


def test_a_stream_without_blocks_is_left_out():
    model = open_model(str(saved_model("bert")))
    family = dataclasses.replace(
        model.family, blocks="", streams=(StreamTable("encoder.layer"), StreamTable("decoder.layer"))
    )
    anatomy = dissect(model.module, family)
    assert anatomy.streams == (Stream(),) and anatomy.chained
