"""What stands behind the last block is refitted: which layers that are, and to what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.compensation import AUTO, batches_for, copied, half, outputs
from helpers.models import saved_model, shared_model

from optin_cli.compensation.compensate import compensate
from optin_cli.compensation.readout import readout_layers
from optin_cli.compensation.settings import Compensation
from optin_cli.loading.checkpoint import open_model

LAYERS = {
    "bert": ["bert.pooler.dense", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "distilbert": ["pre_classifier", "classifier"],
    "vit": ["classifier"],
    "timm-vit": ["head"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_behind_the_last_block_are_found_in_the_order_they_run(name):
    model = shared_model(name)
    assert readout_layers(model, batches_for(model)[0]) == LAYERS[name]


def test_a_vocabulary_and_a_layer_that_nothing_reads_are_left_alone():
    """The output of GPT-2 is tied to its embeddings; an embedding takes no notice of BERT's pooler."""
    decoder = shared_model("gpt2")
    found = readout_layers(decoder, batches_for(decoder)[0])
    assert all(
        decoder.module.get_submodule(path).weight is not decoder.module.get_input_embeddings().weight
        for path in found
    )
    encoder = open_model(str(saved_model("bert", "encoder")))
    assert readout_layers(encoder, batches_for(encoder)[0]) == []


@torch.no_grad()
def seen(model, keep, batches, path):
    """All that a layer reads and gives in the masked model, in float64."""
    taken, given = [], []

    def see(_, args, output):
        taken.append(args[0].double())
        given.append(output.double())

    handle = model.module.get_submodule(path).register_forward_hook(see)
    outputs(model, keep, batches)
    handle.remove()
    return torch.cat(taken), torch.cat(given)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("bert", "classifier"), ("timm-vit", "head"), pytest.param("vit", "classifier", marks=pytest.mark.slow)],
)
def test_a_layer_is_a_ridge_regression_on_what_it_reads_in_the_pruned_model(name, layer):
    """Oracle: the augmented least-squares problem, of full forwards of the masked model. A text weighs the root of its
    length."""
    dense, fitted = shared_model(name), copied(shared_model(name))
    keep, batches, ridge = half(dense), batches_for(dense, rows=160), 0.1
    compensate(fitted, keep, batches, Compensation(method="full", ridges=(ridge,), batch_size=16))
    x, _ = seen(fitted, keep, batches, layer)
    _, y = seen(dense, {}, batches, layer)
    old = dense.module.get_submodule(layer)
    error = y - torch.nn.functional.linear(x, old.weight.double(), old.bias.double())
    weight = (
        torch.cat([torch.ones(len(b)) if b.valid is None else b.valid.sum(1) for b in batches])
        .double()
        .sqrt()
    )
    share = (weight / weight.sum())[:, None]
    means = (share * x).sum(0), (share * error).sum(0)
    centred, wanted = ((part - mean) * share.sqrt() for part, mean in zip((x, error), means, strict=True))
    pull = (ridge * centred.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=torch.float64)
    rows = torch.cat([centred, pull]), torch.cat([wanted, torch.zeros(len(pull), y.shape[1])])
    change = torch.linalg.lstsq(*rows).solution.T
    new = fitted.module.get_submodule(layer)
    torch.testing.assert_close(new.weight.double(), old.weight.double() + change, rtol=1e-4, atol=1e-5)
    bias = old.bias.double() + means[1] - change @ means[0]
    torch.testing.assert_close(new.bias.double(), bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        pytest.param("timm-vit", marks=pytest.mark.slow),
        pytest.param("timm-resnet", marks=pytest.mark.slow),
        "llama",
        "t5",
        "segformer",
        "swin",
    ],
)
def test_it_brings_outputs_closer_than_blocks_alone(name):
    dense = shared_model(name)
    keep, batches = half(dense), batches_for(dense, rows=160)
    unseen = batches_for(dense, rows=40, seed=9)
    target = outputs(dense, {}, unseen)
    errors, told = {}, {}
    for readout in (False, True):
        model = copied(dense)
        told[readout] = compensate(model, keep, batches, replace(AUTO, readout=readout))
        errors[readout] = float((outputs(model, keep, unseen) - target).square().mean())
    behind = told[True][len(told[False]) :]
    assert [fit.layer for fit in behind] == readout_layers(dense, batches[0])
    assert all(fit.after <= fit.before for fit in behind)
    assert errors[True] <= 1.05 * errors[False]
    if any(fit.after < 0.8 * fit.before for fit in behind):
        assert errors[True] < errors[False]
