"""Numbers of options: finite and in range, or a usage error before anything else happens."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest
from helpers.cli import FAST, run
from helpers.data import tiny_text_csv
from helpers.models import copy_of, saved_model
from safetensors.torch import load_file, save_file

from optin_cli.artefacts.ranking import read_ranking
from optin_cli.commands.groups import as_command, flags_of
from optin_cli.data.opening import open_batches
from optin_cli.data.sources import BUILTIN_DOCS, DataSpec
from optin_cli.errors import UsageError
from optin_cli.main import COMMANDS
from optin_cli.scoring.settings import ScoreSettings

REQUIRED = {
    "export": ("m", "--to", "onnx", "-o", "m.onnx"),
    "prune": ("m", "--data", "d", "-o", "out", "--flops", "0.5"),
    "score": ("m", "--data", "d", "-o", "out"),
    "select": ("r", "-o", "out", "--flops", "0.5"),
    "apply": ("m", "k", "-o", "out"),
    "bench": ("m",),
    "eval": ("m", "--data", "d"),
    "inspect": ("r",),
    "families": (),
    "vocab": ("m", "--data", "d", "-o", "out"),
    "sweep": ("m", "--data", "d", "-o", "out", "--flops", "0.5"),
    "pick": ("s",),
    "report": ("s", "-o", "out"),
}
"""Arguments of which none is there: a wrong number comes first."""


def options_of(kind: type) -> list[tuple[str, str]]:
    """(command, flag) of every option that takes such a number."""
    found = []
    for name, command in COMMANDS.items():
        flags = flags_of(command)
        for parameter in inspect.signature(as_command(command)).parameters.values():
            hint = get_args(parameter.annotation)[0]
            if kind in (hint, *get_args(hint)) and parameter.name in flags:
                found.append((name, flags[parameter.name][0]))
    return found


def refused(*args: object) -> str:
    said = run(*args, code=2).stderr
    assert said.count("error:") == 1 and "unexpected" not in said
    return said


@pytest.mark.parametrize(("command", "flag"), options_of(float))
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_a_usage_error(command, flag, value):
    assert f"{flag} {value} is not a finite number" in refused(command, *REQUIRED[command], flag, value)


@pytest.mark.parametrize(
    ("command", "flag"), [o for o in options_of(int) if o[1] in ("--seed", "--max-length", "--batch-size")]
)
def test_numbers_of_things_are_in_range(command, flag):
    value = -1 if flag == "--seed" else 0
    said = refused(command, *REQUIRED[command], flag, value)
    assert f"{flag} {value}: at least {value + 1} is needed" in said


def test_there_are_such_options():
    assert ("score", "--lambda") in options_of(float) and ("score", "--max-length") in options_of(int)
    assert {command for command, _ in options_of(int)} >= {
        "prune",
        "score",
        "select",
        "apply",
        "bench",
        "eval",
    }


@pytest.mark.parametrize(
    "settings", [{"temperature": float("nan")}, {"output_weight": float("inf")}, {"seed": -1}]
)
def test_python_says_the_same(settings):
    with pytest.raises(UsageError, match=next(iter(settings))):
        ScoreSettings(**settings)


@pytest.mark.parametrize(("seed", "length"), [(-1, None), (0, 0)])
def test_data_is_drawn_and_cut_by_numbers_in_range(seed, length):
    with pytest.raises(UsageError, match="is needed"):
        open_batches(DataSpec(BUILTIN_DOCS), None, 4, 2, seed, max_length=length)  # type: ignore[arg-type]


# scores


def scored(model, tmp_path, *options: object, code: int) -> str:
    data = tiny_text_csv(tmp_path)
    return run("score", model, "--data", data, "-o", tmp_path / "r.h5", *FAST, *options, code=code).stderr


def test_a_weight_of_the_output_that_is_too_large_leaves_no_ranking(tmp_path):
    said = scored(saved_model("bert"), tmp_path, "--lambda", "1e308", code=1)
    assert "are not finite" in said and "--lambda" in said
    assert not (tmp_path / "r.h5").exists()


@pytest.mark.parametrize(("value", "says"), [(float("nan"), "NaN or infinite"), (1e30, "very large")])
def test_weights_whose_scores_are_not_finite_leave_no_ranking(tmp_path, value, says):
    model = copy_of(saved_model("bert"), tmp_path / "broken")
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    weights[name][0, 0] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert says in scored(model, tmp_path, "--method", "magnitude", code=1)
    assert not (tmp_path / "r.h5").exists()


def test_a_ranking_that_is_written_can_be_read(tmp_path):
    scored(saved_model("bert"), tmp_path, "--lambda", "1e30", "--temperature", "1e-3", code=0)
    assert all(site.is_finite() for site in read_ranking(tmp_path / "r.h5").sites)
