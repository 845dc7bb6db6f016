"""What can be added from outside the package: an architecture, and a format to write models in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import optin_cli as optin
from optin_cli.architectures import families
from optin_cli.pruning import writers


class Layer(nn.Module):
    """A residual MLP over the tokens of an image."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, tokens):
        return tokens + self.fc2(torch.relu(self.fc1(self.norm(tokens))))


class PatchMlp(nn.Module):
    """An architecture that no library has: patches, residual MLPs, a head on their mean."""

    def __init__(self, inner: tuple[int, ...] = (32, 32, 32)) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.layers = nn.ModuleList(Layer(16, size) for size in inner)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens.mean(1))


FAMILY = optin.Family(
    name="patch-mlp",
    matches=("PatchMlp",),
    blocks="layers",
    sites=(optin.SiteTable("neurons", producers=(optin.Producer("fc1"),), consumer="fc2"),),
    modality="image",
)


class StateWriter:
    """Weights in safetensors; loading builds the module with the sizes that the record has."""

    def save(self, path, model, record):
        from safetensors.torch import save_file

        save_file(model.module.state_dict(), path / "weights.safetensors")

    def load(self, path, model):
        from safetensors.torch import load_file

        module = PatchMlp(tuple(site.units for site in model.anatomy))
        module.load_state_dict(load_file(path / "weights.safetensors"))
        self.loaded = module.eval()
        return self

    @torch.inference_mode()
    def output(self, inputs):
        return self.loaded(**inputs)[:, None]

    def compare(self, expected, found, dtype):
        return optin.compare_outputs(expected, found, dtype)


class Careless(StateWriter):
    """Loses the last bias on the way."""

    def load(self, path, model):
        super().load(path, model)
        nn.init.zeros_(self.loaded.head.bias)
        return self


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(families, "_REGISTRY", dict(families._REGISTRY))
    monkeypatch.setattr(writers, "_WRITERS", dict(writers._WRITERS))
    optin.register_family(FAMILY)
    optin.register_writer("state", StateWriter())
    optin.register_writer("careless", Careless())


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 32, 32, generator=generator), torch.randint(5, (8,), generator=generator))
        for _ in range(4)
    ]


def test_a_module_of_an_own_architecture_goes_through_every_stage(images):
    model = PatchMlp()
    small = optin.prune(model, images, flops=0.5, samples=24, compensate_samples=32)
    assert small.report.deviation < 1e-5
    kept = small.mask.keep
    assert sum(map(len, kept.values())) <= 48
    for site in small.anatomy:
        layer = small.module.layers[site.block]
        assert (layer.fc1.out_features, layer.fc2.in_features) == (len(kept[site.name]),) * 2
    found = optin.evaluate(small, images, baseline=model)
    assert set(found.metrics) >= {"top1"} and found.fidelity["agreement"] > 50
    dense, pruned = optin.bench(small, baseline=model, batch_size=2, image_size=32, repeats=1, seconds=0)
    assert pruned.macs < dense.macs


def test_a_format_of_ones_own_is_written_checked_and_refused(images, tmp_path):
    model = PatchMlp()
    mask = optin.select(optin.score(model, images, samples=24), flops=0.5)
    small = optin.apply(model, mask, images, output=tmp_path / "small", format="state")
    assert {path.name for path in (tmp_path / "small").iterdir()} == {"optin.json", "weights.safetensors"}
    assert optin.read_pruned(tmp_path / "small").history[-1]["deviation"] == small.report.deviation < 1e-5
    assert small.report.path == tmp_path / "small"
    with pytest.raises(optin.OptinError, match="differs from the masked one"):
        optin.save(small, tmp_path / "careless", format="careless")
    assert not (tmp_path / "careless").exists()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(optin.UsageError, match="of no library"):
        optin.save(small, tmp_path / "directory")
    with pytest.raises(optin.UsageError, match="unknown format 'onyx'") as caught:
        optin.save(small, tmp_path / "other", format="onyx")
    assert "directory, state" in caught.value.hint


def test_without_its_table_the_architecture_is_unknown(images):
    families._REGISTRY.pop("patch-mlp")
    with pytest.raises(optin.UnknownArchitecture, match="PatchMlp"):
        optin.score(PatchMlp(), images)
    assert optin.score(optin.open_model(PatchMlp(), family=FAMILY), images, samples=8).sites
