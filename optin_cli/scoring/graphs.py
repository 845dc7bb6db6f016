"""The graph of a batch, recorded piece by piece, each small enough for the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from optin_cli.data.batches import Batch
from optin_cli.execution.hooks import block_outputs, on_blocks
from optin_cli.execution.memory import ran_out
from optin_cli.execution.precision import reduced_products, rounds_on_cpu
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.scoring.calibration import Calibration
from optin_cli.structure.anatomy import DIMENSIONS, NCHW, NHWC, Site
from optin_cli.structure.hidden_states import as_rows, hidden_argument, with_hidden
from optin_cli.transforms.slicing import kept_features, part_rows

T = TypeVar("T")

_SHORT = 512
"""Positions up to which attention is recorded as plain products: they keep a number for every pair of positions, and
from about 1,024 on the fused kernel is the faster one."""


@dataclass
class Leaf:
    """A tensor that the mask of a site multiplies."""

    value: Tensor
    """(examples * windows, tokens, features)"""
    features: Tensor | None = None
    """Those of the units, unit after unit; None: all of them, as they lie."""


@dataclass
class Graph:
    """One piece of a batch with its autograd graph: consumers' inputs are the leaves of interest."""

    piece: Batch
    inputs: dict[str, list[Leaf]]
    """Site name -> what its mask multiplies, at each use of the module that blocks share: as a rule its consumer's
    input; of dimensions of heads the queries, too."""
    features: dict[int, Tensor]
    output: Tensor
    chained: bool = True
    """Whether every requested output depends on every site before it."""

    def gradients(
        self,
        sources: Sequence[Tensor],
        seeds: Sequence[Tensor],
        sites: Sequence[Site],
        *,
        reduced: bool = True,
        partly: bool = False,
    ) -> list[Tensor]:
        """d(sum of <seed, source>)/dm_u for each example, site after site: (examples, units). Of dimensions of heads
        those of each dimension and all behind it.

        `reduced` products round more where that is faster: a random seed hides it. `partly`: the sources may not
        depend on every site; it is an error otherwise.
        """
        leaves = [leaf for site in sites for leaf in self.inputs[site.name]]
        with reduced_products(sources[0].device, reduced):
            # a use in a deeper block than the source has no part in it
            partly = partly or not self.chained or len(leaves) > len(sites)
            values = [leaf.value for leaf in leaves]
            found = torch.autograd.grad(sources, values, seeds, retain_graph=True, allow_unused=partly)
        owners = (site for site in sites for _ in self.inputs[site.name])
        sums: dict[str, Tensor] = {}
        for site, gradient, leaf in zip(owners, found, leaves, strict=True):
            part = self._of_units(gradient, leaf, site)
            sums[site.name] = part + sums[site.name] if site.name in sums else part
        return [_from_each_on(sums[s.name]) if s.kind == DIMENSIONS else sums[s.name] for s in sites]

    def _of_units(self, gradient: Tensor | None, leaf: Leaf, site: Site) -> Tensor:
        """Masking multiplies h: dq/dm_u = sum of (dq/dh * h) over positions and features; None: it is zero."""
        if gradient is None:
            return leaf.value.new_zeros(len(self.piece), site.units, dtype=torch.float32)
        product = (gradient * leaf.value.detach()).movedim(site.axis, -1).movedim(site.batch_axis, 0)
        if leaf.features is not None:
            product = product.index_select(-1, leaf.features.to(product.device))
        product = product.reshape(len(self.piece), -1, site.units, site.width)
        return product.sum((1, 3), dtype=torch.float32)  # (examples, units)


def _from_each_on(gradients: Tensor) -> Tensor:
    """Sums over each unit and all behind it: (examples, units)."""
    return gradients.flip(1).cumsum(1).flip(1)


def record_graph(model: OpenModel, piece: Batch, sites: Sequence[Site]) -> Graph:
    """Run a piece so that gradients reach the consumers' inputs. Weights stay frozen."""
    features: dict[int, Tensor] = {}
    inputs: dict[str, list[Leaf]] = {site.name: [] for site in sites}
    with torch.enable_grad(), _tapped(model, sites, inputs), block_outputs(model, features):
        output = model.output(piece.inputs)
    return Graph(piece, inputs, features, output, model.anatomy.chained)


@contextmanager
def _tapped(model: OpenModel, sites: Sequence[Site], inputs: dict[str, list[Leaf]]) -> Iterator[None]:
    """Start the graph at the first input of each stream and collect what the sites' masks multiply."""
    starts = {stream.first for stream in model.anatomy.streams}

    def begin(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = hidden_argument(args, kwargs)
        if index not in starts or hidden.requires_grad:  # it comes from an earlier stream
            return None
        if _rounds_by_head(hidden, model.anatomy.stream_of(index).layout):
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return with_hidden((args, kwargs), hidden.detach().requires_grad_())

    with ExitStack() as stack:
        stack.enter_context(on_blocks(model.module, model.anatomy.blocks, begin, before=True))
        for site in sites:
            context = queries = None
            if site.kind == DIMENSIONS:
                context, queries = dimension_features(site)
                query = model.module.get_submodule(site.attended[0][0].path)

                def see(
                    _: nn.Module, __: Any, output: Tensor, name: str = site.name, of: Any = queries
                ) -> None:
                    inputs[name].append(Leaf(output, of))

                stack.callback(query.register_forward_hook(see).remove)

            def tap(_: nn.Module, args: tuple[Tensor, ...], name: str = site.name, of: Any = context) -> None:
                inputs[name].append(Leaf(args[0], of))

            entry = model.module.get_submodule(site.entry)
            stack.callback(entry.register_forward_pre_hook(tap).remove)
        yield


def _rounds_by_head(hidden: Tensor, layout: str) -> bool:
    """Whether the fused attention of a CPU would lose by `reduced_products`, for such hidden states.

    Its backward pass multiplies the small matrices of one head after the other, and to round them takes longer than all
    else: with AMX 84 ms for 7, of 32 texts of 13 tokens. Of maps attention sees windows alone, which are small.
    """
    short = layout in (NHWC, NCHW) or as_rows(hidden, layout).shape[-2] <= _SHORT
    return short and rounds_on_cpu(hidden.device)


def dimension_features(site: Site) -> tuple[Tensor, Tensor]:
    """Of a site of dimensions: the features of the consumer's input, and of the layer that makes the queries,
    dimension after dimension and in each head after head."""
    heads = replace(site, units=site.width, width=site.units)
    everything = torch.arange(heads.units)
    found = kept_features(heads, everything), part_rows(heads, *heads.attended[0], everything)
    context, queries = (features.view(heads.units, heads.width).t().flatten() for features in found)
    return context, queries


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
        graph.gradients([graph.output], [torch.ones_like(graph.output)], sites)

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
