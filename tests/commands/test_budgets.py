"""Budgets, guards and latency tables as a user meets them on the command line."""

from __future__ import annotations

import json
import os
import re

import pytest
from helpers.artefacts import latency_table
from helpers.cli import FAST, run
from helpers.data import tiny_text_csv
from helpers.flops import flop_counter
from helpers.models import saved_model, shared_model, tiny_model

from optin_cli.artefacts.latency import write_latency_table
from optin_cli.artefacts.mask import read_mask
from optin_cli.measure import latency_table as latency_table_maker


def refused(tmp_path, *args, code: int, says: str) -> None:
    """One message, the right code, nothing written."""
    before = sorted(tmp_path.rglob("*"))
    text = " ".join(run(*args, code=code).stderr.split())
    assert says in text, text
    assert text.count("error:") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def ranking(scored):
    """In the test's own folder, with the data."""
    return scored[-1]


@pytest.fixture
def table(tmp_path):
    write_latency_table(tmp_path / "t.json", latency_table(shared_model("bert").anatomy))
    return tmp_path / "t.json"


def test_a_list_of_budgets_writes_a_mask_each(ranking, tmp_path):
    template = str(tmp_path / "m-{}.mask.json")
    result = run("select", ranking, "--flops", "0.9, 0.5,0.25", "-o", template)
    paths = [template.replace("{}", name) for name in ("0.9", "0.5", "0.25")]
    assert result.stdout.splitlines() == paths
    masks = [read_mask(tmp_path / path) for path in paths]
    assert [mask.budget["flops"] for mask in masks] == [0.9, 0.5, 0.25]
    run("select", ranking, "--flops", "0.5", "-o", tmp_path / "one.json")
    assert read_mask(tmp_path / "one.json") == masks[1]
    again = json.loads(run("select", ranking, "--flops", "0.9,0.5", "-o", template, "--json").stdout)
    assert [mask["mask"] for mask in again["masks"]] == paths[:2]
    assert all(mask["reused"] for mask in again["masks"])


def test_other_budgets_may_be_the_list(ranking, table, tmp_path):
    template = str(tmp_path / "m-{}.json")
    run("select", ranking, "--latency", "0.8,4ms", "--latency-table", table, "--flops", 0.9, "-o", template)
    shares = [read_mask(tmp_path / f"m-{name}.json").budget for name in ("0.8", "4ms")]
    assert [(b["latency"], b["latency_ms"], b["flops"]) for b in shares] == [
        (0.8, None, 0.9),
        (None, 4.0, 0.9),
    ]
    run("select", ranking, "--params", "0.9", "-o", template)
    assert (tmp_path / "m-0.9.json").exists()


def test_lists_that_can_not_be_written(ranking, tmp_path):
    args = ["select", ranking, "-o"]
    refused(tmp_path, *args, tmp_path / "m.json", "--flops", "0.9,0.8", code=2, says="-o 'm-{}.mask.json'")
    both = ["--flops", "0.9,0.8", "--params", "0.9,0.8"]
    refused(
        tmp_path, *args, tmp_path / "m-{}.json", *both, code=2, says="--flops and --params are both lists"
    )
    refused(tmp_path, *args, tmp_path / "m-{}.json", "--flops", "0.9,0.9", code=2, says="twice")
    refused(tmp_path, *args, tmp_path / "m-{}.json", "--flops", "0.9,", code=2, says="is not a number")


def test_a_list_is_written_whole_or_not_at_all(ranking, tmp_path):
    args = ["select", ranking, "--min-heads", 2, "-o", tmp_path / "m-{}.json", "--flops"]
    refused(tmp_path, *args, "0.9,0.01", code=4, says="--flops 0.01 can't be met")
    (tmp_path / "m-0.8.json").write_text("{}")
    refused(tmp_path, *args, "0.9,0.8", code=2, says="holds something else")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "no budget is given"),
        (["--flops", "much"], "--flops 'much' is not a number"),
        (["--memory", "small"], "60 for 60 MiB"),
        (["--latency", "fast", "--latency-table", "t.json"], "12.5ms"),
        (["--latency", "12", "--latency-table", "t.json"], "is not a fraction"),
        (["--latency", "0.5"], "optin bench MODEL --table"),
        (["--flops", "0.5", "--only", "wheels"], "it has heads, neurons"),
        (["--flops", "0.5", "--round-to", "few"], "8, 16, 32, 64 or auto"),
        (["--flops", "0.5", "--max-prune-per-layer", "90"], "is not a share"),
        (["--flops", "0.5", "--latency-table", "no.json"], "No such file"),
    ],
)
def test_wrong_budgets(ranking, table, tmp_path, args, says):
    args = [table if arg == "t.json" else arg for arg in args]
    refused(tmp_path, "select", ranking, *args, "-o", tmp_path / "m.json", code=2, says=says)


