"""Reading and writing of decoders apart: the same tokens as `generate`, and sums that are right."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from helpers.cli import run
from helpers.models import saved_model, shared_model

from optin_cli.architectures.resolve import dissect
from optin_cli.errors import UsageError
from optin_cli.measure import generation
from optin_cli.measure.generation import bench_generation, read_and_write
from optin_cli.transforms.slicing import slice_model


def sliced(model, keep):
    module = copy.deepcopy(model.module)
    slice_model(module, model.anatomy, keep)
    return dataclasses.replace(model, module=module, anatomy=dissect(module, model.family))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "keep", [{}, {"blocks.0.heads": [], "blocks.1.heads": [0]}], ids=["dense", "no heads"]
)
def test_it_writes_what_generate_writes(name, keep):
    model = sliced(shared_model(name), keep)
    ids = torch.tensor([[5, 9, 17, 4], [7, 8, 6, 11]])
    expected = model.module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    _, _, written = read_and_write(model, ids, 6)
    assert torch.equal(written, expected[:, 4:])


def test_speeds_are_those_of_the_batch(monkeypatch):
    model = shared_model("gpt2")
    clock = {True: 8.0, False: 20.0}
    calls = []

    def call_ms(call, device):
        call()
        calls.append(call)
        return clock[len(calls) % 2 == 1]  # the prompt, then what is written

    monkeypatch.setattr(generation, "call_ms", call_ms)
    one, two = bench_generation([model], [1, 3], prompt=4, new=5, repeats=2, seconds=0.0)
    assert (one.prefill_ms, one.decode_ms, one.rounds) == (8.0, 4.0, 2)
    assert one.prefill_tokens_per_second == pytest.approx(4 / 0.008)
    assert one.decode_tokens_per_second == pytest.approx(5 / 0.020)
    assert two.decode_tokens_per_second == pytest.approx(3 * one.decode_tokens_per_second)


def test_the_command_compares_both_parts():
    model = saved_model("gpt2")
    command = ["bench", model, "--baseline", model, "--new-tokens", 3, "--seq-len", 5, "--batch-size", "1,2"]
    command += ["--repeats", 1, "--seconds", 0]
    rows = json.loads(run(*command, "--json").stdout)["generation"]
    assert [(row["batch_size"], row["prompt"], row["new"]) for row in rows] == [(1, 5, 3)] * 2 + [
        (2, 5, 3)
    ] * 2
    for dense, pruned in (rows[:2], rows[2:]):
        assert pruned["decode_speedup"] == pytest.approx(dense["decode_ms"] / pruned["decode_ms"])
    shown = run(*command).stdout
    assert "3 tokens after 5" in shown and "decode ms/token" in shown


def test_more_tokens_than_a_model_takes_are_refused():
    with pytest.raises(UsageError):
        bench_generation([shared_model("gpt2")], [1], prompt=4, new=10_000, repeats=1, seconds=0.0)
    with pytest.raises(UsageError, match="at least 1"):
        bench_generation([shared_model("gpt2")], [1], prompt=4, new=0)
