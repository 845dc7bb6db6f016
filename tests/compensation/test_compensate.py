"""Compensation of whole models: what it is for, and what it must leave alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.compensation import AUTO, FULL, batches_for, copied, half, outputs
from helpers.families import ALL
from helpers.models import shared_model, tiny_model

from optin_cli.architectures.resolve import dissect
from optin_cli.compensation.compensate import compensate
from optin_cli.compensation.settings import Compensation
from optin_cli.loading.checkpoint import open_model
from optin_cli.transforms.slicing import slice_model


@pytest.mark.parametrize("name", ALL)
def test_it_brings_outputs_of_unseen_rows_closer_to_the_dense_ones(name):
    dense, fitted = shared_model(name), copied(shared_model(name))
    keep = {s.name: list(range(s.units * 3 // 4)) for s in dense.anatomy}
    fits = compensate(fitted, keep, batches_for(dense, rows=160), AUTO)
    unseen = batches_for(dense, rows=40, seed=9)
    target = outputs(dense, {}, unseen)
    before, after = ((outputs(m, keep, unseen) - target).square().mean() for m in (dense, fitted))
    assert after < 0.7 * before
    assert all(fit.after <= fit.before for fit in fits)
    assert {fit.method for fit in fits} >= {"full"}


@pytest.mark.parametrize(
    "name", ["bert", "mpnet", "distilbert", pytest.param("timm-vit", marks=pytest.mark.slow)]
)
def test_a_pruned_model_is_brought_back_to_its_teacher(name):
    """Slicing first and following the dense model later is compensating while slicing."""
    dense, fitted, sliced = (copied(shared_model(name)) for _ in range(3))
    keep, batches = half(dense), batches_for(dense, rows=160)
    compensate(fitted, keep, batches, FULL)
    slice_model(sliced.module, sliced.anatomy, keep)
    sliced = dataclasses.replace(sliced, anatomy=dissect(sliced.module, sliced.family))
    compensate(sliced, {}, batches, FULL, teacher=dense)
    unseen = batches_for(dense, rows=40, seed=9)
    one, other = outputs(fitted, keep, unseen), outputs(sliced, {}, unseen)
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.std()))
    assert not torch.allclose(other, outputs(dense, keep, unseen), rtol=1e-2, atol=1e-2)


def duplicated(name, site_of, folder):
    """A model in which unit 1 of a site does what unit 0 does; `scaled` has layer scales of all sizes and signs."""
    if name == "scaled":
        model = open_model(str(tiny_model("timm-vit", folder / f"scaled-{site_of}", init_values=0.1)))
    else:
        model = copied(shared_model(name))
    site = next(s for s in model.anatomy if s.kind == site_of and s.block == 1)
    for producer in site.producers:
        layer = model.module.get_submodule(producer.path)
        for tensor in (layer.weight.data, layer.bias.data):
            rows = tensor.view(producer.parts, site.units, site.width, *tensor.shape[1:])
            rows[:, 1] = rows[:, 0]
    return model, site


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize(
    "name",
    [
        "bert",
        pytest.param("vit", marks=pytest.mark.slow),
        pytest.param("timm-vit", marks=pytest.mark.slow),
        "scaled",
    ],
)
def test_a_duplicate_is_made_up_for_by_its_twin(name, kind, folder):
    model, site = duplicated(name, kind, folder)
    batches = batches_for(model)
    target = outputs(model, {}, batches)
    keep = {site.name: [u for u in range(site.units) if u != 1]}
    assert (outputs(model, keep, batches) - target).abs().max() > 1e-3
    exact = Compensation(
        method="full", batch_size=16, ridges=(1e-9,)
    )  # a ridge would shrink what the twin takes over
    fits = compensate(model, keep, batches, exact)
    assert (outputs(model, keep, batches) - target).abs().max() < 1e-5
    found = next(fit for fit in fits if fit.layer == site.consumer)
    assert found.after < 1e-6 * found.before


# ---- what it leaves alone ----


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("bert", how) for how in ("auto", "full", "bias", "none")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("bert", "scale"), ("timm-vit", "auto"))),
    ],
)
def test_with_all_units_kept_nothing_changes(name, method):
    dense, fitted = shared_model(name), copied(shared_model(name))
    keep = {site.name: list(range(site.units)) for site in dense.anatomy}
    for kept in (keep, {}):
        compensate(fitted, kept, batches_for(dense), Compensation(method=method, batch_size=16))
        for key, value in dense.module.state_dict().items():
            assert torch.equal(fitted.module.state_dict()[key], value), key


@pytest.mark.parametrize("name", ALL)
def test_only_kept_columns_and_biases_of_consumers_change(name):
    dense, fitted = shared_model(name), copied(shared_model(name))
    keep = half(dense)
    compensate(fitted, keep, batches_for(dense), FULL)
    consumers = {site.consumer: site for site in dense.anatomy}
    after = fitted.module.state_dict()
    for key, value in dense.module.state_dict().items():
        path, _, kind = key.rpartition(".")
        site = consumers.get(path)
        if site is None:
            assert torch.equal(after[key], value), key
            continue
        changed = after[key] != value
        if kind == "weight":
            units = changed.view(-1, site.units, site.width).any(2).any(0).nonzero()[:, 0].tolist()
            assert units == keep[site.name]
        else:
            assert changed.any()


def test_the_same_inputs_give_the_same_weights_however_much_memory_there_is():
    dense = shared_model("mpnet")
    states, told = [], []
    for memory in (1 << 30, 20_000, 0):
        fitted = copied(dense)
        told.append(
            compensate(
                fitted,
                half(dense),
                batches_for(dense),
                Compensation(memory=memory, batch_size=16),
            )
        )
        states.append(fitted.module.state_dict())
    assert told[0] == told[1] == told[2]
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value)
        assert torch.equal(states[2][key], value)
