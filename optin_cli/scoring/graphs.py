"""The graph of a batch, recorded piece by piece, each small enough for the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from optin_cli.data.batches import Batch
from optin_cli.execution.hooks import block_outputs, on_blocks
from optin_cli.execution.memory import ran_out
from optin_cli.execution.precision import reduced_products
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.scoring.calibration import Calibration
from optin_cli.structure.anatomy import Site
from optin_cli.structure.hidden_states import hidden_argument, with_hidden

T = TypeVar("T")


@dataclass
class Graph:
    """One piece of a batch with its autograd graph: consumers' inputs are the leaves of interest."""

    piece: Batch
    inputs: dict[str, list[Tensor]]
    """Site name -> what its mask multiplies, at each use of the module that blocks share: as a rule its consumer's
    input, (examples * windows, tokens, features)."""
    features: dict[int, Tensor]
    output: Tensor
    chained: bool = True
    """Whether every requested output depends on every site before it."""

    def gradients(
        self, source: Tensor, seed: Tensor, sites: Sequence[Site], reduced: bool = True
    ) -> list[Tensor]:
        """d<seed, source>/dm_u for each example, site after site: (examples, units).

        `reduced` products round more where that is faster: a random seed hides it.
        """
        leaves = [leaf for site in sites for leaf in self.inputs[site.name]]
        with reduced_products(source.device, reduced):
            # a use in a deeper block than the source has no part in it
            partly = not self.chained or len(leaves) > len(sites)
            found = torch.autograd.grad(source, leaves, seed, retain_graph=True, materialize_grads=partly)
        owners = (site for site in sites for _ in self.inputs[site.name])
        sums: dict[str, Tensor] = {}
        for site, gradient, value in zip(owners, found, leaves, strict=True):
            part = self._of_units(gradient, value, site)
            sums[site.name] = part + sums[site.name] if site.name in sums else part
        return [sums[site.name] for site in sites]

    def _of_units(self, gradient: Tensor, value: Tensor, site: Site) -> Tensor:
        """Masking multiplies h: dq/dm_u = sum of (dq/dh * h) over positions and features."""
        product = (gradient * value.detach()).movedim(site.axis, -1).movedim(site.batch_axis, 0)
        product = product.reshape(len(self.piece), -1, site.units, site.width)
        return product.sum((1, 3), dtype=torch.float32)  # (examples, units)


def record_graph(model: OpenModel, piece: Batch, sites: Sequence[Site]) -> Graph:
    """Run a piece so that gradients reach the consumers' inputs. Weights stay frozen."""
    features: dict[int, Tensor] = {}
    inputs: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    with torch.enable_grad(), _tapped(model, sites, inputs), block_outputs(model, features):
        output = model.output(piece.inputs)
    return Graph(piece, inputs, features, output, model.anatomy.chained)


@contextmanager
def _tapped(model: OpenModel, sites: Sequence[Site], inputs: dict[str, list[Tensor]]) -> Iterator[None]:
    """Start the graph at the first input of each stream and collect the inputs of the sites' consumers."""
    starts = {stream.first for stream in model.anatomy.streams}

    def begin(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = hidden_argument(args, kwargs)
        if index not in starts or hidden.requires_grad:  # it comes from an earlier stream
            return None
        return with_hidden((args, kwargs), hidden.detach().requires_grad_())

    with ExitStack() as stack:
        stack.enter_context(on_blocks(model.module, model.anatomy.blocks, begin, before=True))
        for site in sites:

            def tap(_: nn.Module, args: tuple[Tensor, ...], name: str = site.name) -> None:
                inputs[name].append(args[0])

            entry = model.module.get_submodule(site.entry)
            stack.callback(entry.register_forward_pre_hook(tap).remove)
        yield


def in_pieces(
    calibration: Calibration,
    index: int,
    sites: Sequence[Site],
    run: Callable[[list[Batch]], T],
    *,
    beside: int = 0,
) -> T:
    """`run` of the pieces of batch `index`; again, of smaller ones, when it runs out of memory.

    Pieces leave room for `beside` copies of the sampled rows of all features. Raises `InputError` when not even one
    example fits.
    """
    row = 0  # bytes of one row of all features

    def work(one: Batch) -> None:
        nonlocal row
        graph = record_graph(calibration.model, one, sites)
        row = sum(4 * feature.shape[-1] for feature in graph.features.values())
        graph.gradients(graph.output, torch.ones_like(graph.output), sites)

    calibration.measure_graph(work, lambda: row * calibration.rows * beside)
    while True:
        try:
            return run(calibration.pieces(index, calibration.graph_slots))
        except RuntimeError as error:
            if not ran_out(error):
                raise
            calibration.halve_graph(index, error)
        if torch.cuda.is_available():  # here nothing of the failed try is held any more
            torch.cuda.empty_cache()
