"""Decoders with their cache outside: a program reads tokens and the keys and values of those before, and gives both.

One file is for the prompt, where the cache is empty, and for each token after it. Caches are named as optimum names
them, `past_key_values.0.key` and `present.0.key`: (examples, heads, tokens, width), as each block has them. A block
without heads has one of width 1 that nothing reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optin_cli.errors import InputError, first_line
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.runtimes.checks import Checks
from optin_cli.runtimes.program import BATCH, TOKENS, Inputs, Program, Traced, as_dtype, export_program
from optin_cli.runtimes.prompt import IDS, MASK, POSITIONS, Shapes, positions_of, with_empty_cache
from optin_cli.runtimes.targets import Session

LOGITS = "logits"
_PAST, _ALL = "past", "past_and_tokens"
_STEPS = 2
"""Tokens that a file is checked on one at a time, behind the others."""


def cache_shapes(model: OpenModel, inputs: Inputs) -> dict[str, list[int]]:
    """The shape of every key and value of the cache. Raises `InputError` for a model without one."""
    body = model.task.body(model.module)
    try:
        with torch.no_grad():
            given = {IDS: inputs[IDS], MASK: inputs[MASK], POSITIONS: positions_of(inputs[MASK])}
            result = body(**given, **_arguments(model))
        layers = result.past_key_values.layers
        pairs = [(layer.keys, layer.values) for layer in layers]
        shapes = {
            _past(index, kind): [one.shape[1], one.shape[3]]
            for index, pair in enumerate(pairs)
            for kind, one in zip(("key", "value"), pair, strict=True)
        }
        assert result.logits.dim() == 3 and shapes, "it gives no logits for each token"
    except (AttributeError, AssertionError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{model.spec} has no cache of keys and values with positions: {first_line(error)}",
            "a cache is for decoders that generate: export it without",
        ) from error
    return shapes


def _arguments(model: OpenModel) -> dict[str, Any]:
    return {**model.family.arguments, "use_cache": True}


def _past(index: int, kind: str) -> str:
    return f"past_key_values.{index}.{kind}"


class CachedProgram(Program):
    """Tokens, the mask of all of them and of those before, positions, past keys and values; logits and present ones."""

    def __init__(self, model: OpenModel, shapes: Shapes) -> None:
        past = [_identifier(name) for name in shapes]
        outputs = [LOGITS, *(name.replace("past_key_values", "present") for name in shapes)]
        super().__init__(model, [IDS, MASK, POSITIONS, *past], outputs)
        self.past = past
        self.arguments = _arguments(model)

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        from transformers import DynamicCache

        past = [as_dtype(inputs[name], self.dtype) for name in self.past]
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        tokens = {name: inputs[name] for name in (IDS, MASK, POSITIONS)}
        result = self.body(**tokens, past_key_values=cache, **self.arguments)
        present = [one for layer in result.past_key_values.layers for one in (layer.keys, layer.values)]
        found = zip(self.outputs, [result.logits, *present], strict=True)
        return {name: as_dtype(value, torch.float32) for name, value in found}


def _identifier(name: str) -> str:
    return name.replace(".", "_")


def trace_cached(model: OpenModel, inputs: Inputs, shapes: Shapes) -> Traced:
    """Trace a decoder with a cache of as many tokens as it reads. Raises as `trace`."""
    module = CachedProgram(model, shapes)
    ids = inputs[IDS]
    count = ids.shape[1]
    given = {
        IDS: ids,
        MASK: torch.ones(len(ids), 2 * count + 1, dtype=torch.long),
        POSITIONS: torch.arange(count + 1, 2 * count + 1).repeat(len(ids), 1),
    }
    axes = {IDS: {0: BATCH, 1: TOKENS}, MASK: {0: BATCH, 1: _ALL}, POSITIONS: {0: BATCH, 1: TOKENS}}
    for name, (heads, width) in shapes.items():
        given[_identifier(name)] = torch.zeros(len(ids), heads, count + 1, width)
        axes[_identifier(name)] = {0: BATCH, 2: _PAST}
    program = export_program(model, module, given, axes)
    return Traced(program, module, given, module.outputs, axes, [IDS, MASK, POSITIONS, *shapes])


def stepwise(session: Session, shapes: Shapes) -> Session:
    """Run a file as generating does: the prompt, then the last tokens one at a time. Gives the logits of all real ones;
    those of padding are 0."""

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        ids, mask = inputs[IDS], inputs[MASK]
        past = with_empty_cache(inputs, shapes)
        found, start = [], 0
        length = ids.shape[1]
        for stop in range(max(1, length - _STEPS), length + 1):
            positions = positions_of(mask[:, :stop], start)
            given = {**past, IDS: ids[:, start:stop], MASK: mask[:, :stop], POSITIONS: positions}
            logits, *present = session(given)
            found.append(logits)
            past, start = dict(zip(shapes, present, strict=True)), stop
        return [_real(torch.cat(found, 1), mask)]

    return run


@torch.inference_mode()
def expected_in_steps(model: OpenModel, checks: Checks) -> list[list[Tensor]]:
    """The logits that torch gives for whole texts, without a cache."""
    body, found = model.task.body(model.module), []
    for batch in checks.batches:
        mask = batch[MASK]
        given = {IDS: batch[IDS], MASK: mask, POSITIONS: positions_of(mask)}
        result = body(**given, **{**model.family.arguments, "use_cache": False})
        found.append([_real(result.logits.float(), mask)])
    return found


def _real(logits: Tensor, mask: Tensor) -> Tensor:
    return logits * mask[..., None]
