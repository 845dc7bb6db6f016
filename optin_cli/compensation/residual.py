"""Find where a consumer's output is added to the residual stream, by experiment instead of by a table.

The consumer's output c is replaced by zeros and by noise. The first tensor downstream that is t = r + gain * c,
with a gain for each channel (1, a layer scale, a BatchNorm's) and an r that differs from position to position, is
the sum with the residual. A block that has none may give c itself, but for a gain and a bias. Where the consumer
works on windows, its rows are added at other positions: numbers in place of c show where each one goes.
"""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.execution.block_runs import OUTPUT, Place, arguments_by_name, run_block
from optin_cli.structure.anatomy import SEQUENCE, TOKENS
from optin_cli.structure.hidden_states import Arguments, as_rows, hidden_argument, hidden_of
from optin_cli.structure.layers import channel_axis

_TOLERANCE = 1e-4  # some blocks compute their norms or softmax in float32 whatever they are given


@dataclass(frozen=True)
class ResidualSum:
    """The tensor where the residual is added. Without one (`found` False) it is the consumer's output."""

    place: Place
    gain: Tensor
    """[outputs], float64."""
    found: bool
    axis: int = -1
    """The axis of the channels at `place`, counted from the end."""
    batch_axis: int = 0
    """The axis of the examples at `place`."""
    rows: Tensor | None = None
    """[positions]: which of an example's consumer rows is added at each of its positions; None for the same order."""


def find_residual_sum(
    block: nn.Module,
    consumer: str,
    arguments: Arguments,
    seed: int = 0,
    *,
    layout: str = TOKENS,
    batch_axis: int = 0,
) -> ResidualSum:
    """Find the sum with the residual behind `consumer`, the path within `block` of a Linear or Conv2d that runs once.

    `arguments` are those of one batch, with hidden states of that `layout`; `batch_axis` is the axis of the examples
    at the consumer. It is looked for in a float64 copy of the block, where what is linear
    is linear to many digits.
    """
    block = copy.deepcopy(block).double()
    args, kwargs = arguments
    arguments = tuple(_as_double(v) for v in args), {name: _as_double(v) for name, v in kwargs.items()}
    with torch.no_grad():
        own = Place(consumer, 0, None)
        output = run_block(block, arguments, {own}, stop=True)[own]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(output.shape, dtype=torch.float64, generator=generator).to(output.device)
        noise = noise * (hidden_argument(*arguments).std() or 1)  # a decoder's first queries may be zero
        examples = as_rows(hidden_argument(*arguments), layout).shape[0]
        still = _downstream(block, consumer, torch.zeros_like(noise), arguments)
        own_axis = channel_axis(block.get_submodule(consumer))
        width = noise.shape[own_axis]

        batch_axes = (0, 1) if layout == SEQUENCE else (0,)

        def changes(output: Tensor) -> dict[tuple[Place, int, int], tuple[Tensor, Tensor]]:
            """Candidates for the sum: without the output, and the change by it, (examples, positions, outputs)."""
            moved = _downstream(block, consumer, output, arguments)
            return {
                (place, axis, batch): (
                    by_example(rest, examples, axis, batch),
                    by_example(moved[place] - rest, examples, axis, batch),
                )
                for place, rest in still.items()
                for axis in dict.fromkeys((own_axis, -1, -3))
                for batch in batch_axes
                if place in moved and _is_stream(rest, moved[place], examples, width, axis)
            }

        given = by_example(noise, examples, own_axis, batch_axis)
        by_noise = changes(noise)
        alone = None
        for (place, axis, batch), (rest, change) in by_noise.items():
            gain = _gain(change, given)
            if gain is not None and _varies(rest, change):
                return ResidualSum(place, gain, True, axis, batch)
            if gain is not None and place == OUTPUT:
                alone = ResidualSum(place, gain, True, axis, batch)
        own_sum = ResidualSum(own, noise.new_ones(width), False, own_axis, batch_axis)
        if alone or own_axis != -1:  # convolutions work on no windows
            return alone or own_sum
        gains = {key: _even(change) for key, (_, change) in changes(torch.ones_like(noise)).items()}
        if any(gain is not None for gain in gains.values()):
            numbers = torch.arange(1.0, given.shape[1] + 1).to(noise)  # of an example's rows
            numbered = numbers[None, :, None].expand_as(given)
            if batch_axis:  # else an example may be several windows
                numbered = numbered.movedim(0, batch_axis)
            by_number = changes(numbered.reshape(noise.shape))
            for key, (rest, change) in by_noise.items():
                rows = _landing(by_number[key][1], gains[key], given.shape[1])
                gain = None if rows is None else _gain(change, given[:, rows])
                if gain is not None and _varies(rest, change):
                    return ResidualSum(key[0], gain, True, *key[1:], rows)
    return own_sum


