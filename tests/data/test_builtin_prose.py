"""`builtin:prose`: the same paragraphs of general English on every machine."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

from optin_cli.data import prose
from optin_cli.data.sources import BUILTIN_PROSE, DataSpec, open_split
from optin_cli.scoring.settings import ScoreSettings


def test_there_are_enough_paragraphs_to_score_on_by_default_and_to_evaluate():
    assert len(prose.split_paragraphs("train")) >= ScoreSettings().samples
    assert len(prose.split_paragraphs("validation")) > 128


def test_the_splits_share_no_paragraph_and_leave_none_out():
    train, validation = (prose.split_paragraphs(split) for split in prose.SPLITS)
    assert set(train).isdisjoint(validation)
    assert sorted([*train, *validation]) == sorted(prose.paragraphs())


def test_every_paragraph_is_there_once_and_is_one_line_of_text():
    assert len(set(prose.paragraphs())) == len(prose.paragraphs())
    for paragraph in prose.paragraphs():
        assert paragraph == " ".join(paragraph.split())
        assert paragraph[0] in '"' or paragraph[0].isupper()
        assert paragraph[-1] in '.!?"'


@pytest.mark.parametrize("split", prose.SPLITS)
def test_the_prose_opens_as_a_data_set_with_one_text_column(split):
    rows = open_split(DataSpec(BUILTIN_PROSE, split))
    assert rows.column_names == ["text"]
    assert rows["text"][:] == prose.split_paragraphs(split)


@pytest.mark.slow
def test_a_wheel_carries_the_text(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        tmp_path,
        ".",
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "optin_cli/data/prose.txt" in zipfile.ZipFile(wheel).namelist()
