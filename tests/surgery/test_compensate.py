"""Compensation of whole models: against least squares on full forward passes, and what it must leave alone."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.families import ALL, BLOCKS, IMAGE_SIZE, PATCH_SIZE
from helpers.models import in_dtype, saved_model, shared_model, tiny_model
from helpers.runs import SWIN_WINDOWS, window_rows

from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError
from optin_cli.models.checkpoint import OpenModel, open_model
from optin_cli.models.dissect import dissect
from optin_cli.models.layers import matrix, output_size, patches
from optin_cli.models.masking import masked, masks_from_keep
from optin_cli.models.slicing import slice_model
from optin_cli.surgery.compensate import compensate
from optin_cli.surgery.settings import Compensation
from optin_cli.surgery.store import Store
from optin_cli.surgery.streams import BlockCalls
from optin_cli.surgery.sumpoint import OUTPUT, find_sum_point, run_block

FULL = Compensation(method="full", ridges=(1e-3,), read_share=0.8, batch_size=16)
AUTO = Compensation(batch_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def batches_for(model: OpenModel, folder, rows: int = 60, pairs: bool = False, seed: int = 0) -> Batches:
    if model.family.modality == "image":
        data = tiny_image_folder(folder / f"images{rows}-{seed}", n=rows, seed=seed)
    else:
        name = f"{rows}-{pairs}-{seed}.csv"
        data = tiny_text_csv(folder, rows=rows, labels=None, pairs=pairs, seed=seed, name=name)
    examples = sample(DataSpec(str(data)), model.family.modality, None, 0)
    return Batches(examples, model.processor, 16, reader=model.task.reader)


def copied(model: OpenModel) -> OpenModel:
    return OpenModel(
        model.source,
        copy.deepcopy(model.module),
        model.family,
        model.anatomy,
        model.task,
        model.stored_dtype,
    )


def half(model: OpenModel, seed: int = 0) -> dict[str, list[int]]:
    """About half of the units of every site, any of them."""
    rng = np.random.default_rng(seed)
    return {s.name: sorted(rng.choice(s.units, s.units // 2, replace=False).tolist()) for s in model.anatomy}


@torch.no_grad()
def outputs(model: OpenModel, keep, batches: Batches):
    """Outputs of the masked model on every example."""
    with masked(model.module, model.anatomy, masks_from_keep(model.anatomy, keep)):
        return torch.cat([model.output(batch.inputs)[:, 0] for batch in batches])


# ---- the oracle: numpy on full forward passes of the dense and the masked model ----


@torch.no_grad()
def seen(model: OpenModel, keep, batches: Batches, site, place):
    """(input of a site's consumer, tensor at its sum point) in full passes of the masked model, by real token."""
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


@pytest.mark.parametrize("name", ["albert", "albert-groups"])
def test_blocks_that_share_a_consumer_are_refitted_together(name, tmp_path):
    """On other rows the output comes closer to the dense one's, with one set of weights for all blocks."""
    model = shared_model(name)
    refitted, keep = copied(model), half(model)
    fits = compensate(refitted, keep, batches_for(model, tmp_path, rows=400), Compensation())
    assert [fit.site for fit in fits] == [site.name for site in model.anatomy]
    assert all(fit.method != "none" for fit in fits)
    others = batches_for(model, tmp_path, rows=60, seed=5)
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
def test_every_site_gets_the_least_squares_of_full_passes(name, head, folder):
    """Sites in order: each is fitted with the earlier ones refitted and the later ones as they were."""
    dense = shared_model(name, head)
    batches = batches_for(dense, folder)
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
    with Store(1 << 30) as store:
        calls = BlockCalls(model, store)
        hidden = calls.record(0, batches[0])
        for block in range(site.block):
            module = model.module.get_submodule(model.anatomy.blocks[block])
            hidden = run_block(module, calls.arguments(block, 0, hidden))[OUTPUT].detach()
        arguments = calls.arguments(site.block, 0, hidden)
    consumer = site.consumer.removeprefix(f"{path}.")
    return find_sum_point(model.module.get_submodule(path), consumer, arguments).place


# ---- what it is for ----


@pytest.mark.parametrize("name", ALL)
def test_it_brings_outputs_of_unseen_rows_closer_to_the_dense_ones(name, folder):
    dense, fitted = shared_model(name), copied(shared_model(name))
    keep = {s.name: list(range(s.units * 3 // 4)) for s in dense.anatomy}
    fits = compensate(fitted, keep, batches_for(dense, folder, rows=160), AUTO)
    unseen = batches_for(dense, folder, rows=40, seed=9)
    target = outputs(dense, {}, unseen)
    before, after = ((outputs(m, keep, unseen) - target).square().mean() for m in (dense, fitted))
    assert after < 0.7 * before
    assert all(fit.after <= fit.before for fit in fits)
    assert {fit.method for fit in fits} >= {"full"}


@pytest.mark.parametrize("name", ["bert", "mpnet", "distilbert", "timm-vit"])
def test_a_pruned_model_is_brought_back_to_its_teacher(name, folder):
    """Slicing first and following the dense model later is compensating while slicing."""
    dense, fitted, sliced = (copied(shared_model(name)) for _ in range(3))
    keep, batches = half(dense), batches_for(dense, folder, rows=160)
    compensate(fitted, keep, batches, FULL)
    slice_model(sliced.module, sliced.anatomy, keep)
    sliced = dataclasses.replace(sliced, anatomy=dissect(sliced.module, sliced.family))
    compensate(sliced, {}, batches, FULL, teacher=dense)
    unseen = batches_for(dense, folder, rows=40, seed=9)
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
@pytest.mark.parametrize("name", ["bert", "vit", "timm-vit", "scaled"])
def test_a_duplicate_is_made_up_for_by_its_twin(name, kind, folder):
    model, site = duplicated(name, kind, folder)
    batches = batches_for(model, folder)
    target = outputs(model, {}, batches)
    keep = {site.name: [u for u in range(site.units) if u != 1]}
    assert (outputs(model, keep, batches) - target).abs().max() > 1e-3
    fits = compensate(model, keep, batches, Compensation(method="full", batch_size=16))
    assert (outputs(model, keep, batches) - target).abs().max() < 1e-5
    found = next(fit for fit in fits if fit.site == site.name)
    assert found.after < 1e-6 * found.before


# ---- what it leaves alone ----


@pytest.mark.parametrize("method", ["auto", "full", "scale", "bias", "none"])
@pytest.mark.parametrize("name", ["bert", "timm-vit"])
def test_with_all_units_kept_nothing_changes(name, method, folder):
    dense, fitted = shared_model(name), copied(shared_model(name))
    keep = {site.name: list(range(site.units)) for site in dense.anatomy}
    for kept in (keep, {}):
        compensate(fitted, kept, batches_for(dense, folder), Compensation(method=method, batch_size=16))
        for key, value in dense.module.state_dict().items():
            assert torch.equal(fitted.module.state_dict()[key], value), key


@pytest.mark.parametrize("name", ALL)
def test_only_kept_columns_and_biases_of_consumers_change(name, folder):
    dense, fitted = shared_model(name), copied(shared_model(name))
    keep = half(dense)
    compensate(fitted, keep, batches_for(dense, folder), FULL)
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


def test_the_same_inputs_give_the_same_weights_however_much_memory_there_is(folder):
    dense = shared_model("mpnet")
    states, told = [], []
    for memory in (1 << 30, 20_000, 0):
        fitted = copied(dense)
        told.append(
            compensate(
                fitted,
                half(dense),
                batches_for(dense, folder),
                Compensation(memory=memory, batch_size=16),
            )
        )
        states.append(fitted.module.state_dict())
    assert told[0] == told[1] == told[2]
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value)
        assert torch.equal(states[2][key], value)


# ---- odd sites ----


def test_sites_without_units_and_with_one(folder):
    dense, fitted = shared_model("bert"), copied(shared_model("bert"))
    keep = half(dense) | {"blocks.0.neurons": [], "blocks.1.heads": [], "blocks.1.neurons": [3]}
    batches = batches_for(dense, folder)
    fits = {fit.site: fit for fit in compensate(fitted, keep, batches, AUTO)}
    for name in ("blocks.0.neurons", "blocks.1.heads"):
        assert fits[name].method == "bias"
        assert fits[name].after < fits[name].before
        assert fits[name].note == "no units left"
    target = outputs(dense, {}, batches)
    before, after = ((outputs(m, keep, batches) - target).square().mean() for m in (dense, fitted))
    assert after < before


@pytest.mark.parametrize("emptied", ["blocks.2.channels1", "blocks.2.channels2"])
def test_convolutions_without_inputs_or_outputs(emptied, folder):
    model = copied(shared_model("timm-resnet"))
    fits = {
        fit.site: fit
        for fit in compensate(model, half(model) | {emptied: []}, batches_for(model, folder), AUTO)
    }
    assert fits[emptied].method == "bias"  # into the norm behind
    assert all(fit.after <= fit.before for fit in fits.values())


def test_a_model_that_was_emptied_before_can_be_compensated_again(folder, tmp_path):
    model = copied(shared_model("mpnet"))
    keep = half(model) | {"blocks.1.heads": [], "blocks.2.neurons": []}
    slice_model(model.module, model.anatomy, keep)
    model.anatomy = dissect(model.module, model.family)
    fits = compensate(model, half(model, seed=1), batches_for(model, folder), AUTO)
    assert len(fits) == 6
    assert all(fit.after <= fit.before for fit in fits)


def test_fewer_rows_than_units_are_told(folder):
    model = copied(shared_model("vit"))
    fits = compensate(model, half(model), batches_for(model, folder, rows=2), AUTO)
    assert {fit.note for fit in fits} == {"too few rows to hold any out"}
    assert {fit.method for fit in fits} == {"none"}
    model = copied(shared_model("bert"))
    keep = {f"blocks.{block}.neurons": list(range(1, 64)) for block in range(3)}
    fits = compensate(model, keep, batches_for(model, folder, rows=5), AUTO)
    neurons = [fit for fit in fits if fit.site.endswith("neurons")]
    assert all("rows are too few for 63 features" in fit.note for fit in neurons)
    assert "full" not in {fit.method for fit in neurons}


def test_both_sides_of_a_pair_are_fitted_or_held_out_together(folder, monkeypatch):
    """An embedding model gets two sentences a row; hardly different ones must not be on both sides of the choice."""
    from optin_cli.surgery.rows import RowChoice

    model = copied(shared_model("bert", "encoder"))
    batches = batches_for(model, folder, pairs=True, rows=20)
    held = {}
    right = RowChoice.held_out

    def watched(self, index, like):
        found = right(self, index, like)
        held.update(zip(self.batches.ids(index), found[:, 0].tolist(), strict=True))
        return found

    monkeypatch.setattr(RowChoice, "held_out", watched)
    compensate(model, half(model), batches, AUTO)
    assert len(held) == 40
    assert [held[2 * row] for row in range(20)] == [held[2 * row + 1] for row in range(20)]
    assert sum(held.values()) == 8


def test_a_consumer_that_runs_in_chunks_is_left_as_it_is(tmp_path, folder):
    model = open_model(str(tiny_model("bert", tmp_path, chunk_size_feed_forward=1)))
    batches = Batches(  # texts of one length: chunks must divide it
        sample(DataSpec(str(same_length(tmp_path))), "text", None, 0), model.processor, 8
    )
    fits = {f.site: f for f in compensate(model, half(model), batches, AUTO)}
    assert fits["blocks.0.neurons"].method == "none"
    assert "does not run exactly once" in fits["blocks.0.neurons"].note
    assert fits["blocks.0.heads"].method != "none"


def same_length(folder):
    path = folder / "same.csv"
    path.write_text("sentence\n" + "\n".join(f"the {a} runs {b}" for a in ("cat", "dog", "bird", "tree", "river")
                                             for b in ("well", "never", "always", "under")) + "\n")  # fmt: skip
    return path


def test_activations_that_are_not_finite_are_refused(folder):
    model = copied(shared_model("bert"))
    model.module.get_submodule("bert.encoder.layer.1.intermediate.dense").weight.data[0] = float("inf")
    with pytest.raises(InputError, match="block 1 gives NaN"):
        compensate(model, half(model), batches_for(model, folder), AUTO)


def test_a_model_with_replaced_forwards_is_refused(folder):
    """As accelerate does to models that are spread over devices; the copies would run the originals."""
    model = copied(shared_model("bert"))
    module = model.module.get_submodule("bert.encoder")
    module.forward = module.forward
    with pytest.raises(InputError, match="forward is replaced"):
        compensate(model, half(model), batches_for(model, folder), AUTO)


@pytest.mark.parametrize("name", ["bert", "timm-vit"])
def test_new_weights_are_what_the_stored_dtype_can_hold(name, tmp_path, folder):
    model = open_model(str(in_dtype(saved_model(name), tmp_path / name, "float16")))
    assert model.stored_dtype == torch.float16
    compensate(model, half(model), batches_for(model, folder), FULL)
    for key, value in model.module.state_dict().items():
        assert torch.equal(value.half().float(), value), key


def test_progress_ends_where_it_said(folder):
    model, calls = copied(shared_model("distilbert")), []
    compensate(model, half(model), batches_for(model, folder), AUTO, lambda *told: calls.append(told))
    done, total, _ = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == total[-1] == total[0]


@pytest.mark.parametrize(
    ("settings", "says"), [({"method": "best"}, "unknown compensation"), ({"samples": 0}, "--samples 0")]
)
def test_wrong_settings(settings, says):
    with pytest.raises(UsageError, match=says):
        Compensation(**settings)


# ---- convolutions ----


def with_a_double(model: OpenModel, name: str) -> OpenModel:
    """A copy whose unit 1 of a site of channels does what unit 0 does."""
    twin = copied(model)
    site = twin.anatomy[name]
    for path in (*(producer.path for producer in site.producers), *site.carried):
        layer = twin.module.get_submodule(path)
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            if tensor.dim():
                tensor.data[1] = tensor.data[0]
    for path in site.readers:  # no refit of the consumer could change what a squeeze-and-excite reads
        twin.module.get_submodule(path).weight.data[:, 1] = 0
    return twin


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("timm-resnet", "blocks.0.channels"),
        ("timm-resnet", "blocks.2.channels2"),
        ("timm-efficientnet", "blocks.1.channels"),
        ("timm-efficientnet", "blocks.3.channels"),
    ],
)
def test_full_restores_a_duplicate_channel(family, name, folder):
    model = with_a_double(shared_model(family), name)
    batches = batches_for(model, folder, 200)
    keep = {name: [unit for unit in range(model.anatomy[name].units) if unit != 1]}
    dense = outputs(model, {}, batches)
    assert (outputs(model, keep, batches) - dense).abs().max() > 1e-3
    settings = dataclasses.replace(FULL, ridges=(1e-10,))
    (fit,) = [fit for fit in compensate(model, keep, batches, settings) if fit.site == name]
    assert fit.method == "full"
    assert fit.after < 1e-8
    torch.testing.assert_close(outputs(model, keep, batches), dense, rtol=0, atol=1e-5)


def test_the_norm_behind_a_convolution_takes_up_its_bias(folder):
    """Oracle: the mean of what the sum lacks, by full forward passes."""
    model = copied(shared_model("timm-resnet"))
    site = model.anatomy["blocks.1.channels"]
    batches = batches_for(model, folder, 48)
    keep = {site.name: list(range(site.units // 2))}
    block = model.module.get_submodule(model.anatomy.blocks[1])
    norm = model.module.get_submodule(site.norm)

    def mean_after_norm(kept) -> torch.Tensor:
        found = []
        handle = norm.register_forward_hook(lambda _, __, output: found.append(output.mean((2, 3))))
        outputs(model, kept, batches)
        handle.remove()
        return torch.cat(found).mean(0)

    wanted, before = mean_after_norm({}), norm.bias.clone()
    weights = block.conv2.weight.clone()
    compensate(model, keep, batches, Compensation(method="bias", batch_size=16))
    assert not torch.equal(norm.bias, before)
    assert torch.equal(block.conv2.weight, weights)
    lacking, left = (wanted - mean_after_norm({**keep})), norm.bias - before
    assert float(lacking.norm()) < 0.5 * float(left.norm())


def test_rows_of_a_convolution_are_its_input_patches():
    """Oracle: the convolution itself, for odd strides, paddings and dilations."""
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    for layer in (
        torch.nn.Conv2d(3, 5, 3, stride=2, padding=1),
        torch.nn.Conv2d(3, 5, (3, 2), padding=(2, 0), dilation=2, bias=False),
        torch.nn.Conv2d(3, 5, 1, stride=2),
        Conv2dSame(3, 5, 3, stride=2),
        torch.nn.Conv2d(3, 5, 5, padding="same"),
    ):
        x = torch.randn(2, 3, 11, 8)
        expected = layer(x)
        found = patches(layer, x) @ matrix(layer).T
        found = found + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(found, expected.flatten(2).mT)
        assert output_size(layer, (11, 8)) == tuple(expected.shape[2:])
