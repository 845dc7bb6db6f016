"""`apply` with compensation: what is written, recorded and recognised."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.data import tiny_text_csv
from helpers.families import ALL
from helpers.models import in_dtype, saved_model, shared_model
from helpers.pruning import pruned, rank
from helpers.runs import random_inputs

from optin_cli.artefacts.pruned import read_pruned
from optin_cli.compensation.plan import make_plan
from optin_cli.compensation.readout import readout_layers
from optin_cli.compensation.settings import Compensation
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError
from optin_cli.loading.checkpoint import open_model
from optin_cli.pruning import apply as stage
from optin_cli.selection.select import select
from optin_cli.transforms.masking import masked, masks_from_keep


def compensated(name, folder, out="out", flops=0.5, data=None, source=None, **settings):
    """(dense model, mask, plan, what apply said): pruned and compensated into folder/out."""
    model = open_model(str(source or saved_model(name)))
    mask = select(rank(model, folder), flops)
    plan = make_plan(model, mask, Compensation(batch_size=16, **settings), data, at_most=True)
    return model, mask, plan, stage.apply(model, mask, folder / out, plan=plan)


@pytest.mark.parametrize("name", ALL)
def test_compensated_models_load_as_what_was_checked(name, tmp_path):
    model, mask, plan, applied = compensated(name, tmp_path)
    assert applied.deviation <= 1e-5
    behind = readout_layers(model, plan.batches[0])
    assert list(dict.fromkeys(fit.site for fit in applied.fits)) == [*mask.keep, *behind]
    assert {fit.method for fit in applied.fits} - {"none"}
    plain, sliced = open_model(str(saved_model(name))), open_model(str(tmp_path / "out"))
    inputs = random_inputs(plain)
    with torch.inference_mode():
        found = sliced.output(inputs)
        with masked(plain.module, plain.anatomy, masks_from_keep(plain.anatomy, mask.keep)):
            uncompensated = plain.output(inputs)
    assert not torch.allclose(found, uncompensated, atol=1e-3)  # the new weights are what is on disk


def test_the_record_tells_what_was_done_at_each_site(tmp_path):
    model, _, plan, applied = compensated("bert", tmp_path, samples=40)
    entry = json.loads((tmp_path / "out" / "optin.json").read_text())["history"][0]["compensation"]
    assert entry["method"] == "auto"
    assert entry["rows"] == 40
    assert entry["data"]["spec"].endswith("train.csv")
    assert entry["fingerprint"] == plan.batches.examples.fingerprint
    sites = [site.name for site in model.anatomy]
    assert list(dict.fromkeys(fit["site"] for fit in entry["sites"])) == [
        *sites,
        "bert.pooler.dense",
        "classifier",
    ]
    for told, fit in zip(entry["sites"], applied.fits, strict=True):
        assert (told["method"], told["ridge"], told["note"]) == (fit.method, fit.ridge, fit.note)
        assert (told["before"], told["after"]) == (fit.before, fit.after)
        assert 0 <= told["after"] <= told["before"]
    assert "memory" not in entry  # it does not change the result


def test_without_compensation_the_record_says_so(tmp_path):
    pruned("bert", tmp_path)
    entry = json.loads((tmp_path / "out" / "optin.json").read_text())["history"][0]
    assert entry["compensation"] == {"method": "none"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bert", "float16"),
        ("timm-vit", "bfloat16"),
        pytest.param("bert", "bfloat16", marks=pytest.mark.slow),
        pytest.param("timm-vit", "float16", marks=pytest.mark.slow),
    ],
)
def test_half_precision_checkpoints_are_compared_as_they_are_stored(name, dtype, tmp_path):
    source = in_dtype(saved_model(name), tmp_path / "half", dtype)
    _, _, _, applied = compensated(name, tmp_path, source=source)
    assert {fit.method for fit in applied.fits} >= {"full"}
    assert applied.deviation <= 1e-5
    assert open_model(str(tmp_path / "out")).stored_dtype == getattr(torch, dtype)


def test_the_same_compensation_gives_the_same_bytes(tmp_path):
    for out in ("a", "b"):
        compensated("bert", tmp_path, out)
    for file in ("model.safetensors", "config.json", "optin.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_only_the_same_compensation_is_recognised(tmp_path):
    model, mask, plan, applied = compensated("bert", tmp_path, samples=40)
    found = stage.existing(tmp_path / "out", model, mask, plan)
    assert found.reused
    assert found.fits == applied.fits
    again = make_plan(model, mask, Compensation(batch_size=16, samples=40, memory=0))
    assert stage.existing(tmp_path / "out", model, mask, again).reused  # memory changes nothing
    moved = tiny_text_csv(tmp_path / "moved")
    same = make_plan(model, mask, Compensation(batch_size=16, samples=40), DataSpec(str(moved)))
    assert stage.existing(tmp_path / "out", model, mask, same).reused  # the rows count, not where they lie
    more = DataSpec(str(tiny_text_csv(tmp_path / "more", seed=3)))
    others = [
        None,
        make_plan(model, mask, Compensation(batch_size=16, samples=40, seed=1)),
        make_plan(model, mask, Compensation(batch_size=16, samples=41)),
        make_plan(model, mask, Compensation("full", batch_size=16, samples=40)),
        make_plan(model, mask, Compensation(batch_size=16, samples=40), more),
    ]
    for other in others:
        with pytest.raises(UsageError, match="another compensation"):
            stage.existing(tmp_path / "out", model, mask, other)


def test_models_of_older_versions_count_as_not_compensated(tmp_path):
    source, mask, _ = pruned("bert", tmp_path)
    path = tmp_path / "out" / "optin.json"
    record = json.loads(path.read_text())
    del record["history"][0]["compensation"]
    path.write_text(json.dumps(record))
    model = open_model(str(source))
    assert stage.existing(tmp_path / "out", model, mask).reused
    with pytest.raises(UsageError, match="another compensation"):
        stage.existing(tmp_path / "out", model, mask, make_plan(model, mask, Compensation(), at_most=True))


@pytest.mark.parametrize("name", [pytest.param("mpnet", marks=pytest.mark.slow), "timm-vit"])
def test_a_compensated_model_is_pruned_and_compensated_again(name, tmp_path):
    compensated(name, tmp_path, "once", flops=0.7)
    (tmp_path / "second").mkdir()
    _, _, _, applied = compensated(name, tmp_path / "second", flops=0.4, source=tmp_path / "once")
    assert applied.deviation <= 1e-5
    record = read_pruned(tmp_path / "second" / "out")
    made = [{fit["layer"] for fit in step["compensation"]["sites"]} for step in record.history]
    consumers = {site.consumer for site in shared_model(name).anatomy}
    assert consumers < made[1] <= made[0]  # emptied sites have no producers left


def test_labels_are_not_needed(tmp_path):
    unlabelled = DataSpec(str(tiny_text_csv(tmp_path / "plain", labels=None, pairs=False)))
    assert compensated("bert", tmp_path, data=unlabelled)[3].fits


def test_calibration_data_that_is_gone_is_no_reason_to_compensate_on_something_else(tmp_path):
    model, mask, _, _ = compensated("bert", tmp_path)
    mask.calibration["spec"] = str(tmp_path / "gone.csv")
    with pytest.raises(InputError, match="can't be read again") as told:
        make_plan(model, mask, Compensation())
    assert "data=DATA" in told.value.hint
    assert "compensate='none'" in told.value.hint
    assert make_plan(model, mask, Compensation("none")) is None
    with pytest.raises(UsageError, match="no data at"):
        make_plan(model, mask, Compensation(), DataSpec(str(tmp_path / "no.csv")))


def test_fewer_rows_than_asked_for_are_told_only_when_they_were_asked_for(tmp_path, caplog):
    model, mask, _, _ = compensated("bert", tmp_path)
    assert "fewer than" not in caplog.text
    make_plan(model, mask, Compensation(samples=100))
    assert "60 rows, fewer than the 100 asked for" in caplog.text
