"""Ranks on the command line: score, select, apply, inspect, families and prune."""

from __future__ import annotations

import json

import pytest
from helpers.cli import FAST, run
from helpers.data import tiny_text_csv
from helpers.models import opened, saved_model, tiny_model

import optin_cli as optin
from optin_cli.artefacts.mask import read_mask, write_mask
from optin_cli.artefacts.ranking import read_ranking


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    data = tiny_text_csv(folder)
    run("score", saved_model("bert"), "--data", data, "--ranks", *FAST, "-o", folder / "r.h5", "-q")
    return folder


def test_from_scores_to_a_model_that_says_its_ranks(scored):
    told = run("inspect", scored / "r.h5").stdout
    assert "measured at 3 sites" in told
    facts = json.loads(run("inspect", scored / "r.h5", "--json").stdout)
    assert facts["ranks"] == {f"blocks.{block}.heads": 8 for block in range(3)}
    run("select", scored / "r.h5", "--flops", "0.5", "-o", scored / "m.json", "-q")
    mask = read_mask(scored / "m.json")
    mask.ranks = {"blocks.0.heads": 4}
    mask.keep["blocks.0.heads"] = [0, 2]
    write_mask(scored / "m.json", mask)
    assert json.loads(run("inspect", scored / "m.json", "--json").stdout)["ranks"] == {"blocks.0.heads": 4}
    assert "heads rank" in run("inspect", scored / "m.json").stdout
    run("apply", saved_model("bert"), scored / "m.json", "-o", scored / "out", "--samples", "12", "-q")
    assert opened(scored / "out").anatomy["blocks.0.heads"].width == 4
    told = json.loads(run("inspect", scored / "out", "--json").stdout)
    assert told["per_layer_config"]["0"]["head_dim"] == 4
    assert "heads rank" in run("inspect", scored / "out").stdout


def test_heads_stay_whole_where_that_is_asked_for(scored):
    run("select", scored / "r.h5", "--flops", "0.5", "--no-ranks", "-o", scored / "whole.json", "-q")
    assert read_mask(scored / "whole.json").ranks == {}


def test_prune_measures_ranks_where_they_are_asked_for(scored):
    def prune(name, *more):
        ranking = scored / f"{name}.h5"
        run(
            "prune", saved_model("bert"), "--data", scored / "train.csv", "--flops", "0.5", *FAST, "--ranking", ranking,
            "--compensate-samples", "12", "-o", scored / name, "-q", *more,
        )  # fmt: skip
        return read_ranking(ranking)

    assert not prune("plain").rank_sites
    assert len(prune("cut", "--ranks").rank_sites) == 3


def test_families_lists_ranks_where_heads_can_be_cut():
    families = {one["name"]: one for one in json.loads(run("families", "--json").stdout)["families"]}
    can = {name for name, one in families.items() if any(site["ranks"] for site in one["sites"])}
    assert {"bert", "mpnet", "vit", "timm-vit", "gpt2", "t5", "whisper", "swin"} <= can
    assert not {"llama", "modernbert", "deberta", "timm-eva", "swinv2", "timm-resnet"} & can


def test_methods_that_can_t_measure_ranks_say_which_can(scored):
    found = run(
        "score", saved_model("bert"), "--data", scored / "train.csv", "--ranks", "--method", "magnitude", "-o",
        scored / "x.h5", code=2,
    )  # fmt: skip
    assert "--ranks needs the curvature of ranks" in found.stderr
    assert "use curvature or mixed" in found.stderr


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder with data, a BERT with two heads of 16, and a Llama with as wide ones, which rotary positions keep."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_text_csv(folder)
    tiny_model("bert", folder / "bert", num_attention_heads=2)
    tiny_model("llama", folder / "llama", num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    return folder


DEFAULTS = [
    ("bert", (), True),
    ("bert", ("--no-ranks",), False),
    ("bert", ("--method", "magnitude"), False),
    ("llama", (), False),
]


@pytest.mark.parametrize(("model", "more", "expected"), DEFAULTS, ids=["default", "off", "method", "rotary"])
def test_ranks_are_measured_where_there_are_some_to_choose_from(wide, model, more, expected):
    name = "-".join((model, *more)).replace("--", "")
    run("score", wide / model, "--data", wide / "train.csv", *FAST, "-o", wide / f"{name}.h5", "-q", *more)
    assert bool(read_ranking(wide / f"{name}.h5").rank_sites) is expected


@pytest.mark.parametrize(
    ("more", "flops", "expected"),
    [((), "0.4", True), (("--no-ranks",), "0.4", False), (("--uniform", "--no-ranks"), "0.7", False)],
    ids=["default", "off", "uniform"],
)
def test_prune_cuts_ranks_unless_asked_not_to(wide, more, flops, expected):
    name = "small" + "".join(more)
    run(
        "prune", wide / "bert", "--data", wide / "train.csv", "--flops", flops, *FAST, "--ranking", wide / f"{name}.h5",
        "--compensate", "none", "-o", wide / name, "-q", *more,
    )  # fmt: skip
    assert bool(read_ranking(wide / f"{name}.h5").rank_sites) is expected
    widths = {site.width for site in opened(wide / name).anatomy if site.kind == "heads" and site.units}
    assert (widths != {16}) is expected


def test_a_latency_table_from_before_ranks_keeps_heads_whole_without_a_word(wide, caplog):
    data, model = str(wide / "train.csv"), optin.open_model(wide / "bert")
    ranking = optin.score(model, data, samples=12)
    table = optin.latency_table(model, batch_size=1, seq_len=8, repeats=1, seconds=0.01)
    assert table.knows_ranks()
    for curve in table.curves:
        curve.pop("ranks", None)
    assert ranking.rank_sites and optin.select(ranking, flops=0.4).ranks
    assert not optin.select(ranking, latency=1.0, latency_table=table).ranks
    assert "latency table" not in caplog.text
    assert not optin.select(ranking, latency=1.0, latency_table=table, ranks=True).ranks
    assert "knows whole heads alone: no head is cut to a lower rank" in caplog.text