def test_several_budgets_out_of_reach_are_all_named(ranking, table, tmp_path):
    args = ["select", ranking, "-o", tmp_path / "m.json", "--memory", 0.01, "--latency", "0.1ms"]
    args += ["--latency-table", table]
    refused(tmp_path, *args, code=4, says="--memory 0.01MiB can't be met")
    hint = run(*args, code=4).stderr.split("reached is")[1]
    smallest = dict(re.findall(r"--(memory|latency) ([\d.]+(?:MiB|ms))", hint))
    args[args.index(0.01)], args[args.index("0.1ms")] = smallest["memory"], smallest["latency"]
    run(*args)


def test_emptied_layers_are_warned_of(ranking, tmp_path):
    result = run("select", ranking, "--flops", 0.05, "-o", tmp_path / "m.json")
    emptied = json.loads(
        run("select", ranking, "--flops", 0.05, "-o", tmp_path / "m.json", "--json", "-q").stdout
    )["emptied"]
    assert emptied
    text = " ".join(result.stderr.split())
    assert "warning: emptied:" in text
    assert all(name in text for name in emptied)


def test_a_table_of_another_device_is_refused(ranking, tmp_path):
    other = tmp_path / "gpu.json"
    write_latency_table(other, latency_table(shared_model("bert").anatomy, device="NVIDIA H100"))
    args = ["select", ranking, "--latency", 0.8, "--latency-table", other, "-o", tmp_path / "m.json"]
    refused(tmp_path, *args, code=3, says="measured on NVIDIA H100")
    run(*args, "--force")


def flops(call, device) -> float:
    with flop_counter() as counter:
        call()
    return float(counter.get_total_flops())


def test_bench_select_apply_bench(ranking, tmp_path, monkeypatch):
    """The whole way of a latency budget; the table's clock ticks once a FLOP."""
    monkeypatch.setattr(latency_table_maker, "call_ms", flops)
    model, table = saved_model("bert"), tmp_path / "cpu.json"
    bench = [
        "bench",
        model,
        "--table",
        table,
        "--batch-size",
        2,
        "--seq-len",
        16,
        "--repeats",
        3,
        "--seconds",
        0,
    ]
    made = run(*bench)
    assert made.stdout == f"{table}\n"
    assert "is already the table" in run(*bench).stderr
    os.utime(table, (1, 1))
    assert json.loads(run(*bench, "--json").stdout)["reused"]
    assert table.stat().st_mtime > 1  # make goes by it
    assert "cpu.json: up to date, with the same model, device" in run(*bench, "--explain").stderr
    other = [*bench[:5], 4, *bench[6:], "--explain"]
    refused(tmp_path, *other, code=2, says="made for another batch_size")
    assert "cpu.json: batch_size was 2, is 4\n" in run(*other, "--update").stderr
    run(*bench, "--update")
    assert "curve" in run("inspect", table, "--json").stdout
    assert "blocks.2.neurons" in run("inspect", table).stdout

    total = json.loads(table.read_text())["total_ms"]
    mask, out = tmp_path / "m.json", tmp_path / "out"
    args = ["--latency", f"{0.7 * total:.0f}ms", "--latency-table", table, "--flops", 0.7]
    assert "predicted latency" in run("select", ranking, *args, "-o", mask).stderr
    assert "0.7 of the dense MACs" in run("inspect", mask).stdout
    run("apply", model, mask, "-o", out)
    record = json.loads((out / "optin.json").read_text())["history"][-1]
    assert record["params"] == record["reached"]["params"]

    args = ["bench", out, "--baseline", model, "--seq-len", 16, "--repeats", 2, "--seconds", 0]
    shown = run(*args, "--batch-size", "2")
    assert "predicted ms" in shown.stdout
    dense, pruned = json.loads(run(*args, "--batch-size", "2", "--json").stdout)["timings"]
    assert pruned["predicted_ms"] == record["reached"]["latency_ms"] <= 0.7 * total
    assert dense["predicted_ms"] == total
    assert pruned["predicted_speedup"] == total / pruned["predicted_ms"]
    args[3] = out  # not the model that the table is of
    other = json.loads(run(*args, "--batch-size", "2", "--json").stdout)["timings"]
    assert "predicted_ms" in other[1] and "predicted_speedup" not in other[1]
    elsewhere = run(*args, "--batch-size", "1").stderr
    assert "predicted ms" not in elsewhere
    assert "were predicted" in elsewhere


def test_tables_are_for_one_setting(tmp_path):
    args = ["bench", saved_model("bert"), "--table", tmp_path / "t.json"]
    refused(tmp_path, *args, "--batch-size", "1,2", code=2, says="one batch size")
    refused(tmp_path, *args, "--seq-len", "8,16", code=2, says="one length")
    refused(tmp_path, *args, "--baseline", saved_model("bert"), code=2, says="--baseline compares two")
    (tmp_path / "t.json").write_text("{}")
    refused(tmp_path, *args, code=2, says="is no latency table")


