"""What tests of scores share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def reduced_products(monkeypatch, processor_rounds) -> bool:
    """Products as users of this processor have them; whether they are rounded."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: processor_rounds, raising=False)
    return processor_rounds
