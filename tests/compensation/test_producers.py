"""Refitted producers: against least squares on full passes, and which layers are none of their business."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from helpers.compensation import AUTO, FULL, batches_for, copied, half, outputs
from helpers.families import ALL
from helpers.models import shared_model

from optin_cli.architectures.resolve import dissect
from optin_cli.artefacts.pruned import PrunedRecord
from optin_cli.compensation.compensate import compensate
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import rows_of, slice_model

BOTH = dataclasses.replace(FULL, producers=True, read_share=0.0)


@torch.no_grad()
def seen(model, keep, batches, path):
    """(inputs, outputs) of a layer in full passes of the masked model, by real token, float64."""
    found = [], []
    layer = model.module.get_submodule(path)

    def note(_, args, output):
        found[0].append(args[0])
        found[1].append(output)

    with ExitStack() as stack:
        stack.enter_context(masked(model.module, model.anatomy, masks_from_keep(model.anatomy, keep)))
        stack.callback(layer.register_forward_hook(note).remove)
        for batch in batches:
            model.output(batch.inputs)
            for part in found:
                whole = torch.ones(part[-1].shape[:2], dtype=torch.bool)
                part[-1] = part[-1][whole if batch.valid is None else batch.valid]
    return tuple(torch.cat(part).double().numpy() for part in found)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "vit", "timm-vit"])
def test_a_producer_gets_the_least_squares_of_full_passes(name, kind):
    dense = shared_model(name)
    batches, fitted, keep = batches_for(dense), copied(dense), half(dense)
    compensate(fitted, keep, batches, dataclasses.replace(BOTH, ridges=(1e-9,)))
    site = next(s for s in dense.anatomy if s.block == 1 and s.kind == kind)
    for producer in site.producers:
        rows = rows_of(site, producer, torch.as_tensor(keep[site.name])).numpy()
        x, _ = seen(fitted, keep, batches, producer.path)  # refitted up to here, as the fit saw it
        _, target = seen(dense, {}, batches, producer.path)
        design = np.hstack([x, np.ones((len(x), 1))])
        expected = np.linalg.lstsq(design, target[:, rows], rcond=1e-6)[0].T
        layer = fitted.module.get_submodule(producer.path)
        weight, bias = layer.weight.detach().numpy()[rows], layer.bias.detach().numpy()[rows]
        best = design @ expected.T - target[:, rows]
        found = x @ weight.T + bias - target[:, rows]
        assert np.square(found).mean() <= 1.001 * np.square(best).mean() + 1e-12
        plain = dense.module.get_submodule(producer.path)
        before = (
            x @ plain.weight.detach().numpy()[rows].T + plain.bias.detach().numpy()[rows] - target[:, rows]
        )
        assert np.square(found).mean() < 0.95 * np.square(before).mean()


@pytest.mark.parametrize("name", ["bert", pytest.param("timm-vit", marks=pytest.mark.slow)])
def test_on_unseen_rows_units_are_more_like_the_dense_ones(name):
    dense = shared_model(name)
    keep, unseen = half(dense), batches_for(dense, rows=100, seed=9)
    errors = {}
    for producers in (False, True):
        fitted = copied(dense)
        settings = dataclasses.replace(AUTO, producers=producers)
        fits = compensate(fitted, keep, batches_for(dense, rows=200), settings)
        assert all(fit.after <= fit.before for fit in fits)
        errors[producers] = [made_error(dense, fitted, keep, unseen, site) for site in dense.anatomy]
    assert sum(errors[True]) < 0.95 * sum(errors[False])


def made_error(dense, fitted, keep, batches, site):
    """Mean squared difference of the kept units of a site from the dense ones, as its producers make them."""
    found = []
    for producer in site.producers:
        rows = rows_of(site, producer, torch.as_tensor(keep[site.name])).numpy()
        own, target = (
            seen(m, k, batches, producer.path)[1][:, rows] for m, k in ((fitted, keep), (dense, {}))
        )
        found.append(np.square(own - target).mean())
    return sum(found)


@pytest.mark.parametrize("name", ALL)
def test_only_the_rows_of_kept_units_change(name):
    dense, fitted, keep = shared_model(name), copied(shared_model(name)), half(shared_model(name))
    compensate(fitted, keep, batches_for(dense), BOTH)
    for site in dense.anatomy:
        for producer in site.producers:
            rows = rows_of(site, producer, torch.as_tensor(keep[site.name], dtype=torch.long))
            old, new = (m.module.get_submodule(producer.path).weight.detach() for m in (dense, fitted))
            changed = (old != new).flatten(1).any(1).nonzero()[:, 0].tolist()
            assert set(changed) <= set(rows.tolist())
            if site.block:  # what the first block reads is not changed by anything
                assert changed


def test_without_producers_none_of_them_changes():
    dense, fitted = shared_model("bert"), copied(shared_model("bert"))
    fits = compensate(fitted, half(dense), batches_for(dense), FULL)
    assert [fit.layer for fit in fits] == [site.consumer for site in dense.anatomy]
    for site in dense.anatomy:
        for producer in site.producers:
            old, new = (m.module.get_submodule(producer.path).weight for m in (dense, fitted))
            assert torch.equal(old, new)


@pytest.mark.parametrize("name", ["bert", pytest.param("timm-vit", marks=pytest.mark.slow)])
def test_a_pruned_models_record_tells_which_of_the_teachers_units_it_has(name):
    """Pruned in two steps, with the first model as teacher, as compensated at once."""
    dense, fitted, sliced = (copied(shared_model(name)) for _ in range(3))
    keep, batches = half(dense), batches_for(dense, rows=160)
    compensate(fitted, keep, batches, BOTH)
    slice_model(sliced.module, sliced.anatomy, keep)
    record = PrunedRecord("transformers", "", "", {}, keep, {}, {})
    source = dataclasses.replace(sliced.source, record=record)
    sliced = dataclasses.replace(sliced, anatomy=dissect(sliced.module, sliced.family), source=source)
    compensate(sliced, {}, batches, BOTH, teacher=dense)
    unseen = batches_for(dense, rows=40, seed=9)
    one, other = outputs(fitted, keep, unseen), outputs(sliced, {}, unseen)
    assert torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.std()))


def test_without_a_record_a_pruned_models_producers_stay():
    dense, sliced = shared_model("bert"), copied(shared_model("bert"))
    slice_model(sliced.module, sliced.anatomy, half(dense))
    sliced = dataclasses.replace(sliced, anatomy=dissect(sliced.module, sliced.family))
    fits = compensate(sliced, {}, batches_for(dense), BOTH, teacher=dense)
    assert [fit.layer for fit in fits] == [site.consumer for site in sliced.anatomy]