def by_example(tensor: Tensor, examples: int, axis: int = -1, batch_axis: int = 0) -> Tensor:
    """A tensor with its channels at `axis` as (examples, rows of an example, d)."""
    tensor = tensor.movedim(axis, -1).movedim(batch_axis, 0)
    return tensor.reshape(examples, tensor.shape[:-1].numel() // examples, tensor.shape[-1])


def _is_stream(rest: Tensor, moved: Tensor, examples: int, width: int, axis: int) -> bool:
    if rest.shape != moved.shape or rest.dim() < 2 or rest.dim() < 1 - axis or rest.shape[axis] != width:
        return False
    return rest.numel() // width % examples == 0


def _even(by_one: Tensor) -> Tensor | None:
    """The gain of each channel, (outputs,), if ones change every position alike."""
    gain = by_one.flatten(0, 1).mean(0)
    uneven = float((by_one - gain).abs().max())
    return gain if uneven <= _TOLERANCE * float(gain.abs().max()) and bool(gain.any()) else None


def _landing(by_number: Tensor, gain: Tensor | None, rows: int) -> Tensor | None:
    """Return the row that reaches each position, (positions,), from the change by row numbers from 1 on.

    None if some position gets no row, or not the same one in each example.
    """
    if gain is None:
        return None
    channel = int(gain.abs().argmax())
    found = (by_number[..., channel] / gain[channel]).round().long() - 1  # (examples, positions)
    same = bool((found == found[:1]).all()) and bool(((found >= 0) & (found < rows)).all())
    return found[0] if same else None


def _as_double(value: Any) -> Any:
    if type(value) in (tuple, list):
        return type(value)(map(_as_double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _downstream(block: nn.Module, consumer: str, output: Tensor, arguments: Arguments) -> dict[Place, Tensor]:
    """All tensors that modules receive after the consumer, in order, and the block's output, if it gave `output`."""
    found: dict[Place, Tensor] = {}
    calls: Counter[str] = Counter()
    passed = False

    def replace(_: nn.Module, __: Any, ___: Any) -> Tensor:
        nonlocal passed
        passed = True
        return output.clone()  # what comes may work in place

    def watch(path: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for name, value in arguments_by_name(args, kwargs).items():
                if passed and isinstance(value, Tensor):
                    found[Place(path, calls[path], name)] = value.clone()  # what comes may work in place
            calls[path] += 1

        return before

    with ExitStack() as stack:
        stack.callback(block.get_submodule(consumer).register_forward_hook(replace).remove)
        for path, module in block.named_modules():
            if path:
                stack.callback(module.register_forward_pre_hook(watch(path), with_kwargs=True).remove)
        args, kwargs = arguments
        found[OUTPUT] = hidden_of(block(*args, **kwargs))
    return found


def _varies(rest: Tensor, change: Tensor) -> bool:
    """Return whether `rest` is a residual: neither zero nor a constant per channel, which a norm adds."""
    flat = rest.flatten(0, -2)
    return float((flat - flat.mean(0)).abs().max()) > _TOLERANCE * float(change.abs().max())


def _gain(change: Tensor, noise: Tensor) -> Tensor | None:
    """The gain of each channel if `change` is gain * noise."""
    flat, given = change.flatten(0, -2), noise.flatten(0, -2)  # (tokens, outputs)
    if flat.shape != given.shape or not bool(flat.any()):
        return None
    gain = (flat * given).sum(0) / given.square().sum(0)
    left = (flat - gain * given).norm()
    return gain if float(left) <= _TOLERANCE * float(flat.norm()) else None
