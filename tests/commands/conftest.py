"""What tests of several commands begin with."""

from __future__ import annotations

import pytest
from helpers.cli import FAST, run
from helpers.data import tiny_text_csv
from helpers.models import saved_model


@pytest.fixture
def scored(tmp_path):
    """(model, data, ranking) of a tiny BERT classifier."""
    data = tiny_text_csv(tmp_path)
    run("score", saved_model("bert"), "--data", data, "-o", tmp_path / "r.h5", *FAST, "-q")
    return saved_model("bert"), data, tmp_path / "r.h5"