def test_prune_takes_what_select_takes(ranking, table, tmp_path):
    model, data = saved_model("bert"), tmp_path / "train.csv"
    asked = ["--memory", 0.09, "--flops", 0.8, "--latency", 0.9, "--latency-table", table, "--round-to", 8]
    asked += ["--min-heads", 1, "--max-prune-per-layer", 0.9, "--protect", "blocks.0.heads", "--tokens", 20]
    run("select", ranking, *asked, "-o", tmp_path / "m.json")
    args = [
        "prune",
        model,
        "--data",
        data,
        "--ranking",
        ranking,
        *FAST,
        "--compensate",
        "none",
        "-o",
        tmp_path / "out",
    ]
    pruned = json.loads(run(*args, *asked, "--json").stdout)["mask"]
    assert pruned["digest"] == read_mask(tmp_path / "m.json").digest
    assert pruned["kept"]["blocks.0.heads"] == "4/4"
    refused(tmp_path, *args, "--flops", "0.5,0.4", code=2, says="a mask for each budget of a list")
    refused(tmp_path, *args, code=2, says="no budget is given")


def test_prune_refuses_a_table_before_it_scores(tmp_path):
    data, other = tiny_text_csv(tmp_path), tmp_path / "gpu.json"
    write_latency_table(other, latency_table(shared_model("bert").anatomy, dtype="bfloat16"))
    args = [
        "--data",
        data,
        "--ranking",
        tmp_path / "new.h5",
        *FAST,
        "-o",
        tmp_path / "out",
        "--latency",
        0.5,
    ]
    args += ["--latency-table", other]
    refused(tmp_path, "prune", saved_model("bert"), *args, code=3, says="another dtype")
    deeper = tiny_model("bert", tmp_path / "deeper", num_hidden_layers=4)
    refused(tmp_path, "prune", deeper, *args, "--force", code=3, says="another shape")


def test_a_budget_that_asks_for_nothing_is_told(scored, tmp_path):
    """Also when the model was pruned below it, and then how to count from what is left."""
    model, data, ranking = scored
    mask = tmp_path / "m.json"
    told = " ".join(run("select", ranking, "--flops", 1, "-o", mask).stderr.split())
    assert "nothing is pruned" in told and "--relative-to" not in told
    assert f"{mask} is already this mask" in " ".join(
        run("select", ranking, "--flops", 1, "-o", mask).stderr.split()
    )
    run("select", ranking, "--flops", 0.5, "-o", tmp_path / "half.json", "-q")
    run("apply", model, tmp_path / "half.json", "-o", tmp_path / "half", "--compensate", "none", "-q")
    again = tmp_path / "again.h5"
    run("score", tmp_path / "half", "--data", data, "-o", again, "--method", "magnitude", "-q")
    told = " ".join(run("select", again, "--flops", 0.6, "-o", tmp_path / "a.json").stderr.split())
    assert "nothing is pruned" in told and "--relative-to current" in told
    current = ("--relative-to", "current")
    told = " ".join(run("select", again, "--flops", 0.6, *current, "-o", tmp_path / "b.json").stderr.split())
    assert "% of the current MACs" in told and "nothing is pruned" not in told


def weights_of(path) -> tuple[str, float]:
    budget = read_mask(path).budget
    return budget["feature_weights"], budget["output_weight"]


def test_each_budget_decides_how_the_parts_of_scores_count(scored, tmp_path):
    _, _, ranking = scored
    run("select", ranking, "--flops", "0.6,0.2", "-o", str(tmp_path / "m-{}.json"))
    assert weights_of(tmp_path / "m-0.6.json") == ("fourth-root", 0.3)
    assert weights_of(tmp_path / "m-0.2.json") == ("root", 0.1)
    assert "auto (fourth-root here; each budget decides)" in run("inspect", ranking).stdout
    run("select", ranking, "--flops", 0.2, "--lambda", 2, "-o", tmp_path / "two.json")
    assert weights_of(tmp_path / "two.json") == ("root", 2.0)


def test_prune_asks_nothing_of_the_lambda_that_a_ranking_was_made_with(tmp_path):
    model, data = saved_model("bert"), tiny_text_csv(tmp_path)
    common = ["--data", data, "--samples", 12, "--batch-size", 6, "--probes", 1]
    run("score", model, *common, "--lambda", 5, "-o", tmp_path / "r.h5", "-q")
    run("select", tmp_path / "r.h5", "--flops", 0.6, "-o", tmp_path / "own.json")
    assert weights_of(tmp_path / "own.json") == ("fourth-root", 5.0)
    plain = ["--flops", 0.6, "--ranking", tmp_path / "r.h5", "--compensate", "none", "--json"]
    for option, expected in (([], 0.3), (["--lambda", 2], 2.0)):
        told = run("prune", model, *common, *plain, *option, "-o", tmp_path / f"m{expected}")
        assert json.loads(told.stdout)["mask"]["budget"]["output_weight"] == expected
