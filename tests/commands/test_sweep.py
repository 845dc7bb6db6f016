"""`sweep`, `pick` and `prune` with a promise, as a user runs them."""

from __future__ import annotations

import csv
import json
import re
import shutil

import numpy as np
import pytest
from helpers.cli import FAST, run
from helpers.data import tiny_text_csv
from helpers.models import tiny_model

import optin_cli as optin
from optin_cli import pipeline
from optin_cli.artefacts.mask import read_mask
from optin_cli.artefacts.point import read_sweep
from optin_cli.artefacts.pruned import read_pruned
from optin_cli.loading.checkpoint import load
from optin_cli.trials import run as running
from optin_cli.trials import search

QUICK = [
    *FAST,
    "--compensate-samples",
    12,
    "--seconds",
    0,
    "--repeats",
    2,
    "--bench-batch-size",
    "1,2",
    "--seq-len",
    8,
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_text_csv(folder)
    tiny_text_csv(folder, rows=40, seed=3, name="validation.csv")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model("bert", tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def swept(model, data, tmp_path_factory):
    """A sweep of two budgets with both variants."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    run(
        "sweep", model, "--data", data, "--flops", "0.7,0.4", "-o", folder, *QUICK,
        "--variant", "random", "--variant", "uncompensated",
    )  # fmt: skip
    return folder


def test_a_sweep_is_what_the_stages_make_one_by_one(model, swept, data, tmp_path):
    points = {point.name: point for point in read_sweep(swept).points}
    assert list(points) == [
        "flops-0.7", "flops-0.4", "flops-0.7-random", "flops-0.4-random", "flops-0.7-uncompensated",
        "flops-0.4-uncompensated",
    ]  # fmt: skip
    run("score", model, "--data", data, "-o", tmp_path / "r.h5", *FAST, "-q")
    run("select", tmp_path / "r.h5", "--flops", "0.4", "-o", tmp_path / "m.json")
    assert (tmp_path / "m.json").read_bytes() == (swept / "flops-0.4.mask.json").read_bytes()
    run("apply", model, tmp_path / "m.json", "-o", tmp_path / "out", "--samples", 12, "--batch-size", 6)
    ours, theirs = (folder / "model.safetensors" for folder in (swept / "flops-0.4", tmp_path / "out"))
    assert ours.read_bytes() == theirs.read_bytes()
    evaluated = json.loads(
        run("eval", tmp_path / "out", "--baseline", model, "--data", data, "--batch-size", 6, "--json").stdout
    )
    point = points["flops-0.4"]
    assert point.evaluation["metrics"] == pytest.approx(evaluated["metrics"])
    assert point.drop == pytest.approx(evaluated["drop"])
    assert [timing["batch_size"] for timing in point.timings] == [1, 2]
    for timing in point.timings:
        assert timing["speedup"] == pytest.approx(timing["dense_ms"] / timing["ms"])
        assert timing["interval"][0] <= timing["interval"][1]


def test_variants_keep_as_much_of_other_units_or_do_not_refit(swept):
    masks = {name: read_mask(swept / f"{name}.mask.json") for name in ("flops-0.4", "flops-0.4-random")}
    assert masks["flops-0.4"].keep != masks["flops-0.4-random"].keep
    assert masks["flops-0.4-random"].reached["flops"] <= 0.4
    plain = read_pruned(swept / "flops-0.4-uncompensated").history[-1]
    assert plain["compensation"] == {"method": "none"}
    assert plain["mask"] == masks["flops-0.4"].digest
    timed = {point.name: bool(point.timings) for point in read_sweep(swept).points}
    assert [name for name, there in timed.items() if there] == ["flops-0.7", "flops-0.4"]


def test_a_sweep_that_was_stopped_goes_on(model, data, tmp_path, monkeypatch):
    command = ["sweep", model, "--data", data, "-o", tmp_path / "s", *QUICK, "--no-bench"]
    whole = pipeline.prune
    made = []

    def stopped_at_the_second(plan, request, *args, **options):
        made.append(request.flops)
        if len(made) == 2:
            raise KeyboardInterrupt
        return whole(plan, request, *args, **options)

    monkeypatch.setattr(pipeline, "prune", stopped_at_the_second)
    run(*command, "--flops", "0.8,0.6", code=130)
    assert [point.name for point in read_sweep(tmp_path / "s").points] == ["flops-0.8"]
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*") if path.is_file()}
    done = json.loads(run(*command, "--flops", "0.8,0.6", "--json", "-q").stdout)
    assert [point["name"] for point in done["points"]] == ["flops-0.8", "flops-0.6"]
    kept = [
        path for path in first if path.suffix in (".h5", ".safetensors") or path.name.endswith("point.json")
    ]
    assert len(kept) == 3 and all(path.stat().st_mtime_ns == first[path] for path in kept)


def test_what_was_measured_in_another_way_is_measured_again(model, data, tmp_path):
    command = ["sweep", model, "--data", data, "--flops", "0.6", "-o", tmp_path / "s", *QUICK]
    run(*command, "--no-bench", "-q")
    assert not read_sweep(tmp_path / "s").points[0].timings
    run(*command, "-q")
    (before,) = read_sweep(tmp_path / "s").points
    assert len(before.timings) == 2 and before.evaluation["examples"] == 40
    said = run(*command, "--eval-samples", 10, "-q", "--explain").stderr
    (after,) = read_sweep(tmp_path / "s").points
    assert after.evaluation["examples"] == 10 and after.timings == before.timings
    assert "flops-0.6: up to date, with the same model, mask" in said
    assert "flops-0.6.point.json: fingerprint was" in said and said.endswith("; examples was 40, is 10\n")


def test_a_sweep_says_what_has_changed_and_replaces_it_on_request(model, tmp_path):
    data = tiny_text_csv(tmp_path, rows=40)
    command = ["sweep", model, "--data", data, "--eval-data", data, "--flops", "0.6", "-o", tmp_path / "s", *QUICK,
               "--compensate", "none", "--no-bench", "-q", "--explain"]  # fmt: skip
    assert "flops-0.6: it is not there yet" in run(*command).stderr
    said = run(*command).stderr
    assert "h5: up to date" in said and "flops-0.6.point.json: up to date, with the same spec, split" in said
    with data.open("a") as stream:
        stream.write("film,film,1\n")
    refused = run(*command, code=2).stderr
    assert "h5: it is not there yet" in refused and "h5: data was" in refused
    said = run(*command, "--update").stderr
    assert "flops-0.6: mask was" in said and "flops-0.6.point.json: it is not there yet" in said


def test_seeds_draw_other_examples(model, data, tmp_path):
    result = run(
        "sweep", model, "--data", data, "--params", "0.8", "--seeds", 2, "-o", tmp_path / "s",
        *QUICK, "--no-bench",
    )  # fmt: skip
    points = read_sweep(tmp_path / "s").points
    assert sorted(point.name for point in points) == ["params-0.8", "params-0.8-seed1"]
    assert len({point.ranking for point in points}) == 2
    mean = np.mean([point.drop for point in points])
    assert "over seeds" in result.stderr and f"{mean:.2f}" in result.stderr.split("over seeds")[1]


def test_a_sweep_ends_in_a_report(swept, tmp_path):
    text = (swept / "report.html").read_text()
    assert re.findall(r"<figcaption>(.* against .*)</figcaption>", text) == [
        f"{what} against {cost}"
        for cost in ("MACs", "latency at batch 2")
        for what in ("accuracy", "agreement")
    ]
    for point in read_sweep(swept).points:
        assert f'<th scope="row">{point.name}</th>' in text
        assert f"<title>{point.name}: {point.evaluation['metrics']['accuracy']:.2f} at" in text
    fits = read_pruned(swept / "flops-0.4").history[-1]["compensation"]["sites"]
    last = {fit["site"]: fit for fit in fits}["blocks.1.neurons"]
    shown = text.split('<div data-fits="2">')[1].split("blocks.1.neurons")[1].split("</div>\n")[1]
    assert f"{100 * last['before']:.3g} % → {100 * last['after']:.3g} % ({last['method']})" in shown
    table = tmp_path / "t.csv"
    run("report", swept, "--csv", table)
    rows = {row["name"]: row for row in csv.DictReader(table.open())}
    for point in read_sweep(swept).points:
        assert float(rows[point.name]["drop"]) == point.drop
        assert rows[point.name]["ms_batch_1"] == (str(point.timings[0]["ms"]) if point.timings else "")


# ---- pick ----


def test_pick_prints_the_directory_that_keeps_the_promise(swept, tmp_path):
    points = {point.name: point for point in read_sweep(swept).points}
    drops = {name: points[name].drop for name in ("flops-0.7", "flops-0.4")}
    generous = run("pick", swept, "--max-drop", max(drops.values()))
    assert generous.stdout.strip() == str(swept / "flops-0.4")
    assert load(generous.stdout.strip()).config.num_labels == 2
    assert json.loads(run("pick", swept, "--max-drop", 100, "--json").stdout)["name"] == "flops-0.4"
    slowest = max(points["flops-0.7"].timing(1)["ms"], points["flops-0.4"].timing(1)["ms"])
    least = min(drops, key=lambda name: (drops[name], -points[name].share))
    assert run("pick", swept, "--max-latency", f"{slowest}ms").stdout.strip() == str(swept / least)


def test_pick_fails_with_the_nearest_miss(swept):
    result = run("pick", swept, "--min-speedup", 1e6, code=5)
    best = max(read_sweep(swept).main, key=lambda point: point.timing(2)["speedup"])
    assert not result.stdout
    assert f"nearest is {best.name}: {best.timing(2)['speedup']:.2f}x at batch 2" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ([], 2, "nothing is promised"),
        (["--min-speedup", 1, "--batch-size", 64], 2, "not timed at batch 64"),
        (["--max-latency", "fast"], 2, "write --max-latency 8ms"),
        (["--min-speedup", 0], 2, "must be positive"),
    ],
)
def test_pick_says_what_is_wrong(swept, options, code, says):
    assert says in run("pick", swept, *options, code=code).stderr


def test_pick_needs_a_sweep(tmp_path):
    assert "no sweep at" in run("pick", tmp_path / "none", "--max-drop", 1, code=2).stderr
    assert "holds no points" in run("pick", tmp_path, "--max-drop", 1, code=2).stderr


def test_a_damaged_point_is_told(swept, tmp_path):
    shutil.copy(swept / "flops-0.4.point.json", tmp_path / "flops-0.4.point.json")
    path = tmp_path / "flops-0.4.point.json"
    path.write_text(path.read_text().replace('"params"', '"parms"'))
    assert "damaged" in run("pick", tmp_path, "--max-drop", 1, code=3).stderr


# ---- what is refused before anything is scored ----


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--flops", "0.5,0.5"], "twice"),
        (["--flops", "0.5", "--variant", "int9"], "use random, uncompensated, uniform"),
        (["--flops", "0.5", "--seeds", "0"], "--seeds 0"),
        (["--flops", "0.5", "--image-size", "8"], "use --seq-len"),
        (["--flops", "0.5", "--bench-batch-size", "0"], "--bench-batch-size"),
        (["--flops", "0.5", "--eval-split", "nowhere"], "nowhere"),
        ([], "no budget is given"),
    ],
)
def test_a_sweep_that_can_not_be_made(model, data, tmp_path, options, says):
    result = run("sweep", model, "--data", data, "-o", tmp_path / "s", *options, code=2)
    assert says in result.stderr
    assert not list(tmp_path.rglob("*.h5"))


def test_a_folder_that_is_removed_meanwhile_holds_no_point_without_its_model(
    model, data, tmp_path, monkeypatch
):
    measured = running.evaluate

    def removing(*args, **options):
        shutil.rmtree(tmp_path / "s")
        return measured(*args, **options)

    monkeypatch.setattr(running, "evaluate", removing)
    command = ["sweep", model, "--data", data, "--flops", "0.6", "-o", tmp_path / "s", *QUICK, "--no-bench"]
    told = run(*command, "--compensate", "none", "-q", code=1).stderr
    assert "flops-0.6 was removed while it was measured" in told and not (tmp_path / "s").exists()


# ---- prune with a promise ----

MOST = 5
"""Points of cosine that the tiny model loses at some of the budgets that are tried, and not at others."""


def test_prune_finds_the_smallest_model_that_loses_no_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "STEP", 0.1)
    encoder = tiny_model("bert", tmp_path / "encoder", "encoder", num_hidden_layers=2)
    for split, seed in (("train", 0), ("validation", 3)):
        tiny_text_csv(tmp_path / "data", rows=40, seed=seed, labels=None, name=f"{split}.csv")
    command = ["prune", encoder, "--data", "data", "--max-drop", MOST, "-o", "small", *QUICK, "--no-bench"]
    found = json.loads(run(*command, "--json").stdout)
    trials = {trial["name"]: trial for trial in found["trials"]}
    kept = [name for name, trial in trials.items() if trial["evaluation"]["drop"] <= MOST]
    assert kept and len(kept) < len(trials) <= 4
    share = {name: trial["reached"]["flops"] for name, trial in trials.items()}
    assert found["best"] == min(kept, key=share.__getitem__)
    assert all(share[name] < share[found["best"]] for name in set(trials) - set(kept))
    ours, theirs = (
        (tmp_path / folder / "optin.json").read_bytes()
        for folder in ("small", f"small.sweep/{found['best']}")
    )
    assert ours == theirs
    again = json.loads(run(*command, "--json", "-q").stdout)
    assert again["reused"] and again["trials"] == found["trials"]
    assert json.loads(run(*command, "--json", "-q", "--update").stdout)["reused"]


def test_python_finds_the_model_that_the_command_finds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "STEP", 0.2)
    encoder = tiny_model("bert", tmp_path / "encoder", "encoder", num_hidden_layers=2)
    for split, seed in (("train", 0), ("validation", 3)):
        tiny_text_csv(tmp_path / "data", rows=40, seed=seed, labels=None, name=f"{split}.csv")
    options = {"max_drop": MOST, "bench": False, "samples": 16, "probes": 1, "compensate_samples": 16}
    small = optin.prune(encoder, tmp_path / "data", output=tmp_path / "ours", **options)
    command = [
        "prune",
        encoder,
        "--data",
        tmp_path / "data",
        "--max-drop",
        MOST,
        "--no-bench",
        "--samples",
        16,
    ]
    command += ["--probes", 1, "--compensate-samples", 16, "-o", tmp_path / "theirs"]
    found = json.loads(run(*command, "--json").stdout)
    assert small.record.kept == read_pruned(tmp_path / "theirs").kept
    assert small.mask.reached["flops"] == found["mask"]["reached"]["flops"]
    assert {point.name for point in read_sweep(tmp_path / "ours.sweep").points} == {
        trial["name"] for trial in found["trials"]
    }
    assert optin.load(tmp_path / "ours") is not None
    with pytest.raises(optin.UsageError, match="give output"):
        optin.prune(encoder, tmp_path / "data", **options)
    with pytest.raises(optin.UsageError, match="finds the budget itself"):
        optin.prune(encoder, tmp_path / "data", flops=0.5, output=tmp_path / "x", **options)


def test_prune_with_a_promise_that_no_model_keeps(model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "STEP", 0.25)
    result = run(
        "prune", model, "--data", data, "--min-speedup", 1e6, "-o", "fast", *QUICK, "--min-heads", 3,
        "-q",
        code=5,
    )  # fmt: skip
    assert "nearest" in result.stderr and not (tmp_path / "fast").exists()
    assert read_sweep("fast.sweep").points


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--flops", 0.5, "--max-drop", 1], "finds the budget itself"),
        (["--steps", 2, "--max-drop", 1], "leave --steps out"),
        (["--min-speedup", -1], "must be positive"),
        ([], "no budget is given"),
    ],
)
def test_a_promise_beside_what_it_replaces(model, data, tmp_path, options, says):
    result = run("prune", model, "--data", data, "-o", tmp_path / "m", *options, code=2)
    assert says in result.stderr
