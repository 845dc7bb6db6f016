"""Scores are compared with what algebra says, and algebra holds in exact products: on every processor."""

from __future__ import annotations

import pytest
import torch

ROUNDS = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
"""Whether this processor rounds the operands of products that may be rounded (`execution/precision.py`)."""


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """One with AMX multiplies in bfloat16, which hides an error of a percent."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)


@pytest.fixture
def reduced_products(exact_products, monkeypatch) -> bool:
    """Products as users of this processor have them; whether they are rounded."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: ROUNDS, raising=False)
    return ROUNDS
