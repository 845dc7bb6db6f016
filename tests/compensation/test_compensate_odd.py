"""Compensation where something is odd: sites without units, too few rows, models it can't follow, wrong settings."""

from __future__ import annotations

import pytest
import torch
from helpers.compensation import AUTO, FULL, batches_for, copied, half, outputs
from helpers.data import tiny_audio_folder
from helpers.models import in_dtype, saved_model, shared_model, tiny_model

from optin_cli.architectures.resolve import dissect
from optin_cli.compensation.compensate import compensate
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError
from optin_cli.loading.checkpoint import open_model
from optin_cli.transforms.slicing import slice_model


def test_sites_without_units_and_with_one():
    dense, fitted = shared_model("bert"), copied(shared_model("bert"))
    keep = half(dense) | {"blocks.0.neurons": [], "blocks.1.heads": [], "blocks.1.neurons": [3]}
    batches = batches_for(dense)
    fits = {fit.site: fit for fit in compensate(fitted, keep, batches, AUTO)}
    for name in ("blocks.0.neurons", "blocks.1.heads"):
        assert fits[name].method == "bias"
        assert fits[name].after < fits[name].before
        assert fits[name].note == "no units left"
    target = outputs(dense, {}, batches)
    before, after = ((outputs(m, keep, batches) - target).square().mean() for m in (dense, fitted))
    assert after < before


def test_recordings_are_decoded_once_however_often_blocks_run(tmp_path, monkeypatch):
    """The blocks of an encoder-decoder run within the whole model, again and again."""
    model = copied(shared_model("whisper"))
    data = DataSpec(str(tiny_audio_folder(tmp_path, 8, transcripts=True) / "train.csv"), workers=0)
    examples = sample(data, "audio", None, 0, reader=model.task.reader)
    batches = Batches(examples, model.processor, 4, reader=model.task.reader)
    read = []
    monkeypatch.setattr(Batches, "stored_example", reading(Batches.stored_example, read))
    fits = compensate(model, half(model), batches, Compensation(batch_size=4, readout=False))
    assert any(fit.after < fit.before for fit in fits)
    assert sorted(read) == list(range(8))


def reading(stored_example, read):
    def counted(batches, example):
        read.append(example)
        return stored_example(batches, example)

    return counted


@pytest.mark.parametrize(
    "emptied", [pytest.param("blocks.2.channels1", marks=pytest.mark.slow), "blocks.2.channels2"]
)
def test_convolutions_without_inputs_or_outputs(emptied):
    model = copied(shared_model("timm-resnet"))
    fits = {fit.site: fit for fit in compensate(model, half(model) | {emptied: []}, batches_for(model), AUTO)}
    assert fits[emptied].method == "bias"  # into the norm behind
    assert all(fit.after <= fit.before for fit in fits.values())


def test_a_model_that_was_emptied_before_can_be_compensated_again():
    model = copied(shared_model("mpnet"))
    keep = half(model) | {"blocks.1.heads": [], "blocks.2.neurons": []}
    slice_model(model.module, model.anatomy, keep)
    model.anatomy = dissect(model.module, model.family)
    fits = compensate(model, half(model, seed=1), batches_for(model), AUTO)
    assert {fit.layer for fit in fits} >= {site.consumer for site in model.anatomy}
    assert all(fit.after <= fit.before for fit in fits)


def test_fewer_rows_than_units_are_told():
    model = copied(shared_model("vit"))
    fits = compensate(model, half(model), batches_for(model, rows=2), AUTO)
    assert {fit.note for fit in fits} == {"too few rows to hold any out"}
    assert {fit.method for fit in fits} == {"none"}
    model = copied(shared_model("bert"))
    keep = {f"blocks.{block}.neurons": list(range(1, 64)) for block in range(3)}
    fits = compensate(model, keep, batches_for(model, rows=5), AUTO)
    behind = {site.consumer for site in model.anatomy if site.kind == "neurons"}
    neurons = [fit for fit in fits if fit.layer in behind]
    assert all("rows are too few for 63 features" in fit.note for fit in neurons)
    assert "full" not in {fit.method for fit in neurons}


def test_both_sides_of_a_pair_are_fitted_or_held_out_together(monkeypatch):
    """An embedding model gets two sentences a row; hardly different ones must not be on both sides of the choice."""
    from optin_cli.compensation.row_sampling import RowChoice

    model = copied(shared_model("bert", "encoder"))
    batches = batches_for(model, pairs=True, rows=20)
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


def test_a_consumer_that_runs_in_chunks_is_left_as_it_is(tmp_path):
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


def test_activations_that_are_not_finite_are_refused():
    model = copied(shared_model("bert"))
    model.module.get_submodule("bert.encoder.layer.1.intermediate.dense").weight.data[0] = float("inf")
    with pytest.raises(InputError, match="block 1 gives NaN"):
        compensate(model, half(model), batches_for(model), AUTO)


def test_a_model_with_replaced_forwards_is_refused():
    """As accelerate does to models that are spread over devices; the copies would run the originals."""
    model = copied(shared_model("bert"))
    module = model.module.get_submodule("bert.encoder")
    module.forward = module.forward
    with pytest.raises(InputError, match="forward is replaced"):
        compensate(model, half(model), batches_for(model), AUTO)


@pytest.mark.parametrize("name", ["bert", "timm-vit"])
def test_new_weights_are_what_the_stored_dtype_can_hold(name, tmp_path):
    model = open_model(str(in_dtype(saved_model(name), tmp_path / name, "float16")))
    assert model.stored_dtype == torch.float16
    compensate(model, half(model), batches_for(model), FULL)
    for key, value in model.module.state_dict().items():
        assert torch.equal(value.half().float(), value), key


def test_progress_ends_where_it_said():
    model, calls = copied(shared_model("distilbert")), []
    compensate(model, half(model), batches_for(model), AUTO, lambda *told: calls.append(told))
    done, total, _ = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == total[-1] == total[0]


@pytest.mark.parametrize(
    ("settings", "says"), [({"method": "best"}, "unknown compensation"), ({"samples": 0}, "samples=0")]
)
def test_wrong_settings(settings, says):
    with pytest.raises(UsageError, match=says):
        Compensation(**settings)
