"""What tests of scores share."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import ROUNDS


@pytest.fixture
def reduced_products(monkeypatch) -> bool:
    """Products as users of this processor have them; whether they are rounded."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: ROUNDS, raising=False)
    return ROUNDS
