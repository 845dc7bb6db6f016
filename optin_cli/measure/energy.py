"""Energy of forwards on an NVIDIA GPU, by the counter of its driver (NVML), where that can be read.

The counter is of the whole card and moves every few dozen milliseconds: forwards run one behind the other for a while,
and nothing else should run on the card.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

LEAST_SECONDS = 0.5
"""Forwards run at least so long between two looks at the counter."""


class Meter:
    """The energy counter of one card."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def joules(self) -> float:
        """Used since the driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000


def open_meter(device: torch.device) -> Meter | None:
    """The counter of a device; None for what is no NVIDIA GPU, for cards without one (before Volta), and where
    `nvidia-ml-py` (the extra `bench`) is not installed."""
    if device.type != "cuda":
        return None
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlInit()
        meter = Meter(nvml, _handle(nvml, device))
        meter.joules()
        return meter
    return None


def _handle(nvml: Any, device: torch.device) -> Any:
    """By the card's UUID: NVML counts cards that torch does not see."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


def joules_of(run: Callable[[], object], settle: Callable[[], object], meter: Meter, seconds: float) -> float:
    """Joules of one call of `run`, what the card uses anyway included: a mean over `seconds`, at least
    `LEAST_SECONDS`. `settle` waits until the device is done."""
    settle()
    begin, end, calls = meter.joules(), time.perf_counter() + max(seconds, LEAST_SECONDS), 0
    while not calls or time.perf_counter() < end:
        run()
        calls += 1
        settle()
    return (meter.joules() - begin) / calls
