"""A decoder's two speeds: reading a prompt in one forward (prefill), and writing one token after the other (decode).

They differ by far: prefill is bound by products of matrices, decode by reading weights and cache for every token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optin_cli.errors import UsageError, param
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.measure.inputs import check_setting, default_size, draw
from optin_cli.measure.latency import Progress, call_ms
from optin_cli.structure.hidden_states import cache_argument
from optin_cli.tasks.language import LANGUAGE

_WARMUP = 2


@dataclass(frozen=True)
class Generation:
    """One decoder reading and writing at one batch size."""

    model: str
    batch_size: int
    prompt: int
    """Tokens that are read."""
    new: int
    """Tokens that are written."""
    prefill_ms: float
    """Median of reading the prompt."""
    decode_ms: float
    """Median of writing one token of each example."""
    prefill_tokens_per_second: float
    """Of the batch, as `decode_tokens_per_second`."""
    decode_tokens_per_second: float
    rounds: int


def bench_generation(
    models: Sequence[OpenModel],
    batch_sizes: Sequence[int],
    prompt: int | None = None,
    new: int = 32,
    *,
    repeats: int = 3,
    seconds: float = 5.0,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> list[Generation]:
    """Time reading `prompt` random tokens and writing `new` more after them, greedily, with a cache: a `Generation` for
    each batch size and model, batch sizes first.

    The models take turns, at least `repeats` rounds and until `seconds` are spent. Raises `UsageError` for models that
    are no decoders, and for more tokens than they take.
    """
    for model in models:
        if model.task.name != LANGUAGE:
            raise UsageError(
                f"{model.spec} does {model.task.name} and writes no text token by token",
                f"leave {param('new_tokens')} out",
            )
    if new < 1:
        raise UsageError(f"{param('new_tokens', new)}: at least 1 is needed")
    prompt = prompt or max(1, default_size(models[0]) - new)
    found: list[Generation] = []
    for done, batch_size in enumerate(batch_sizes):
        if on_progress:
            on_progress(
                done, len(batch_sizes), f"writing {new} tokens after {prompt}, batches of {batch_size}"
            )
        for model in models:
            check_setting(model, batch_size, prompt + new)
        ids = [draw(model, batch_size, prompt, seed)["input_ids"] for model in models]
        times = _rounds(models, ids, new, max(repeats, 1), seconds)  # [models, rounds, 2]
        for model, (reading, writing) in zip(models, np.median(times, axis=1), strict=True):
            found.append(
                Generation(
                    model=model.spec,
                    batch_size=batch_size,
                    prompt=prompt,
                    new=new,
                    prefill_ms=float(reading),
                    decode_ms=float(writing) / new,
                    prefill_tokens_per_second=1000 * batch_size * prompt / float(reading),
                    decode_tokens_per_second=1000 * batch_size * new / float(writing),
                    rounds=times.shape[1],
                )
            )
    return found


def _rounds(
    models: Sequence[OpenModel], ids: Sequence[Tensor], new: int, repeats: int, seconds: float
) -> np.ndarray:
    """Milliseconds of reading and of writing, [models, rounds, 2]. Every round starts with another model."""
    for model, given in zip(models, ids, strict=True):
        for _ in range(_WARMUP):
            read_and_write(model, given, min(new, 2))
    rounds: list[list[tuple[float, float]]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < repeats or time.perf_counter() < end:
        row: dict[int, tuple[float, float]] = {}
        for step in range(len(models)):
            index = (step + len(rounds)) % len(models)
            reading, writing, _ = read_and_write(models[index], ids[index], new)
            row[index] = reading, writing
        rounds.append([row[index] for index in range(len(models))])
    return np.array(rounds).swapaxes(0, 1)


@torch.inference_mode()
def read_and_write(model: OpenModel, ids: Tensor, new: int) -> tuple[float, float, Tensor]:
    """(milliseconds of the prompt's forward, of `new` forwards of a token each, the tokens written [batch, new]).

    Greedy: the most likely token is next, whether it ends a text or not.
    """
    module: Any = model.module
    name = cache_argument(module)
    state: dict[str, Any] = {name: None}

    def forward(tokens: Tensor) -> None:
        output = module(input_ids=tokens, use_cache=True, **{name: state[name]})
        state[name], state["next"] = output[name], output.logits[:, -1:].argmax(-1)

    written: list[Tensor] = []

    def write() -> None:
        for _ in range(new):
            written.append(state["next"])
            forward(written[-1])

    reading = call_ms(lambda: forward(ids), model.device)
    writing = call_ms(write, model.device)
    return reading, writing, torch.cat(written, dim=1)
