"""What runs on a GPU: `pytest -m cuda`. It needs no data set and no `datasets`.

With OPTIN_DRY_RUN=1 the same tests run on a CPU, to find mistakes in them: that says nothing about a GPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def exact_cpu(monkeypatch):
    """What a GPU is compared with is float32: some CPUs would multiply probes in bfloat16."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", bool, raising=False)


@pytest.fixture
def notes(caplog) -> Iterator[pytest.LogCaptureFixture]:
    """What the package says. The command line, if a test has run it, keeps that from other loggers."""
    logger = logging.getLogger("optin")
    with caplog.at_level(logging.INFO, logger="optin"):
        if not logger.propagate:
            logger.addHandler(caplog.handler)
        yield caplog
    logger.removeHandler(caplog.handler)
