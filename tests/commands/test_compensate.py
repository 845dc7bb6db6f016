"""Compensation on the command line: options, the table of sites, reuse, refusals."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.cli import run
from helpers.data import tiny_text_csv
from helpers.models import saved_model
from safetensors.torch import load_file

from optin_cli import console
from optin_cli.errors import UsageError
from optin_cli.sizes import byte_count

SITES = [f"blocks.{block}.{kind}" for block in range(3) for kind in ("heads", "neurons")]
READOUT = ["bert.pooler.dense", "classifier"]


def mask_in(folder):
    """(model, data, mask) of a tiny BERT classifier."""
    model, data = saved_model("bert"), tiny_text_csv(folder)
    run("score", model, "--data", data, "-o", folder / "r.h5", "--method", "magnitude", "-q")
    run("select", folder / "r.h5", "--flops", 0.5, "-o", folder / "m.json", "-q")
    return model, data, folder / "m.json"


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """Made once. Only for reading."""
    return mask_in(tmp_path_factory.mktemp("masked"))


def consumers(fits: list[dict]) -> dict[str, dict]:
    """Site name -> the fit of its consumer, which is its last one."""
    return {fit["site"]: fit for fit in fits}


def table(text: str) -> dict[str, list[str]]:
    """The printed table of sites: name -> the other cells."""
    rows = [line.split() for line in text.splitlines() if re.match(r"\s*blocks\.\d+\.\w+ .*%", line)]
    return {row[0]: row[1:] for row in rows}


def test_apply_compensates_on_the_masks_own_data_and_tells_each_site(masked, tmp_path):
    model, _, mask = masked
    result = run("apply", model, mask, "-o", tmp_path / "out")
    assert result.stdout == f"{tmp_path / 'out'}\n"
    assert list(table(result.stderr)) == SITES
    assert list(table(run("inspect", tmp_path / "out").stdout)) == SITES
    told = json.loads(run("apply", model, mask, "-o", tmp_path / "out", "--json").stdout)
    assert told["reused"]
    record = json.loads(run("inspect", tmp_path / "out", "--json").stdout)["history"][0]["compensation"]
    assert told["compensation"] == record["sites"]
    fits = consumers(record["sites"])
    assert list(fits) == SITES + READOUT
    assert all(name in result.stderr for name in READOUT)
    assert record["rows"] == 60
    for name in SITES:
        fit = fits[name]
        before, _, after, _, method = table(result.stderr)[name][:5]
        assert float(before) == pytest.approx(100 * fit["before"], abs=0.006)
        assert float(after) == pytest.approx(100 * fit["after"], abs=0.006)
        assert method == fit["method"]
        made = [other for other in record["sites"] if other["site"] == name and other is not fit]
        assert len(made) == (3 if name.endswith("heads") else 1)
        percents = [float(cell) for cell in table(result.stderr)[name] if re.fullmatch(r"\d+\.\d\d", cell)]
        for told_mean, when in zip(percents[2:], ("before", "after"), strict=True):
            mean = sum(other[when] for other in made) / len(made)
            assert told_mean == pytest.approx(100 * mean, abs=0.006)


def test_producers_can_be_left_alone(masked, tmp_path):
    model, _, mask = masked
    run("apply", model, mask, "-o", tmp_path / "out", "--no-producers")
    record = json.loads(run("inspect", tmp_path / "out", "--json").stdout)["history"][0]["compensation"]
    assert [fit["site"] for fit in record["sites"]] == SITES + READOUT
    assert record["producers"] is False
    refused = run("apply", model, mask, "-o", tmp_path / "out", code=2)
    assert "another compensation" in " ".join(refused.stderr.split())


def test_the_readout_can_be_left_alone(masked, tmp_path):
    model, _, mask = masked
    run("apply", model, mask, "-o", tmp_path / "out", "--no-readout")
    record = json.loads(run("inspect", tmp_path / "out", "--json").stdout)["history"][0]["compensation"]
    assert list(consumers(record["sites"])) == SITES and record["readout"] is False
    weights = [load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out")]
    for path in READOUT:
        assert torch.equal(*(of[f"{path}.weight"] for of in weights))
    refused = run("apply", model, mask, "-o", tmp_path / "out", code=2)
    assert "another compensation" in " ".join(refused.stderr.split())


def test_none_leaves_the_weights_alone(masked, tmp_path):
    model, _, mask = masked
    result = run("apply", model, mask, "-o", tmp_path / "plain", "--compensate", "none")
    assert not table(result.stderr)
    assert not table(run("inspect", tmp_path / "plain").stdout)
    run("apply", model, mask, "-o", tmp_path / "plain", "--compensate", "none")  # reused
    refused = run("apply", model, mask, "-o", tmp_path / "plain", code=2)
    assert "another compensation" in " ".join(refused.stderr.split())
    run("apply", model, mask, "-o", tmp_path / "plain", "--force", "-q")
    assert table(run("inspect", tmp_path / "plain").stdout)


def test_other_rows_can_be_given(masked, tmp_path):
    model, _, mask = masked
    other = tiny_text_csv(tmp_path / "other", rows=50, labels=None, pairs=False, seed=4)
    run(
        "apply", model, mask, "-o", tmp_path / "out", "--data", other, "--text", "sentence",
        "--samples", 40, "--seed", 3, "--memory", "0", "--max-length", 12, "--compensate", "scale",
    )  # fmt: skip
    record = json.loads(run("inspect", tmp_path / "out", "--json").stdout)["history"][0]["compensation"]
    assert record["rows"] == 40
    assert record["data"]["spec"] == str(other)
    assert (record["seed"], record["max_length"]) == (3, 12)
    assert {fit["method"] for fit in record["sites"]} <= {"scale", "bias", "none"}
    assert all(fit["method"] != "none" for fit in consumers(record["sites"]).values())


def test_more_samples_than_rows_are_told_only_when_asked_for(masked, tmp_path):
    model, _, mask = masked
    assert "fewer" not in run("apply", model, mask, "-o", tmp_path / "a").stderr
    told = run("apply", model, mask, "-o", tmp_path / "b", "--samples", 100).stderr
    assert "fewer than the 100 asked for" in " ".join(told.split())


def test_prune_compensates_too(tmp_path):
    model, data = saved_model("bert"), tiny_text_csv(tmp_path)
    arguments = ["prune", model, "--data", data, "--flops", 0.5, "--method", "magnitude"]
    arguments += ["--ranking", tmp_path / "r.h5"]
    told = json.loads(run(*arguments, "-o", tmp_path / "out", "--compensate-samples", 40, "--json").stdout)
    assert list(consumers(told["compensation"])) == SITES + READOUT
    plain = json.loads(run(*arguments, "-o", tmp_path / "plain", "--compensate", "none", "--json").stdout)
    assert plain["compensation"] == []
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "plain"))
    assert one != other


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--compensate", "magic"], "unknown compensation 'magic'"),
        (["--samples", "0"], "--samples 0: at least 1"),
        (["--memory", "much"], "--memory 'much' is not a size"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--data", "no.csv"], "no data at no.csv"),
        (["--split", "test"], "say how to read --data, which is not given"),
        (["--text", "sentence"], "say how to read --data, which is not given"),
    ],
)
def test_wrong_options(masked, tmp_path, options, says):
    model, _, mask = masked
    text = " ".join(run("apply", model, mask, "-o", tmp_path / "out", *options, code=2).stderr.split())
    assert says in text
    assert text.count("error:") == 1
    assert not (tmp_path / "out").exists()


def test_prune_names_its_own_options_in_errors(tmp_path):
    data = tiny_text_csv(tmp_path)
    arguments = ["prune", saved_model("bert"), "--data", data, "--flops", 0.5, "-o", tmp_path / "out"]
    for option, value in (("--compensate-samples", 0), ("--compensate-memory", "x")):
        assert option in run(*arguments, option, value, code=2).stderr


def test_data_that_is_gone_is_no_reason_to_skip_it(tmp_path):
    model, data, mask = mask_in(tmp_path)
    data.unlink()
    text = " ".join(run("apply", model, mask, "-o", tmp_path / "out", code=1).stderr.split())
    assert "can't be read again" in text
    assert "--compensate none" in text
    run("apply", model, mask, "-o", tmp_path / "out", "--compensate", "none")


def test_the_time_left_counts_from_the_start_of_a_stage(monkeypatch, capsys):
    """`prune` scores, then compensates: the first stage's time says nothing about the second's."""
    clock = iter([0.0, 100.0, 200.0, 200.0, 210.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress() as update:
        for done in (50, 100):
            update(done, 100, "scoring")
        for done in (0, 10):
            update(done, 100, "compensating")
    assert "10 %  compensating, about 1 min 30 s left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GiB", 4 << 30), ("500 MB", 500_000_000), ("1.5kib", 1536), ("0", 0), ("1e6", 10**6)],
)
def test_sizes(text, count):
    assert byte_count(text, "memory") == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "nan", "inf", "4 apples", "1TiBB"])
def test_no_sizes(text):
    with pytest.raises(UsageError, match="is not a size"):
        byte_count(text, "memory")
