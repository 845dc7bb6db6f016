"""What runs on a GPU: `pytest -m cuda`. It needs no data set and no `datasets`.

With OPTIN_DRY_RUN=1 the same tests run on a CPU, to find mistakes in them: that says nothing about a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers.memory import TextRows

DRY_RUN = bool(os.environ.get("OPTIN_DRY_RUN"))


@pytest.fixture
def device() -> str:
    """The device under test."""
    if torch.cuda.is_available():
        return "cuda"
    if not DRY_RUN:
        pytest.skip("needs a GPU")
    return "cpu"


@pytest.fixture
def gpu() -> str:
    """For what only a GPU has: no dry run."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return "cuda"


@pytest.fixture(autouse=True)
def texts_in_memory(monkeypatch):
    monkeypatch.setattr("optin_cli.data.examples.SplitRows", TextRows)
