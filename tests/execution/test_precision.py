"""Which switches of torch decide how convolutions round."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from optin_cli.execution.precision import exact_convolutions


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="a newer torch's switch")
def test_convolutions_keep_their_digits_within_and_are_as_before_afterwards():
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    with exact_convolutions():
        assert conv.fp32_precision == "ieee"
    assert conv.fp32_precision == before
    with pytest.raises(KeyError), exact_convolutions():
        raise KeyError
    assert conv.fp32_precision == before


def test_an_older_torch_has_one_switch_for_all_of_cudnn(monkeypatch):
    cudnn = SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    with exact_convolutions():
        assert cudnn.allow_tf32 is False
    assert cudnn.allow_tf32 is True
