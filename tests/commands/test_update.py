"""Outputs beside inputs that change, as make sees them: reused ones are new again, old ones are replaced on request."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.cli import FAST, run
from helpers.data import tiny_text_csv
from helpers.models import saved_model


@pytest.fixture
def stages(tmp_path):
    """Runs score, select and apply as a Makefile does, which goes on where a command succeeds."""
    data, model = tiny_text_csv(tmp_path), saved_model("bert")

    def build(*options: str, code: int = 0) -> None:
        for command in (
            ("score", model, "--data", data, "-o", tmp_path / "r.h5", *FAST),
            ("select", tmp_path / "r.h5", "--flops", 0.6, "-o", tmp_path / "m.json"),
            ("apply", model, tmp_path / "m.json", "-o", tmp_path / "small", "--compensate", "none"),
        ):
            run(*command, "-q", *options, code=code)

    build()
    return build


def outputs(folder: Path) -> list[Path]:
    return [folder / name for name in ("r.h5", "m.json", "small")]


def test_what_is_reused_is_no_older_than_what_it_was_made_from(stages, tmp_path):
    before = [(tmp_path / name).read_bytes() for name in ("r.h5", "m.json", "small/optin.json")]
    for path in outputs(tmp_path):
        os.utime(path, (1, 1))
    stages()
    times = [path.stat().st_mtime for path in outputs(tmp_path)]
    assert 1 < times[0] <= times[1] <= times[2]
    assert before == [(tmp_path / name).read_bytes() for name in ("r.h5", "m.json", "small/optin.json")]


def test_a_new_row_is_refused_or_replaces_everything(stages, tmp_path):
    before = [(tmp_path / name).read_bytes() for name in ("r.h5", "m.json", "small/optin.json")]
    with next(tmp_path.glob("*.csv")).open("a") as data:
        data.write("film,film,1\n")
    run(
        "score",
        saved_model("bert"),
        "--data",
        next(tmp_path.glob("*.csv")),
        "-o",
        tmp_path / "r.h5",
        *FAST,
        code=2,
    )
    stages("--update")
    after = [(tmp_path / name).read_bytes() for name in ("r.h5", "m.json", "small/optin.json")]
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_an_update_replaces_nothing_that_optin_did_not_make(stages, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    for path in (tmp_path / "notes.json", tmp_path / "notes.h5"):
        path.write_text("mine")
    data = next(tmp_path.glob("*.csv"))
    model = saved_model("bert")
    run("score", model, "--data", data, "-o", tmp_path / "notes.h5", *FAST, "--update", code=2)
    run("select", tmp_path / "r.h5", "--flops", 0.6, "-o", tmp_path / "notes.json", "--update", code=2)
    run("apply", model, tmp_path / "m.json", "-o", mine, "--compensate", "none", "--update", code=2)
    assert (mine / "notes.txt").read_text() == (tmp_path / "notes.json").read_text() == "mine"


def test_prune_updates_both_its_outputs(stages, tmp_path):
    data = next(tmp_path.glob("*.csv"))
    command = ("prune", saved_model("bert"), "--data", data, "--flops", 0.5, "--ranking", tmp_path / "r.h5",
               "-o", tmp_path / "small", "--compensate", "none", *FAST, "-q")  # fmt: skip
    run(*command, code=2)
    before = (tmp_path / "r.h5").read_bytes()
    run(*command, "--update")
    assert before == (tmp_path / "r.h5").read_bytes()  # the ranking is that of the same inputs
    with data.open("a") as stream:
        stream.write("film,film,1\n")
    run(*command, code=2)
    run(*command, "--update")
    assert before != (tmp_path / "r.h5").read_bytes()


# ---- which input changed ----


def explained(stage, folder: Path, *options: str) -> str:
    """What the commands say of their outputs."""
    data, model = next(folder.glob("*.csv")), saved_model("bert")
    commands = {
        "score": ("score", model, "--data", data, "-o", folder / "r.h5", *FAST),
        "select": ("select", folder / "r.h5", "-o", folder / "m.json"),
        "apply": ("apply", model, folder / "m.json", "-o", folder / "small", "--device", "cpu"),
        "prune": (
            "prune",
            model,
            "--data",
            data,
            "--ranking",
            folder / "r.h5",
            "-o",
            folder / "small",
            *FAST,
        ),
    }
    return run(*commands[stage], "-q", "--explain", "--update", *options).stderr


def test_a_command_explains_what_it_keeps_and_what_has_changed(stages, tmp_path):
    plain = ("--compensate", "none")
    assert "r.h5: up to date, with the same model, data, rows" in explained("score", tmp_path)
    assert "m.json: up to date" in explained("select", tmp_path, "--flops", "0.6")
    assert "small: up to date" in explained("apply", tmp_path, *plain)
    said = explained("prune", tmp_path, "--flops", "0.6", *plain)
    assert "r.h5: up to date" in said and "small: up to date" in said
    assert "small: method was none, is auto" in explained("apply", tmp_path, "--samples", "12")
    said = explained("prune", tmp_path, "--flops", "0.5", *plain)
    assert "small: mask was" in said and "flops was 0.6, is 0.5" in said
    assert "m.json: flops was 0.6, is 0.4" in explained("select", tmp_path, "--flops", "0.4")
    with next(tmp_path.glob("*.csv")).open("a") as data:
        data.write("film,film,1\n")
    assert "r.h5: data was" in explained("score", tmp_path)
    assert "m.json: ranking was" in explained("select", tmp_path, "--flops", "0.4")
    (tmp_path / "m.json").unlink()
    assert "m.json: it is not there yet" in explained("select", tmp_path, "--flops", "0.4")


def test_a_folder_that_is_reused_has_new_files(stages, tmp_path):
    for path in (tmp_path / "small").iterdir():
        os.utime(path, (1, 1))
    stages()
    assert all(path.stat().st_mtime > 1 for path in (tmp_path / "small").iterdir())
