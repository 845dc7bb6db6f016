"""What tests of several commands begin with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.cli import FAST, run
from helpers.data import tiny_text_csv
from helpers.models import saved_model


@pytest.fixture(scope="session")
def scored_once(tmp_path_factory):
    """(model, data, ranking) of a tiny BERT classifier. Only for reading."""
    folder = tmp_path_factory.mktemp("scored")
    data = tiny_text_csv(folder)
    run("score", saved_model("bert"), "--data", data, "-o", folder / "r.h5", *FAST, "-q")
    return saved_model("bert"), data, folder / "r.h5"


@pytest.fixture
def scored(scored_once, tmp_path):
    """The same in the test's own folder; the ranking says that its data is in the shared one."""
    model, data, ranking = scored_once
    return model, Path(shutil.copy2(data, tmp_path)), Path(shutil.copy2(ranking, tmp_path))
