"""Energy by NVML's counter: patched, since no test machine need have a card."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from optin_cli.measure import energy, latency
from optin_cli.measure.energy import joules_of, open_meter

CUDA = torch.device("cuda", 0)
UUID = "11112222-3333-4444-5555-666677778888"


class Card:
    """NVML as far as it is used: 300 J so far, and 2 J a forward."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.millijoules = 300_000
        self.opened: list[str] = []

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.opened.append(uuid)
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == f"GPU-{UUID}"
        return self.millijoules

    def forward(self) -> None:
        self.millijoules += 2000


@pytest.fixture
def card(monkeypatch):
    found = Card()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(energy, "LEAST_SECONDS", 0.0)
    return found


def test_the_card_is_found_by_its_uuid(card):
    meter = open_meter(CUDA)
    assert meter is not None and meter.joules() == 300.0
    assert card.opened == [f"GPU-{UUID}"]


def test_the_energy_of_a_call_is_the_counters_difference_over_the_calls(card):
    settled = []
    meter = open_meter(CUDA)
    assert joules_of(card.forward, lambda: settled.append(card.millijoules), meter, 0.02) == pytest.approx(
        2.0
    )
    assert settled[0] == 300_000  # nothing that ran before is counted


def test_none_on_a_cpu_without_nvml_and_on_cards_without_a_counter(card, monkeypatch):
    assert open_meter(torch.device("cpu")) is None

    def unsupported(_):
        raise Card.NVMLError("Not Supported")

    monkeypatch.setattr(card, "nvmlDeviceGetTotalEnergyConsumption", unsupported)
    assert open_meter(CUDA) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_meter(CUDA) is None


def test_a_timing_has_the_energy_of_one_example(card, monkeypatch):
    from helpers.models import shared_model

    model = shared_model("bert")
    meter = open_meter(CUDA)
    monkeypatch.setattr(latency, "open_meter", lambda _: meter)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(latency, "_forward_ms", lambda *_: 1.0)
    run = type(model).run

    def counted(self, inputs):
        card.forward()
        return run(self, inputs)

    monkeypatch.setattr(type(model), "run", counted)
    (timing,) = latency.bench([model], [4], [8], repeats=2, seconds=0.01)
    assert timing.joules == pytest.approx(0.5)
    (untimed,) = latency.bench([model], [4], [8], repeats=2, seconds=0.0)
    assert untimed.joules is None
