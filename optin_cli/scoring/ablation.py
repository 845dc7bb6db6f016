"""Ablation: remove each unit in turn and measure. Exact, and cheaper than one forward a unit.

A unit of block l leaves the blocks before it untouched, so a run starts at block l from its cached input.
Inside block l the change is rank one at the consumer, y - a_u w_u^T: the consumer's output is broadcast to all
variants there, and the deeper blocks see a batch of variants (METHOD section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optin_cli.models.anatomy import Site
from optin_cli.scoring.calibration import (
    Calibration,
    Scores,
    block_outputs,
    hidden_of,
    measured_blocks,
    with_hidden,
)
from optin_cli.scoring.losses import output_change, relational_change, unit_rows

# Tokens of all variants in one call. Beyond this a CPU gains nothing and a GPU is full.
_TOKENS_PER_CALL = {"cpu": 4096, "cuda": 1 << 17}


class Ablation:
    """Scores the units of one site at a time on one batch, from that batch's cached dense pass."""

    def __init__(self, calibration: Calibration, index: int) -> None:
        self.calibration = calibration
        self.model = calibration.model
        self.batch = calibration.batch(index)
        self.calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
        features: dict[int, Tensor] = {}
        with torch.inference_mode(), block_outputs(self.model, features), self._recorded_calls():
            self.output = self.model.output(self.batch.inputs)
        calibration.check_finite(features, index)
        self.shape = features[0].shape  # (batch, tokens, hidden)
        self.rows = calibration.sampled_rows(index, self.batch, self.shape[1])
        self.dense = {
            z: unit_rows(f.reshape(-1, f.shape[-1]).index_select(0, self.rows)) for z, f in features.items()
        }
        self.weights = self.model.task.row_weights(self.batch.inputs)

    @property
    def depth(self) -> int:
        return len(self.model.anatomy.blocks)

    def variants_per_call(self) -> int:
        limit = _TOKENS_PER_CALL["cuda" if self.model.device.type == "cuda" else "cpu"]
        return max(1, limit // (self.shape[0] * self.shape[1]))

    @torch.inference_mode()
    def score(
        self, site: Site, on_units: Callable[[int], None] = lambda _: None, limit: int | None = None
    ) -> Scores:
        """Scores of all units of `site`, or of the first `limit`; `on_units` is told how many each call did."""
        count = site.units if limit is None else min(limit, site.units)
        first_hop = self._broadcast if self._broadcasts(site) else self._expanded
        trajectory, output = [], []
        step = self.variants_per_call()
        for start in range(0, count, step):
            units = torch.arange(start, min(start + step, count), device=self.model.device)
            one, two = self._measure(site, units, first_hop)
            trajectory.append(one)
            output.append(two)
            on_units(len(units))
        if not trajectory:  # a site that an earlier pruning emptied
            return np.zeros((0, len(measured_blocks(site, self.depth)))), np.zeros(0)
        return np.concatenate(trajectory), np.concatenate(output)

    def _measure(self, site: Site, units: Tensor, first_hop: Callable[..., Any]) -> Scores:
        """(trajectory [v, columns], output [v]) of the variants that each lack one of `units`."""
        features: dict[int, Tensor] = {}
        variants = len(units)
        inputs = {k: v.repeat(variants, *[1] * (v.dim() - 1)) for k, v in self.batch.inputs.items()}
        with first_hop(site, units), block_outputs(self.model, features, first=site.block):
            output = self.model.output(inputs)
        columns = []
        for z in measured_blocks(site, self.depth):
            feature = features[z].reshape(variants, -1, features[z].shape[-1])  # (v, batch * tokens, hidden)
            columns.append(relational_change(self.dense[z], unit_rows(feature.index_select(1, self.rows))))
        change = output_change(
            self.output,
            output.view(variants, *self.output.shape),
            self.weights,
            temperature=self.calibration.temperature,
            regression=self.model.task.regression,
        )
        return torch.stack(columns, dim=1).double().cpu().numpy(), change.double().cpu().numpy()

    # ---- two ways into the site's own block ----

    @contextmanager
    def _broadcast(self, site: Site, units: Tensor) -> Iterator[None]:
        """Run the own block once on the dense batch; its consumer's output branches into the variants."""
        hidden = self._own_block(site, units)
        with ExitStack() as stack:
            for index in range(site.block + 1):
                value = hidden.flatten(0, 1) if index == site.block else None
                stack.enter_context(self._stubbed(index, value))
            yield

    def _own_block(self, site: Site, units: Tensor) -> Tensor:
        """Hidden states after the site's block without each of `units`, (v, batch, tokens, hidden)."""
        block = self.model.module.get_submodule(self.model.anatomy.blocks[site.block])
        consumer = self.model.module.get_submodule(site.consumer)
        assert isinstance(consumer, nn.Linear)
        weight = consumer.weight.t().reshape(site.units, site.width, -1)[units]  # (v, width, hidden)

        def branch(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            parts = args[0].unflatten(-1, (site.units, site.width)).index_select(-2, units)
            if site.width == 1:
                removed = parts.movedim(-2, 0) * weight[:, None]  # (v, b, s, 1) * (v, 1, 1, hidden)
            else:
                removed = torch.einsum("bsvw,vwd->vbsd", parts, weight)
            return output - removed

        args, kwargs, _ = self.calls[site.block]
        handle = consumer.register_forward_hook(branch)
        try:
            return hidden_of(block(*args, **kwargs))
        finally:
            handle.remove()

    @contextmanager
    def _expanded(self, site: Site, units: Tensor) -> Iterator[None]:
        """Run the own block on a full batch of variants, masking its consumer's input: works for any block."""
        consumer = self.model.module.get_submodule(site.consumer)
        block = self.model.module.get_submodule(self.model.anatomy.blocks[site.block])
        mask = torch.ones(len(units), site.units, device=units.device, dtype=self.model.dtype)
        mask[torch.arange(len(units)), units] = 0
        mask = mask.repeat_interleave(site.width, dim=1)  # (v, features)
        args, kwargs, _ = self.calls[site.block]
        dense = args[0] if args else kwargs["hidden_states"]
        hidden = dense.repeat(len(units), *[1] * (dense.dim() - 1))

        def apply_mask(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            split = args[0].unflatten(0, (len(units), -1))  # (v, batch, ..., features)
            shaped = mask.view(len(units), *[1] * (split.dim() - 2), -1)
            return ((split * shaped).flatten(0, 1), *args[1:])

        def feed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        with ExitStack() as stack:
            stack.callback(consumer.register_forward_pre_hook(apply_mask).remove)
            stack.callback(block.register_forward_pre_hook(feed, with_kwargs=True).remove)
            for index in range(site.block):
                stack.enter_context(self._stubbed(index, None))
            yield

    def _broadcasts(self, site: Site) -> bool:
        """Whether the own block lets a leading variant dimension through unchanged: tried on one unit."""
        if site.units == 0:
            return False
        one = torch.zeros(1, dtype=torch.long, device=self.model.device)
        try:
            fast = self._own_block(site, one)
        except (RuntimeError, ValueError, IndexError):
            return False  # the block looks at the number of dimensions; the expanded run does not mind
        if fast.dim() != len(self.shape) + 1:
            return False
        found: dict[int, Tensor] = {}
        with self._expanded(site, one), block_outputs(self.model, found, first=site.block):
            self.model.output(self.batch.inputs)
        return bool(torch.allclose(fast[0], found[site.block], rtol=1e-3, atol=1e-4))

    # ---- plumbing ----

    @contextmanager
    def _stubbed(self, index: int, hidden: Tensor | None) -> Iterator[None]:
        """Replace a block: pass the input through (its result is not needed), or give `hidden`."""
        block = self.model.module.get_submodule(self.model.anatomy.blocks[index])
        like = self.calls[index][2]

        def forward(*args: Any, **kwargs: Any) -> Any:
            through = args[0] if args else kwargs["hidden_states"]
            return with_hidden(like, through if hidden is None else hidden)

        block.forward = forward
        try:
            yield
        finally:
            del block.forward

    @contextmanager
    def _recorded_calls(self) -> Iterator[None]:
        """Remember how every block was called, and the shape of what it returned."""
        with ExitStack() as stack:
            for index, path in enumerate(self.model.anatomy.blocks):

                def record(
                    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, index: int = index
                ) -> None:
                    self.calls[index] = (args, kwargs, out)

                block = self.model.module.get_submodule(path)
                stack.callback(block.register_forward_hook(record, with_kwargs=True).remove)
            yield
