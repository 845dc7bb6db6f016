"""What is free on GPUs, as torch tells it."""

from __future__ import annotations

import torch

from optin_cli.execution.peak_memory import free_gpu_bytes


def test_free_memory_of_every_gpu_once_with_what_torch_holds_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (1000 + gpu.index, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: 100)
    first, second, cpu = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
    assert free_gpu_bytes([first, cpu]) == 1200
    assert free_gpu_bytes([first, second, first, cpu]) == 2401
    assert free_gpu_bytes([cpu]) == 0
