"""Every further family goes through all stages: written, pruned again, compensated, timed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.flops import flop_counter
from helpers.models import saved_model, shared_model
from helpers.promises import SHARED, every_family, is_shared, masked_outputs, sliced
from helpers.pruning import data_for, rank
from helpers.runs import outputs, random_inputs

from optin_cli.architectures.resolve import dissect
from optin_cli.artefacts.pruned import read_pruned
from optin_cli.compensation.plan import make_plan
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.measure import latency_table
from optin_cli.measure.evaluate import evaluate
from optin_cli.measure.inputs import default_size, dummy_inputs
from optin_cli.pruning import apply as stage
from optin_cli.selection.select import select

# norms over four positions blow rounding up: in float64, as elsewhere here, nothing is left of it
DEVIATION = {"maskformer-resnet": 1e-4, "maskformer-swin": 1e-4, "t5-gated": 3e-4}
USUAL = 2e-5
"""Of outputs up to about 6, as those of the random decoders are."""

POST_NORM = {"timm-post-norm", "swinv2", "timm-swinv2", "gemma2", "gemma3", "gemma3-one-group"}


@every_family
def test_written_models_load_and_are_pruned_again(name, tmp_path):
    dense = open_model(str(saved_model(name)))
    mask = select(rank(open_model(str(saved_model(name))), tmp_path), 0.7)
    for kept in mask.keep.values():  # which heads stay must not be the first ones by chance
        kept[:] = kept[1:] if len(kept) > 1 else kept
    inner = [site for site in dense.anatomy if site.block > 0 or name in SHARED]
    mask.keep[inner[0].name] = []  # of a transformer its heads, if it has any
    assert stage.apply(
        open_model(str(saved_model(name))), mask, tmp_path / "once"
    ).deviation <= DEVIATION.get(name, USUAL)
    once = open_model(str(tmp_path / "once"))
    assert type(once.module) is type(dense.module)
    assert {s.name: s.units for s in once.anatomy} == {n: len(k) for n, k in mask.keep.items()}
    assert_is_masked(once, dense, mask.keep)

    (tmp_path / "second").mkdir()
    again = select(rank(once, tmp_path / "second"), 0.3)
    assert stage.apply(once, again, tmp_path / "twice").deviation <= DEVIATION.get(name, USUAL)
    record = read_pruned(tmp_path / "twice")
    assert record.kept == {site: [mask.keep[site][i] for i in kept] for site, kept in again.keep.items()}
    assert record.dense["digest"] == dense.digest
    assert_is_masked(open_model(str(tmp_path / "twice")), dense, record.kept)


def assert_is_masked(pruned: OpenModel, dense: OpenModel, keep: dict[str, list[int]]) -> None:
    found = outputs(pruned, pruned.module, random_inputs(dense))
    torch.testing.assert_close(found, masked_outputs(dense, keep), rtol=0, atol=1e-5)


@every_family
def test_all_stages_run_and_compensation_helps(name, tmp_path):
    model, dense = open_model(str(saved_model(name))), shared_model(name)
    mask = select(rank(model, tmp_path, "mixed"), 0.5)
    plan = make_plan(model, mask, Compensation(batch_size=16), at_most=True)
    applied = stage.apply(model, mask, tmp_path / "out", plan=plan)
    assert applied.deviation <= DEVIATION.get(name, USUAL)
    assert all(fit.after <= fit.before for fit in applied.fits)
    assert any(fit.after < 0.95 * fit.before for fit in applied.fits)
    lost = {fit.site for fit in applied.fits if "no residual" in fit.note}
    if name in POST_NORM:
        assert lost == {site.name for site in model.anatomy}
    elif "maskformer" in name:  # queries begin as zero: nothing varies in the first two sums of the decoder
        first = model.anatomy.streams[-1].first
        assert lost == {f"blocks.{first}.heads", f"blocks.{first}.cross_heads"}
    else:
        assert not lost

    pruned = open_model(str(tmp_path / "out"))
    found = sample(data_for(model), model.family.modality, 6, 0, reader=model.task.reader)
    told = evaluate(pruned, Batches(found, pruned.processor, 3, reader=model.task.reader), dense)
    assert told.fidelity
    inputs = dummy_inputs(pruned, 2, default_size(pruned))
    assert outputs(pruned, pruned.module, inputs).isfinite().all()


@every_family
def test_a_latency_table_adds_up(name, monkeypatch):
    """With a clock that ticks once a FLOP the sub-layers explain the pruned model exactly."""
    monkeypatch.setattr(latency_table, "call_ms", flops)
    model = shared_model(name)
    size = default_size(model)
    table = latency_table.make_table(model, 2, size, repeats=1, seconds=0.0)
    keep = {site.name: list(range(i % (site.units + 1))) for i, site in enumerate(model.anatomy)}
    module = sliced(model, keep)
    pruned = dataclasses.replace(model, module=module, anatomy=dissect(module, model.family))
    inputs = dummy_inputs(pruned, 2, size)
    with torch.inference_mode():
        expected = flops(lambda: pruned.module(**inputs))
    found = table.model_ms({site: len(kept) for site, kept in keep.items()})
    if is_shared(model):  # of a layer between two sites each has a part: together they save more than that
        assert expected * (1 - 1e-6) <= found < table.total_ms
    else:
        assert found == pytest.approx(expected, rel=1e-6)


def flops(call, device=None) -> float:
    with flop_counter() as counter:
        call()
    return float(counter.get_total_flops())
