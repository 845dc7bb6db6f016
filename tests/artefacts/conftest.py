"""Fixtures of the tests of artefacts."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.artefacts import tiny_ranking

from optin_cli.artefacts.ranking import (
    write_ranking,
)


@pytest.fixture
def path(tmp_path) -> Path:
    """A good ranking on disk."""
    write_ranking(tmp_path / "good.h5", tiny_ranking())
    return tmp_path / "good.h5"
