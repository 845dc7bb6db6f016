"""`prune --steps`: the budget falls geometrically, each step ranks what is left, all follow the first model."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import saved_model
from typer.testing import CliRunner

from optin_cli import pipeline as stage
from optin_cli.artefacts.pruned import read_pruned
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.errors import UsageError
from optin_cli.loading.checkpoint import open_model
from optin_cli.main import app
from optin_cli.pipeline import NO_COMPENSATION, prune
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.selection.settings import Request

REFIT = Compensation(batch_size=16, samples=32)


def plan_of(name: str, folder, **settings):
    data = tiny_image_folder(folder / "images", n=40) if name == "timm-vit" else tiny_text_csv(folder)
    chosen = ScoreSettings(**{"method": "curvature", "samples": 16, "batch_size": 8, "probes": 2, **settings})
    return make_plan(
        open_model(str(saved_model(name, blocks=2) if name == "bert" else saved_model(name))),
        DataSpec(str(data)),
        chosen,
    )


def walked(plan, folder, flops=0.3, count=3, compensation=NO_COMPENSATION, out="out"):
    return stage.prune_in_steps(
        plan, Request(flops=flops), folder / out, folder / "first.h5", count, rankings=folder / "rankings",
        compensation=compensation,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["bert", pytest.param("timm-vit", marks=pytest.mark.slow)])
def test_budgets_fall_geometrically_and_count_from_the_dense_model(name, tmp_path):
    plan = plan_of(name, tmp_path)
    done = walked(plan, tmp_path)
    assert [step.mask.budget["flops"] for step in done] == pytest.approx([0.3 ** (i / 3) for i in (1, 2, 3)])
    dense = plan.model.anatomy
    kept = {s.name: s.units for s in open_model(str(tmp_path / "out")).anatomy}
    tokens = done[0].mask.budget["tokens"]
    macs = [s.macs_per_unit(tokens) for s in dense]
    whole = sum(m * s.units for m, s in zip(macs, dense, strict=True))
    left = sum(m * kept[s.name] for m, s in zip(macs, dense, strict=True))
    assert 0.2 * whole < left <= 0.3 * whole
    # each mask is of the model that the step before left
    for before, after in itertools.pairwise(done):
        assert after.mask.units == {n: len(units) for n, units in before.mask.keep.items()}
        assert after.mask.model_digest != before.mask.model_digest
    assert not (tmp_path / ".out.steps").exists()


def test_every_step_ranks_what_is_left_and_its_ranking_is_kept(tmp_path):
    plan = plan_of("bert", tmp_path)
    done = walked(plan, tmp_path)
    assert [step.ranking_reused for step in done] == [False] * 3
    assert done[0].ranking_path == tmp_path / "first.h5"
    assert {step.ranking_path.parent for step in done[1:]} == {tmp_path / "rankings"}
    again = walked(plan_of("bert", tmp_path), tmp_path, out="again")
    assert [step.ranking_reused for step in again] == [True] * 3
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "out/model.safetensors"
    ).read_bytes()


def test_one_step_is_plain_pruning(tmp_path):
    walked(plan_of("bert", tmp_path), tmp_path, count=1, compensation=REFIT)
    plan = plan_of("bert", tmp_path)
    prune(plan, Request(flops=0.3), tmp_path / "plain", tmp_path / "r.h5", compensation=REFIT)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain"))
    assert one == other


def test_later_steps_follow_the_first_model_not_the_one_before(tmp_path, monkeypatch):
    plan, teachers = plan_of("bert", tmp_path), []

    def spied(current, *args, teacher, **kwargs):
        teachers.append(None if teacher is None else teacher.digest)
        return prune(current, *args, teacher=teacher, **kwargs)

    monkeypatch.setattr(stage, "prune", spied)
    walked(plan, tmp_path, compensation=REFIT)
    assert teachers == [None, plan.model.digest, plan.model.digest]


@pytest.mark.slow
def test_compensated_steps_end_nearer_to_the_first_model(tmp_path):
    dense = open_model(str(saved_model("bert")))
    rows = sample(DataSpec(str(tiny_text_csv(tmp_path / "unseen", seed=5))), "text", None, 0)
    batches = Batches(rows, dense.processor, 16)

    def distance(path) -> float:
        model = open_model(str(path))
        with torch.inference_mode():
            return sum(
                float((model.output(b.inputs) - dense.output(b.inputs)).square().sum()) for b in batches
            )

    walked(plan_of("bert", tmp_path), tmp_path, 0.5)
    walked(plan_of("bert", tmp_path), tmp_path, 0.5, compensation=REFIT, out="refitted")
    assert distance(tmp_path / "refitted") < 0.8 * distance(tmp_path / "out")


def test_amounts_wait_for_the_last_step(tmp_path):
    request = Request(flops=0.25, params=0.5, memory=3.0, latency_ms=None)
    eased = stage._eased(request, 0.5)
    assert (eased.flops, eased.params, eased.memory) == (0.5, pytest.approx(0.5**0.5), None)
    assert eased == replace(request, flops=0.5, params=0.5**0.5, memory=None)


@pytest.mark.parametrize(
    ("request_", "count", "says"),
    [
        (Request(flops=0.5), 0, "steps=0: at least 1"),
        (Request(flops=0.5, relative_to="current"), 2, "from the dense model"),
        (Request(memory=1.0), 2, "needs a budget that is a share"),
    ],
)
def test_what_steps_can_not_do(request_, count, says, tmp_path):
    plan = plan_of("bert", tmp_path, method="magnitude")
    with pytest.raises(UsageError, match=says):
        stage.prune_in_steps(
            plan, request_, tmp_path / "out", tmp_path / "r.h5", count, rankings=tmp_path / "rankings"
        )
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_step_that_fails_leaves_nothing_half_done(tmp_path, monkeypatch):
    plan, calls = plan_of("bert", tmp_path, method="magnitude"), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("No space left on device")
        return prune(*args, **kwargs)

    monkeypatch.setattr(stage, "prune", failing)
    with pytest.raises(OSError, match="No space"):
        walked(plan, tmp_path)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.steps").exists()


def test_the_command(tmp_path):
    arguments = [
        "prune",
        saved_model("bert"),
        "--data",
        tiny_text_csv(tmp_path),
        "--flops",
        0.3,
        "--steps",
        2,
    ]
    arguments += ["--method", "curvature", "--samples", 16, "--probes", 2, "-o", tmp_path / "out", "--json"]
    arguments += ["--ranking", tmp_path / "rankings" / "r.h5"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["mask"]["reached"]["flops"] <= 0.3
    assert len(list((tmp_path / "rankings").glob("*.h5"))) == 2
    assert len(read_pruned(tmp_path / "out").history) == 2
