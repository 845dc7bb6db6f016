"""Tensors that need not all fit into main memory."""

from pathlib import Path

import pytest
import torch

from optin_cli.errors import InputError
from optin_cli.execution import activation_cache as stores
from optin_cli.execution.activation_cache import ActivationCache


def test_a_store_spills_what_does_not_fit_and_cleans_up():
    tensors = {i: torch.randn(10, 10, dtype=torch.float32) for i in range(5)}
    tensors[5] = torch.ones(3, dtype=torch.bool)
    tensors[6] = torch.randn(4).bfloat16()
    with ActivationCache(memory=1000) as store:
        for key, tensor in tensors.items():
            store[key] = tensor
        assert store.used <= 1000
        assert set(store.held) == {0, 1, 5, 6}
        folder = store.folder
        assert len(list(folder.iterdir())) == 3
        for key, tensor in tensors.items():
            assert torch.equal(store[key], tensor)
            assert store[key].dtype == tensor.dtype
        assert torch.equal(store.pop(3), tensors[3])
        assert len(list(folder.iterdir())) == 2
        store.drop(0)
        store[4] = tensors[1]  # replaced, and now there is room for it
        assert 4 in store.held
        assert len(list(folder.iterdir())) == 1
        with pytest.raises(KeyError):
            store[3]
    assert not folder.exists()


def test_nothing_is_written_while_it_fits(monkeypatch):
    monkeypatch.setattr(stores, "scratch", None)
    with ActivationCache(memory=400) as store:
        store["a"] = torch.zeros(100)
        store["a"] = torch.ones(100)
        assert store["a"].sum() == 100


def test_a_full_disk_is_one_message(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores, "save_file", full)
    with ActivationCache(memory=0) as store:
        with pytest.raises(InputError, match="disk is full"):
            store["a"] = torch.zeros(1)
        folder = Path(store.folder)
    assert not folder.exists()


class OnGpu:
    """A tensor that says it is on a GPU."""

    is_cuda = True

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def numel(self) -> int:
        return self.tensor.numel()

    def element_size(self) -> int:
        return self.tensor.element_size()

    def cpu(self) -> torch.Tensor:
        return self.tensor


def test_a_gpus_tensors_stay_there_until_their_share_is_used():
    tensors = [OnGpu(torch.full((10,), float(i))) for i in range(4)]
    with ActivationCache(memory=40, on_gpu=80) as store:
        for key, tensor in enumerate(tensors):
            store[key] = tensor
        assert [store.held.get(key) is tensor for key, tensor in enumerate(tensors)] == [
            True,
            True,
            False,
            False,
        ]
        assert (store.used_on_gpu, store.used, set(store.spilled)) == (80, 40, {3})
        assert torch.equal(store[2], tensors[2].tensor)
        assert torch.equal(store[3], tensors[3].tensor)
        store.drop(0)
        store[3] = tensors[3]  # there is room for it now
        assert store[3] is tensors[3]
        assert (store.used_on_gpu, store.used) == (80, 40)
    with ActivationCache(memory=400) as store:
        store["key"] = tensors[0]
        assert store["key"] is tensors[0].tensor
