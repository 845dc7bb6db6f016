"""`inspect` draws what artefacts hold in plain characters: in 80 columns, and in a pipe."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.artefacts import tiny_ranking
from helpers.cli import process, run

from optin_cli.artefacts.mask import read_mask, write_mask
from optin_cli.artefacts.ranking import write_ranking
from optin_cli.commands import drawing
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request


@pytest.fixture
def folder(tmp_path):
    ranking = tiny_ranking(blocks=4, heads=6, neurons=12)
    ranking.dense["fixed_macs"] = 0.0
    write_ranking(tmp_path / "r.h5", ranking)
    write_mask(tmp_path / "m.json", select(ranking, Request(flops=0.5)))
    return tmp_path


def drawn(text, title):
    """Label -> marks of the drawing with a title."""
    lines = text.split(f"{title}\n")[1].split("\n\n")[0].splitlines()
    assert all(len(line) <= drawing.WIDTH for line in lines)
    return {line.split()[0]: line.split()[1] for line in lines}


def test_a_mask_shows_which_heads_are_kept(folder):
    mask = read_mask(folder / "m.json")
    text = run("inspect", folder / "m.json").stdout
    heads = drawn(text, "heads, as they are kept or removed")
    assert heads == {
        name: "".join("██" if head in kept else "··" for head in range(6))
        for name, kept in mask.keep.items()
        if name.endswith("heads")
    }
    bars = drawn(text, "units kept")
    assert set(bars) == set(mask.keep)
    for name, bar in bars.items():
        assert bar.count("█") / len(bar) == pytest.approx(len(mask.keep[name]) / mask.units[name], abs=0.02)


def test_a_ranking_shades_heads_by_rank(folder):
    ranking = tiny_ranking(blocks=4, heads=6, neurons=12)
    text = run("inspect", folder / "r.h5").stdout
    heads = drawn(text, "heads, by the rank of their score (fuller is higher)")
    scores = np.concatenate([site.score for site in ranking.sites if site.kind == "heads"])
    fifths = np.array(["·░▒▓█".index(mark) for marks in heads.values() for mark in marks[::2]])
    assert (np.diff(fifths[scores.argsort()]) >= 0).all()  # no head above another is shaded less
    assert set(fifths) == set(range(5))
    medians = drawn(text, "median score, on a logarithmic axis")
    expected = sorted(ranking.sites, key=lambda site: np.median(site.score))
    assert [medians[site.name].count("█") for site in expected] == sorted(
        bar.count("█") for bar in medians.values()
    )


@pytest.mark.parametrize("units", [1, 25, 26, 50, 200])
def test_many_units_take_several_lines_of_eighty_columns(units):
    name = "blocks.0.a_long_name_of_heads"
    rows = drawing.kept({name: list(range(0, units, 2))}, {name: units})
    assert all(len(line) <= drawing.WIDTH for line in drawing.lines(rows))
    marks = "".join(row.marks for row in rows)
    assert len(marks) in (units, 2 * units)
    assert marks.count("█") * units == len(marks) * len(range(0, units, 2))


def test_a_terminal_without_block_characters_gets_others(folder):
    done = process("inspect", folder / "m.json", env={"PYTHONIOENCODING": "ascii", "COLUMNS": "80"})
    assert done.returncode == 0 and done.stdout.isascii()
    assert "units kept" in done.stdout and "###" in done.stdout
