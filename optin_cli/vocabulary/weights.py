"""A model of transformers with some of the rows of its embeddings: transformers builds it from a smaller config."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.architectures.families import family_from_dict
from optin_cli.architectures.resolve import dissect
from optin_cli.artefacts.pruned import PrunedRecord
from optin_cli.errors import InputError
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.loading.reshaping import remember, reshape_as_recorded
from optin_cli.standalone.from_transformers import resized
from optin_cli.tasks.language import NextToken

_NAMED = re.compile(r"_token_ids?$|_token_index$|^forced_decoder_ids$|_to_id$")
"""Entries of a config that name tokens which a model needs."""
_UNWANTED = re.compile(r"^(begin_)?suppress_tokens$|^bad_words_ids$|^sequence_bias$")
"""Entries that name tokens to avoid, or to prefer: of what is gone, nothing is to be said."""
_SIZE = re.compile(r"(?<!type_)vocab_size$")


def vocabulary_size(model: OpenModel) -> int:
    """Rows of the embedding of tokens.

    Raises `InputError` for a model that has none, or several of different sizes.
    """
    module: Any = model.module
    if model.source.library != "transformers":
        raise InputError(
            f"{model.spec} is no model of transformers, which could build it with fewer tokens",
            "give a model of transformers, or its directory",
        )
    sizes = {value for _, name, value in _entries(module.config) if _SIZE.search(name) and value}
    try:
        embedding = module.get_input_embeddings()
    except NotImplementedError:  # of classes that transformers finds none in
        embedding = None
    rows = embedding.weight.shape[0] if isinstance(embedding, nn.Embedding) else 0
    if not rows:
        raise InputError(f"{model.spec} has no embedding of tokens", "give a model that reads text")
    if sizes != {rows}:
        raise InputError(
            f"{model.spec} has embeddings of {rows} tokens, and its config says {sorted(sizes)}: encoder and decoder "
            "have vocabularies of their own, and one tokenizer can't say which tokens each needs",
            "give a model with one vocabulary",
        )
    return rows


def named_ids(module: Any) -> set[int]:
    """Ids of tokens that the configs of a model and of its generation name."""
    found: set[int] = set()
    for config in _configs(module):
        for _, name, value in _entries(config):
            if _NAMED.search(name):
                found.update(_numbers(value, name))
    return found


def with_tokens(model: OpenModel, kept: Sequence[int], tokenizer: Any) -> OpenModel:
    """The model with the `kept` tokens alone (old ids, ascending), read by `tokenizer`; what is given stays as it is.

    Raises `InputError` where the class does not build what the config says.
    """
    module: Any = model.module
    rows = vocabulary_size(model)
    ids = {old: new for new, old in enumerate(kept)}
    chosen = torch.tensor([old for old in kept if old < rows], device=model.device)
    config = _renumbered(copy.deepcopy(module.config), ids, rows, len(chosen))
    record = None if model.record is None else _counted(copy.deepcopy(model.record))
    cls = type(module)

    def reshape(built: nn.Module) -> None:
        if record is not None:
            reshape_as_recorded(built, record, family_from_dict(record.family, "its family"))

    with torch.random.fork_rng(devices=[]):  # weights are drawn and overwritten
        made = resized(cls, reshape)._from_config(config, dtype=module.dtype)
    made.__class__ = cls
    made.to(model.device)
    _fill(made, module, chosen, rows)
    if getattr(module, "generation_config", None) is not None:
        made.generation_config = _renumbered(copy.deepcopy(module.generation_config), ids, rows, len(chosen))
    made.eval().requires_grad_(False)
    if record is not None:
        record.history[-1]["params"] = sum(p.numel() for p in made.parameters())
        remember(made, record)
    task = model.task
    if isinstance(task, NextToken):
        task = replace(task, classes=len(chosen))
    source = replace(model.source, record=record, in_memory=True)
    return OpenModel(
        source, made, model.family, dissect(made, model.family), task, model.stored_dtype, given=tokenizer
    )


def _counted(record: PrunedRecord) -> PrunedRecord:
    """A record that no longer says how often its data has each token: they have other ids now."""
    record.history[-1]["content"] = None
    return record


@torch.no_grad()
def _fill(made: nn.Module, module: nn.Module, chosen: Tensor, rows: int) -> None:
    """Copy weights and buffers; of those with a row for each token the `chosen` ones."""
    ours, theirs = made.state_dict(), module.state_dict()
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())
        raise InputError(
            f"a {type(made).__name__} of fewer tokens has other weights ({', '.join(odd[:3])})",
            "this architecture can't lose tokens",
        )
    for name, target in ours.items():
        tensor = theirs[name]
        differing = [dim for dim, (a, b) in enumerate(zip(target.shape, tensor.shape, strict=True)) if a != b]
        if any(tensor.shape[dim] != rows or target.shape[dim] != len(chosen) for dim in differing):
            raise InputError(
                f"{name} of a {type(made).__name__} has {list(tensor.shape)} values, and with fewer tokens "
                f"{list(target.shape)}: it is no table of tokens",
                "this architecture can't lose tokens",
            )
        for dim in differing:
            tensor = tensor.index_select(dim, chosen.to(tensor.device))
        target.copy_(tensor)


# ---- configs ----


def _configs(module: Any) -> list[Any]:
    return [one for one in (module.config, getattr(module, "generation_config", None)) if one is not None]


def _entries(config: Any) -> Iterator[tuple[Any, str, Any]]:
    """(holder, name, value) of a config, and of the configs and dicts in it."""
    values = config if isinstance(config, dict) else vars(config)
    for name, value in list(values.items()):
        if not isinstance(name, str):
            continue
        about_tokens = _NAMED.search(name) or _UNWANTED.search(name)
        if _is_config(value) or (isinstance(value, dict) and not about_tokens):
            yield from _entries(value)
        else:
            yield config, name, value


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "from_dict")


def _renumbered(config: Any, ids: Mapping[int, int], rows: int, size: int) -> Any:
    """The config, changed in place, with new ids and sizes."""
    for holder, name, value in _entries(config):
        if _SIZE.search(name) and value == rows:
            new: Any = size
        elif _NAMED.search(name):
            new = _mapped(value, ids, name)
        elif _UNWANTED.search(name) and value:
            new = _of_kept(value, ids)
        else:
            continue
        if isinstance(holder, dict):
            holder[name] = new
        else:
            setattr(holder, name, new)
    return config


def _numbers(value: Any, name: str) -> Iterator[int]:
    """The ids in an entry; of `forced_decoder_ids` the second of each pair."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        pairs = name == "forced_decoder_ids"
        for one in value:
            yield from _numbers(one[1] if pairs else one, "")
    elif type(value) is int and value >= 0:
        yield value


def _mapped(value: Any, ids: Mapping[int, int], name: str) -> Any:
    """An entry with new ids; what is no token's id, as -1 of old configs and ids beyond the vocabulary, stays."""
    if isinstance(value, dict):
        return {key: _mapped(one, ids, "") for key, one in value.items()}
    if isinstance(value, list | tuple):
        pairs = name == "forced_decoder_ids"
        return [[one[0], _mapped(one[1], ids, "")] if pairs else _mapped(one, ids, "") for one in value]
    return ids.get(value, value) if type(value) is int else value


def _of_kept(value: Any, ids: Mapping[int, int]) -> Any:
    """A list of ids, of sequences of them, or sequences with a bias, without those that are gone."""
    if isinstance(value, dict):
        return {
            tuple(ids[one] for one in tokens): bias
            for tokens, bias in value.items()
            if all(one in ids for one in tokens)
        }
    if all(type(one) is int for one in value):
        return [ids[one] for one in value if one in ids]
    with_bias = all(len(one) == 2 and isinstance(one[0], list | tuple) for one in value)
    if with_bias:
        return [[[ids[id] for id in one[0]], one[1]] for one in value if all(id in ids for id in one[0])]
    return [[ids[id] for id in one] for one in value if all(id in ids for id in one)]
