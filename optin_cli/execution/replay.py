"""Run the deeper part of a model again and again, for many variants at once, from one recorded dense pass.

A unit of block l leaves the blocks before it untouched, so a run starts at block l from its recorded input.
Inside block l the change is rank one at the consumer, y - a_u w_u^T: the consumer's output is broadcast to all
variants there. With `reduced` products the deeper blocks compute only what changed: a Linear gives
y + W (x - x0) with x0, y the dense input and output, so that rounding costs digits of the small change alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optin_cli.data.batches import Batch
from optin_cli.execution.hooks import block_outputs, on_blocks
from optin_cli.execution.memory import ran_out
from optin_cli.execution.precision import reduced_products
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.anatomy import Site
from optin_cli.structure.hidden_states import as_rows, hidden_argument, hidden_of, output_with, with_hidden
from optin_cli.structure.layers import is_linear, matrix

Call = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Arguments, keyword arguments and result of a block."""


class Replay:
    """One piece of a batch: its dense pass, and passes in which every variant lacks one unit."""

    def __init__(self, model: OpenModel, piece: Batch, reduced: bool = False) -> None:
        self.model = model
        self.reduced = reduced
        self.piece = piece
        self.blocks = [model.module.get_submodule(path) for path in model.anatomy.blocks]
        self.calls: dict[int, Call] = {}
        self.linears: dict[nn.Linear, tuple[Tensor, Tensor]] = {}
        self.features: dict[int, Tensor] = {}
        with torch.inference_mode(), self._recorded(), block_outputs(model, self.features):
            self.output = model.output(piece.inputs)  # (examples, rows, classes)

    @torch.inference_mode()
    def run(self, site: Site, units: Tensor, broadcast: bool) -> tuple[dict[int, Tensor], Tensor]:
        """Without each of `units` in turn: features of the blocks from the site's own on, block ->
        (v, examples, tokens, d), and the output (v, examples, rows, classes)."""
        found: dict[int, Tensor] = {}
        count = len(units)
        inputs = {k: v.repeat(count, *[1] * (v.dim() - 1)) for k, v in self.piece.inputs.items()}
        first_hop = self._broadcast if broadcast else self._expanded
        with (
            first_hop(site, units),
            self._deltas(site.block + 1),
            block_outputs(self.model, found, site.block),
        ):
            output = self.model.output(inputs)
        return (
            {z: f.unflatten(0, (count, -1)) for z, f in found.items()},
            output.unflatten(0, (count, -1)),
        )

    def _consumer(self, site: Site) -> nn.Module:
        return self.model.module.get_submodule(site.consumer)

    @torch.inference_mode()
    def broadcasts(self, site: Site) -> bool:
        """Return whether the site's block lets a leading variant dimension through unchanged: tried on one unit."""
        if site.units == 0 or site.masked_at or not self.model.anatomy.chained:
            return False
        if not is_linear(self._consumer(site)):
            return False
        if self.model.anatomy.uses(site.block) > 1:
            return False  # the change is made again in deeper blocks
        one = torch.zeros(1, dtype=torch.long, device=self.model.device)
        try:
            fast = self._own_block(site, one)
        except (RuntimeError, ValueError, IndexError) as error:
            if ran_out(error):
                raise
            return False  # the block looks at the number of dimensions; the expanded run does not mind
        if fast.dim() != hidden_of(self.calls[site.block][2]).dim() + 1:
            return False
        fast = as_rows(fast, self.model.anatomy.stream_of(site.block).layout)
        found, _ = self.run(site, one, broadcast=False)
        return bool(torch.allclose(fast, found[site.block], rtol=1e-3, atol=1e-4))

    # ---- two ways into the site's own block ----

    @contextmanager
    def _broadcast(self, site: Site, units: Tensor) -> Iterator[None]:
        """Run the own block once on the dense piece; its consumer's output branches into the variants."""
        hidden = self._own_block(site, units)
        with ExitStack() as stack:
            for index in range(site.block + 1):
                value = hidden.flatten(0, 1) if index == site.block else None
                if self.blocks[index] not in self.blocks[:index]:
                    stack.enter_context(self._stubbed(index, value))
            yield

    def _own_block(self, site: Site, units: Tensor) -> Tensor:
        """Hidden states after the site's block without each of `units`, (v, examples, tokens, d)."""
        consumer = self._consumer(site)
        weight = matrix(consumer).t().reshape(site.units, site.width, -1)[units]  # (v, width, d)

        def branch(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            parts = args[0].unflatten(-1, (site.units, site.width)).index_select(-2, units)
            if site.width == 1:
                removed = parts.movedim(-2, 0) * weight[:, None]  # (v, b, s, 1) * (v, 1, 1, d)
            else:
                removed = torch.einsum("bsvw,vwd->vbsd", parts, weight)
            return output - removed

        args, kwargs, _ = self.calls[site.block]
        handle = consumer.register_forward_hook(branch)
        try:
            return hidden_of(self.blocks[site.block](*args, **kwargs))
        finally:
            handle.remove()

    @contextmanager
    def _expanded(self, site: Site, units: Tensor) -> Iterator[None]:
        """Run the own block on a full batch of variants, masking one unit in each: works for any block.

        Where blocks are not chained, all of them run.
        """
        entry = self.model.module.get_submodule(site.entry)
        mask = torch.ones(len(units), site.units, device=units.device, dtype=self.model.dtype)
        mask[torch.arange(len(units)), units] = 0
        mask = mask.repeat_interleave(site.width, dim=1)  # (v, features)
        args, kwargs, _ = self.calls[site.block]
        dense = hidden_argument(args, kwargs)
        hidden = dense.repeat(len(units), *[1] * (dense.dim() - 1))

        def apply_mask(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # (v, examples, ..., features)
            split = args[0].movedim(site.batch_axis, 0).unflatten(0, (len(units), -1))
            shaped = mask.view(len(units), *[1] * (split.dim() - 1 + site.axis), -1, *[1] * (-site.axis - 1))
            return ((split * shaped).flatten(0, 1).movedim(0, site.batch_axis), *args[1:])

        def feed(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return with_hidden((args, kwargs), hidden) if index == site.block else None

        with ExitStack() as stack:
            if self.model.anatomy.chained:
                # the block may be the entry itself: first fed, then masked
                stack.enter_context(
                    on_blocks(self.model.module, self.model.anatomy.blocks, feed, before=True)
                )
                for index in range(site.block):
                    if self.blocks[index] not in self.blocks[:index]:
                        stack.enter_context(self._stubbed(index, None))
            stack.callback(entry.register_forward_pre_hook(apply_mask).remove)
            yield

    @contextmanager
    def _stubbed(self, index: int, hidden: Tensor | None) -> Iterator[None]:
        """Replace a block: give anything of the right shape (its result is not needed), or `hidden`."""
        like = self.calls[index][2]
        shape = hidden_of(like).shape[1:]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if hidden is not None:
                return output_with(like, hidden)
            through = hidden_argument(args, kwargs)
            if through.shape[1:] != shape:
                through = through.new_zeros(()).expand(len(through), *shape)
            return output_with(like, through)

        with _replaced(self.blocks[index], forward):
            yield

    # ---- the deeper blocks ----

    @contextmanager
    def _deltas(self, first: int) -> Iterator[None]:
        """Let every Linear of the blocks `first`.. compute its change from the dense pass, in reduced products."""
        changes = _Changes()
        with ExitStack() as stack:
            for block in self.blocks[first:]:
                for linear in block.modules():
                    if isinstance(linear, nn.Linear) and linear in self.linears:
                        delta = _Delta(linear, *self.linears[linear], changes)
                        stack.enter_context(_replaced(linear, delta))
            yield

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Remember how every block was called and what it returned; input and output of every Linear in them."""
        seen: set[nn.Module] = set()

        def record(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self.calls[index] = (args, kwargs, out)

        with ExitStack() as stack:
            stack.enter_context(on_blocks(self.model.module, self.model.anatomy.blocks, record))
            for block in dict.fromkeys(self.blocks[1:] if self.reduced else ()):
                for linear in block.modules():
                    if type(linear) is nn.Linear:
                        stack.callback(linear.register_forward_hook(self._record_linear(seen)).remove)
            yield

    def _record_linear(self, seen: set[nn.Module]) -> Any:
        def record(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(linear, nn.Linear)
            if linear in seen:  # called twice in a pass: no one dense input to take the change from
                self.linears.pop(linear, None)
                return
            seen.add(linear)
            self.linears[linear] = (args[0], output)

        return record


class _Changes:
    """The change of the last input seen: query, key and value read the same one."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor, Tensor] | None = None

    def of(self, x: Tensor, dense: Tensor) -> Tensor:
        """x - dense, (v, lead, ..., features) of x (v * lead, ..., features)."""
        if self.last is None or self.last[0] is not x or self.last[1] is not dense:
            self.last = x, dense, x.unflatten(0, (-1, dense.shape[0])) - dense
        return self.last[2]


class _Delta:
    """y + W (x - x0): what a Linear gives for variants x of its dense input x0."""

    def __init__(self, linear: nn.Linear, dense: Tensor, result: Tensor, changes: _Changes) -> None:
        self.linear = linear
        self.dense = dense
        self.result = result
        self.changes = changes

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.dense.shape[1:] or x.shape[0] % self.dense.shape[0]:
            return F.linear(x, self.linear.weight, self.linear.bias)
        with reduced_products(x.device):
            product = F.linear(self.changes.of(x, self.dense), self.linear.weight)
        return product.add_(self.result).flatten(0, 1)


@contextmanager
def _replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
