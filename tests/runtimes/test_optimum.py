"""Exported directories open in sentence-transformers and optimum, without optin and without code of theirs.

optimum's own ONNX package wants an older transformers than optin does. `OPTIN_OPTIMUM` names a folder of packages in
which both agree (`pip install --target FOLDER --no-deps optimum-onnx ...`); without it, and where optimum does not
import here, the test skips.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import tiny_text_csv
from helpers.exported import checks_of, emptied
from helpers.lazy import needs_onnx
from helpers.models import opened
from helpers.open_in_optimum import TEXTS
from helpers.pruning import sliced_copy
from helpers.sentences import folder_of

from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.runtimes.checks import open_checks
from optin_cli.runtimes.export import ExportSettings, export

needs_onnx()
TESTS = Path(__file__).resolve().parents[1]
KEEP = {"blocks.0.heads": [], "blocks.1.heads": [1, 3], "blocks.1.neurons": [5, 6, 60]}


def packages() -> str:
    """Folder of packages in which optimum works; '' for those that are installed."""
    if named := os.environ.get("OPTIN_OPTIMUM"):
        return named
    try:
        importlib.import_module("optimum.onnxruntime.modeling_decoder")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs optimum-onnx in OPTIN_OPTIMUM: {error}")
    return ""


def in_torch(model: OpenModel) -> torch.Tensor:
    """Outputs for the texts."""
    processor = model.processor
    with torch.inference_mode():
        return model.output(processor.pad(processor.tokenize(TEXTS)))


@pytest.mark.slow
def test_libraries_find_what_was_exported(tmp_path):
    path = [packages(), str(TESTS)]
    dense = folder_of(tmp_path / "dense", {"pooling_mode": "mean"}, others=("Normalize",))
    sliced_copy(dense, tmp_path / "m", KEEP)
    sentences, classifier = opened(tmp_path / "m"), opened(emptied("bert"))
    data = DataSpec(str(tiny_text_csv(tmp_path)))
    export(sentences, ExportSettings("onnx"), tmp_path / "sentences", checks_of)
    export(
        sentences, ExportSettings("onnx", int8=True), tmp_path / "sentences", lambda m: open_checks(m, data)
    )
    export(classifier, ExportSettings("onnx"), tmp_path / "classifier", checks_of)

    for name in ("sentences", "classifier"):
        folder = tmp_path / name  # its tiny tokenizer is of a class of transformers 5
        named = json.loads((config := folder / "tokenizer_config.json").read_text())
        config.write_text(json.dumps({**named, "tokenizer_class": "PreTrainedTokenizerFast"}))

    done = subprocess.run(
        [sys.executable, "-m", "helpers.open_in_optimum", tmp_path, tmp_path / "found.npz"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "found.npz")
    wanted = in_torch(sentences)[:, 0].numpy()
    np.testing.assert_allclose(found["embeddings"], wanted, atol=1e-5)
    assert 1e-5 < np.abs(found["int8"] - wanted).max() < 0.2
    assert found["hidden"].shape[::2] == (4, 32)
    np.testing.assert_allclose(found["logits"], in_torch(classifier)[:, 0].numpy(), atol=1e-5)
