"""A smaller vocabulary against the whole one: the same texts give the same tokens, the same tokens the same outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optin_cli.data.batches import Batches
from optin_cli.errors import InputError, OptinError
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.pruning.writers import Comparison, compare_outputs
from optin_cli.tasks.language import NextToken

LENGTH = 64
"""Tokens of the texts that outputs are compared on."""
_BATCHES, _ROWS = 4, 8
_TOKENS = "input_ids"


def check_texts(
    tokenizer: Any, smaller: Any, ids: Mapping[int, int], texts: Iterable[Sequence[str]], unknown: int | None
) -> int:
    """Raise `InputError` for a text whose tokens are all kept, and which is split into others; return how many were.

    A word that WordPiece knows no split of may have one without some tokens: texts with the `unknown` token are left
    out.
    """
    compared = 0
    for some in texts:
        before = tokenizer(list(some), verbose=False)[_TOKENS]
        after = smaller(list(some), verbose=False)[_TOKENS]
        for text, old, new in zip(some, before, after, strict=True):
            if unknown in old or any(one not in ids for one in old):
                continue
            compared += 1
            if [ids[one] for one in old] != new:
                raise InputError(
                    f"without the other tokens, a {type(tokenizer).__name__} splits {text[:60]!r} into others than "
                    "before, though all of its tokens are kept; nothing was written",
                    "this tokenizer can't lose tokens",
                )
    return compared


def check_ids(tokenizer: Any, smaller: Any, ids: Mapping[int, int]) -> None:
    """Raise `InputError` where a kept or special token has another id than its rank."""
    names = tokenizer.get_vocab()
    wanted = {token: ids[old] for token, old in names.items() if old in ids}
    found = smaller.get_vocab()
    odd = sorted(token for token in wanted.keys() | found.keys() if wanted.get(token) != found.get(token))
    special = {
        name: token for name, token in tokenizer.special_tokens_map.items()
        if smaller.special_tokens_map.get(name) != token
    }  # fmt: skip
    if odd or special:
        what = repr(odd[0]) if odd else ", ".join(special)
        raise InputError(
            f"a {type(tokenizer).__name__} can't be opened without the other tokens: {what} would be another one",
            "this tokenizer can't lose tokens",
        )


def some_inputs(batches: Batches) -> list[dict[str, Tensor]]:
    """The first examples of evenly spaced batches: short texts and long ones."""
    count = min(len(batches), _BATCHES)
    chosen = [round(place * (len(batches) - 1) / max(1, count - 1)) for place in range(count)]
    return [batches[place].head(_ROWS).inputs for place in chosen]


def compare_models(
    model: OpenModel,
    smaller: OpenModel,
    kept: Sequence[int],
    inputs: Sequence[Mapping[str, Tensor]],
    counts: Counter[int],
) -> Comparison:
    """How near the outputs are to those before, on texts whose other tokens are replaced by the most frequent kept one.

    Of language models the logits of the kept tokens are compared. Raises `OptinError` where outputs differ.
    """
    rows = model.module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = {old: new for new, old in enumerate(kept) if old < rows}
    stand_in = max(ids, key=lambda one: (counts[one], one))
    covered = [
        {name: _replaced(name, tensor, ids, stand_in) for name, tensor in one.items()} for one in inputs
    ]
    expected, found = [], []
    with torch.inference_mode():
        for one in covered:
            before = model.output({name: tensor.to(model.device) for name, tensor in one.items()})
            if isinstance(model.task, NextToken):
                before = before[..., torch.tensor(list(ids), device=before.device)]
            mapped = {name: _mapped(name, tensor, ids) for name, tensor in one.items()}
            expected.append(before)
            found.append(smaller.output({name: tensor.to(smaller.device) for name, tensor in mapped.items()}))
    compared = compare_outputs(expected, found, model.dtype)
    if not compared.same:
        raise OptinError(
            f"the model with fewer tokens differs from {model.spec} by {compared.deviation:.2e}, more than the "
            f"{compared.tolerance:.0e} that {model.dtype_name} explains; nothing was written",
            "this architecture reads more from ids than their embeddings: its vocabulary can't be reduced",
        )
    return compared


def _replaced(name: str, tensor: Tensor, ids: Mapping[int, int], stand_in: int) -> Tensor:
    if not name.endswith(_TOKENS):
        return tensor
    known = torch.isin(tensor, torch.tensor(list(ids)))
    return tensor.where(known, torch.tensor(stand_in))


def _mapped(name: str, tensor: Tensor, ids: Mapping[int, int]) -> Tensor:
    if not name.endswith(_TOKENS):
        return tensor
    table = torch.zeros(max(ids) + 1, dtype=tensor.dtype)
    table[torch.tensor(list(ids))] = torch.tensor(list(ids.values()), dtype=tensor.dtype)
    return table[tensor]
