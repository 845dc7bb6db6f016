"""Every family's pruned directory opens where optin is not installed, and runs as it does here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import ALL, DECODERS, ENCODER_DECODERS, MORE_FAMILIES
from helpers.models import opened, shared_model
from helpers.open_without_optin import tensors
from helpers.pruning import pruned_uniformly, sliced_copy
from helpers.runs import random_inputs

from optin_cli.execution.rotation import rankable
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.loading.from_module import copy_of
from optin_cli.transforms.token_merging import install_merges

TESTS = Path(__file__).resolve().parents[1]
MERGING = ["vit", "timm-vit"]
GENERATING = [*DECODERS, *ENCODER_DECODERS]
RANKED = [
    "bert",
    "gpt2",
    "timm-vit",
    "mpnet",
    "distilbert",
    "vit",
    "t5",
    "whisper",
    "clip-vision",
    "timm-swin",
]
UNIFORM = {
    "bert": "AutoModelForSequenceClassification",
    "llama": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
}
"""Families pruned to the same sizes in every layer -> the class that opens them without remote code."""
DIRECTORIES = [
    *ALL,
    *MORE_FAMILIES,
    *(f"{name}-merging" for name in MERGING),
    *(f"{name}-ranks" for name in RANKED[:3]),
    *(pytest.param(f"{name}-ranks", marks=pytest.mark.slow) for name in RANKED[3:]),
    *(f"{name}-uniform" for name in UNIFORM),
]


def kept_units(name: str) -> dict[str, list[int]]:
    """Not the first units of every site, all of some, and none of the first block's and of the second's last site."""
    anatomy = shared_model(name).anatomy
    keep = {site.name: [unit for unit in range(site.units) if unit % 3 != index % 3]
            for index, site in enumerate(anatomy) if index % 4 != 3}  # fmt: skip
    first, second = anatomy.in_block(anatomy.sites[0].block), anatomy.in_block(anatomy.sites[-1].block)
    return keep | {first[0].name: [], second[-1].name: []}


@pytest.fixture(scope="module")
def told(request, tmp_path_factory) -> dict[str, str]:
    """Directory of a selected test -> how what it gives without optin differs; '' where it does not."""
    folder = tmp_path_factory.mktemp("directories")
    mine = [
        item for item in request.session.items if item.path == request.path and "told" in item.fixturenames
    ]
    for directory in (item.callspec.params["name"] for item in mine):
        if directory.endswith("-uniform"):
            uniform_directory(directory.removesuffix("-uniform"), folder / directory)
            continue
        name = directory.removesuffix("-merging").removesuffix("-ranks")
        merges = [2, 1] if directory.endswith("-merging") else []
        model = copy_of(shared_model(name))
        ranks = {s.name: 1 + s.block % 3 for s in rankable(model)} if directory.endswith("-ranks") else {}
        pruned = sliced_copy(model, folder / directory, kept_units(name), merges, ranks)
        torch.save(expected_of(pruned, merges, directory in GENERATING), folder / directory / "expected.pt")
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(
        [sys.executable, "-m", "helpers.open_without_optin", folder],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def uniform_directory(name: str, folder: Path) -> None:
    """Write a uniform model to `folder`, with what it gives."""
    (work := folder.with_name(f"making-{name}")).mkdir()
    pruned_uniformly(name, work).rename(folder)
    expected = expected_of(opened(folder), [], name in GENERATING)
    torch.save(expected | {"stock": UNIFORM[name]}, folder / "expected.pt")


def expected_of(model: OpenModel, merges: list[int], generate: bool) -> dict[str, Any]:
    """Inputs, and what the pruned model gives for them."""
    inputs = {
        key: value.double() if value.is_floating_point() else value
        for key, value in random_inputs(model).items()
    }
    expected = {"library": model.source.library, "class": type(model.module).__name__, "inputs": inputs}
    install_merges(model.module, model.anatomy, merges)
    with torch.inference_mode():
        if generate:
            expected["prompt"] = {key: inputs[key][:1] for key in ("input_ids", "attention_mask")}
            expected["ids"] = model.module.generate(**expected["prompt"], max_new_tokens=4, do_sample=False)
        expected["outputs"] = tensors(model.module.double()(**inputs))
    return expected


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_opens_without_optin(name, told):
    assert told[name] == ""
