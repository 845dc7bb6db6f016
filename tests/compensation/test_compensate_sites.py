"""Compensation site by site: against least squares on full forward passes of the dense and the masked model."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.compensation import FULL, batches_for, copied, half, outputs
from helpers.families import BLOCKS, IMAGE_SIZE, PATCH_SIZE
from helpers.models import saved_model, shared_model
from helpers.runs import SWIN_WINDOWS, window_rows

from optin_cli.compensation.compensate import compensate
from optin_cli.compensation.residual import find_residual_sum
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.execution.activation_cache import ActivationCache
from optin_cli.execution.block_runs import OUTPUT, run_block
from optin_cli.execution.block_streams import BlockCalls
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.transforms.masking import masked, masks_from_keep


@torch.no_grad()
def seen(model: OpenModel, keep, batches: Batches, site, place):
    """(input of a site's consumer, tensor at its sum with the residual) in full passes, masked, by real token."""
    block = model.module.get_submodule(model.anatomy.blocks[site.block])
    into, at = [], []
    with ExitStack() as stack:
        stack.enter_context(masked(model.module, model.anatomy, masks_from_keep(model.anatomy, keep)))
        consumer = model.module.get_submodule(site.consumer)
        hook = consumer.register_forward_hook(lambda _, args, __: into.append(args[0]))
        stack.callback(hook.remove)
        if place.module:
            target = block.get_submodule(place.module)
            hook = target.register_forward_pre_hook(lambda _, args: at.append(args[0]))
        else:
            hook = block.register_forward_hook(
                lambda _, __, out: at.append(out if torch.is_tensor(out) else out[0])
            )
        stack.callback(hook.remove)
        for batch in batches:
            model.output(batch.inputs)
            real = (
                batch.valid if batch.valid is not None else torch.ones(into[-1].shape[:2], dtype=torch.bool)
            )
            if model.family.hierarchical:
                into[-1], at[-1] = as_stream(model, site, into[-1], len(batch)), at[-1].flatten(0, -2)
                continue
            into[-1], at[-1] = into[-1][real], at[-1][real]
    return torch.cat(into).double().numpy(), torch.cat(at).double().numpy()


def as_stream(model, site, x, examples):
    """A consumer's input on windows in the order of the residual stream, by token."""
    x = x.reshape(examples, -1, x.shape[-1])
    name = next(name for name in SWIN_WINDOWS if saved_model(name) == Path(model.spec))
    return (x[:, window_rows(name, site.block)] if site.kind == "heads" else x).flatten(0, 1)


def token_weights(model, batches, site):
    """What `read_share` says: in the last block of a classifier the class token has that share of an example."""
    weights = []
    if model.family.hierarchical:  # every token is read
        return np.ones(sum(len(batch) for batch in batches) * (64 if site.block < 2 else 16))
    for batch in batches:
        patches = [1 + (IMAGE_SIZE // PATCH_SIZE) ** 2] * len(batch)
        for length in patches if batch.valid is None else batch.valid.sum(1).tolist():
            weights.append(np.ones(length))
            if site.block == BLOCKS - 1 and model.task.name != "embedding":
                weights[-1][:] = (1 - FULL.read_share) * length / (length - 1)
                weights[-1][0] = FULL.read_share * length
    return np.concatenate(weights)


def ridge_regression(x, e, weight):
    """(slope [outputs, features], intercept): weighted least squares with rows of zeros that ask for small slopes."""
    x_mean, e_mean = (np.average(a, axis=0, weights=weight) for a in (x, e))
    root = np.sqrt(weight)[:, None]
    rows = root * (x - x_mean)
    pull = np.sqrt(FULL.ridges[0] * (rows**2).sum() / x.shape[1])
    design = np.vstack([rows, pull * np.eye(x.shape[1])])
    target = np.vstack([root * (e - e_mean), np.zeros((x.shape[1], e.shape[1]))])
    slope = np.linalg.lstsq(design, target, rcond=None)[0].T
    return slope, e_mean - slope @ x_mean


@pytest.mark.parametrize("name", [pytest.param("albert", marks=pytest.mark.slow), "albert-groups"])
def test_blocks_that_share_a_consumer_are_refitted_together(name):
    """On other rows the output comes closer to the dense one's, with one set of weights for all blocks."""
    model = shared_model(name)
    refitted, keep = copied(model), half(model)
    fits = compensate(refitted, keep, batches_for(model, rows=400), Compensation(readout=False))
    assert list(dict.fromkeys(fit.site for fit in fits)) == [site.name for site in model.anatomy]
    assert all(
        fit.method != "none" for fit in fits
    )  # what the first block makes is made in the later ones, too
    others = batches_for(model, rows=60, seed=5)
    dense = outputs(model, {}, others)
    before, after = ((outputs(m, keep, others) - dense).square().mean() for m in (model, refitted))
    assert after < 0.7 * before


@pytest.mark.parametrize(
    ("name", "head"),
    [
        *itertools.product(["bert", "mpnet", "distilbert", "vit"], ["encoder", "classifier"]),
        ("swin-padded", "classifier"),
        ("timm-swin", "classifier"),
    ],
)
def test_every_site_gets_the_least_squares_of_full_passes(name, head):
    """Sites in order: each is fitted with the earlier ones refitted and the later ones as they were."""
    dense = shared_model(name, head)
    batches = batches_for(dense)
    keep = half(dense)
    fitted = copied(dense)
    fits = compensate(fitted, keep, batches, FULL)
    assert [fit.site for fit in fits] == [site.name for site in dense.anatomy]
    assert {fit.method for fit in fits} == {"full"}
    partly = copied(dense)  # as far as the site under test
    for site in dense.anatomy:
        place = sum_place(dense, site, batches)
        _, target = seen(dense, {}, batches, site, place)
        x, have = seen(partly, keep, batches, site, place)
        features = (np.array(keep[site.name])[:, None] * site.width + np.arange(site.width)).reshape(-1)
        weight = token_weights(dense, batches, site) / target.var(axis=1)
        slope, intercept = ridge_regression(x[:, features], target - have, weight)
        before = partly.module.get_submodule(site.consumer)
        after = fitted.module.get_submodule(site.consumer)
        change = after.weight.data.numpy() - before.weight.data.numpy()
        np.testing.assert_allclose(change[:, features], slope, atol=1e-3)
        np.testing.assert_allclose(
            x[:, features] @ change[:, features].T, x[:, features] @ slope.T, atol=1e-4
        )
        np.testing.assert_allclose((after.bias - before.bias).numpy(), intercept, atol=1e-4)
        before.load_state_dict(after.state_dict())


def sum_place(model, site, batches):
    path = model.anatomy.blocks[site.block]
    with ActivationCache(1 << 30) as store:
        calls = BlockCalls(model, store)
        hidden = calls.record(0, batches[0])
        for block in range(site.block):
            module = model.module.get_submodule(model.anatomy.blocks[block])
            hidden = run_block(module, calls.arguments(block, 0, hidden))[OUTPUT].detach()
        arguments = calls.arguments(site.block, 0, hidden)
    consumer = site.consumer.removeprefix(f"{path}.")
    return find_residual_sum(model.module.get_submodule(path), consumer, arguments).place
