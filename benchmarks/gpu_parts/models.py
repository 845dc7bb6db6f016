"""Random models of everyday shapes, saved with a tokenizer, and pruned by random scores.

Weights are larger than transformers draws them, so that every block changes the stream as much as in a trained model.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.tokenizers import save_tokenizer

from optin_cli.architectures.resolve import dissect
from optin_cli.artefacts.ranking import Ranking
from optin_cli.execution.macs import observed_tokens
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.measure.inputs import default_size, dummy_inputs
from optin_cli.measure.latency import device_name
from optin_cli.scoring.totals import ranked_site
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request
from optin_cli.transforms.slicing import slice_model

_TINY_TEXT: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 200,
}  # fmt: skip


def bert(folder: Path, tiny: bool, dtype: torch.dtype = torch.float32) -> Path:
    """BERT-base, a classifier: 12 blocks of 12 heads and 3,072 neurons, 37,008 units."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(initializer_range=0.05, **(_TINY_TEXT if tiny else {}))
    return _saved(BertForSequenceClassification, config, folder, dtype, "bert", 512)


def deit(folder: Path, tiny: bool) -> Path:
    """DeiT-S: 12 blocks of 6 heads and 1,536 neurons, 224 x 224 pixels in patches of 16."""
    from transformers import DeiTConfig, DeiTForImageClassification

    shape: dict[str, Any] = {
        "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000
    }  # fmt: skip
    if tiny:
        shape |= {"num_hidden_layers": 3, "num_labels": 10, "image_size": 32}
    return _saved(DeiTForImageClassification, DeiTConfig(**shape), folder, torch.float32)


def llama(folder: Path, tiny: bool, device: str) -> Path:
    """A Llama of 1.1 B parameters in bfloat16: 22 blocks of 2,048, 32 heads in 4 groups, 5,632 neurons."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "initializer_range": 0.03,
        "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
        "intermediate_size": 5632, "vocab_size": 32000, "max_position_embeddings": 2048,
    }  # fmt: skip
    if tiny:
        shape |= {**_TINY_TEXT, "num_key_value_heads": 2}
    with torch.device(device):  # a billion random numbers take long on a CPU
        return _saved(LlamaForCausalLM, LlamaConfig(**shape), folder, torch.bfloat16, "llama", 2048)


def _saved(
    cls: Any, config: Any, folder: Path, dtype: torch.dtype, tokenizer: str = "", max_length: int = 0
) -> Path:
    torch.manual_seed(0)
    cls(config).to(dtype).save_pretrained(folder)
    if tokenizer:
        save_tokenizer(tokenizer, folder, max_length)
    return folder


def pruned(model: OpenModel, share: float, round_to: int | str = 1) -> OpenModel:
    """A copy of `model` with `share` of its MACs, chosen and sliced as optin does, by random scores."""
    mask = select(random_ranking(model), Request(flops=share, round_to=round_to))
    module = copy.deepcopy(model.module)
    slice_model(module, model.anatomy, mask.keep)
    name = f"{share:g}" + (f" round {round_to}" if round_to != 1 else "")
    return replace(
        model,
        module=module,
        anatomy=dissect(module, model.family),
        source=replace(model.source, spec=name),
    )


def random_ranking(model: OpenModel, seed: int = 0) -> Ranking:
    """A ranking of any model without data: random scores in proportion to what units cost."""
    tokens = float(observed_tokens(model, dummy_inputs(model, 1, default_size(model))))
    rng = np.random.default_rng(seed)
    sites = [
        ranked_site(
            site,
            score=rng.random(site.units) * site.macs_per_unit(tokens),
            trajectory=np.zeros((site.units, 0)),
            output=np.zeros(site.units),
            columns=[],
        )
        for site in model.anatomy
    ]
    return Ranking(
        model={
            "id": model.spec,
            "digest": model.digest,
            "family": model.family.name,
            "task": model.task.name,
        },
        data={"fingerprint": ""},
        row_ids=[],
        method="random",
        settings={"output_weight": 0.0},
        tokens=tokens,
        dense={**model.dense, "dtype": str(model.dtype).removeprefix("torch."), "fixed_macs": 0},
        sites=sites,
        device=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
    )
