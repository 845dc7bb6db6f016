"""A refit on short texts is used on long ones."""

from __future__ import annotations

import dataclasses

import torch
from helpers.batches import rows_of
from helpers.compensation import copied, half, outputs
from helpers.data import sentences
from helpers.families import MAX_LENGTH
from helpers.models import shared_model

import optin_cli as optin
from optin_cli.compensation.compensate import compensate
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.packing import PackedBatches, cover_positions


def short() -> Batches:
    return Batches(rows_of({"text": sentences(160)}), shared_model("bert").processor, 16, max_length=8)


def test_joined_texts_bring_long_ones_closer_to_the_dense_model():
    dense, settings = shared_model("bert"), Compensation(batch_size=16)
    keep = half(dense)
    texts = sentences(30, seed=9, words=(MAX_LENGTH, MAX_LENGTH + 1))
    long = Batches(rows_of({"text": texts}), dense.processor, 16)
    target = outputs(dense, {}, long)
    errors = []
    for share in (0.0, settings.joined):
        fitted = copied(dense)
        covering = cover_positions(short(), share, settings.holds_out)
        assert isinstance(covering, PackedBatches) == bool(share)
        compensate(fitted, keep, covering, settings)
        errors.append(float((outputs(fitted, keep, long) - target).square().mean()))
    alone, joined = errors
    assert joined < 0.9 * alone


def test_batches_of_ones_own_are_warned_of(caplog):
    model = shared_model("bert")
    batches = [{"input_ids": torch.randint(5, 30, (16, 10)), "attention_mask": torch.ones(16, 10).long()}] * 4
    ranking = optin.score(copied(model).module, batches, method="magnitude", samples=64)
    mask = optin.select(ranking, flops=0.5)
    caplog.clear()
    small = optin.apply(copied(model).module, mask, batches, compensate="bias")
    assert small.record.history[-1]["lengths"]["refitted"]["longest"] == 10
    (warning,) = [record.message for record in caplog.records if "may be worse" in record.message]
    assert f"at most 10 tokens, and the model takes {MAX_LENGTH}" in warning
    assert dataclasses.asdict(small.report)["lengths"] == small.record.history[-1]["lengths"]
