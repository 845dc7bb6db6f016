"""Curvature: all units from a few random probes, each one backward pass through the activations.

At the full mask the loss and its gradient are zero, so the leading term of I(u) is the second one, and there
Gauss-Newton is exact: I(u) ~ sum_z ||dR_z/dm_u||^2 + lambda (dy/dm_u)^T H (dy/dm_u). A random sign probe V gives
E[(d<V, R>/dm_u)^2] = ||dR/dm_u||^2 for every unit at once (METHOD section 3). Parameters are frozen: the only
leaves that ask for a gradient are the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optin_cli.models.anatomy import Site
from optin_cli.models.checkpoint import OpenModel
from optin_cli.models.masking import masked
from optin_cli.scoring.calibration import Calibration, Scores, block_outputs
from optin_cli.scoring.losses import output_probe, relation_probe, unit_rows


def curvature(
    calibration: Calibration,
    index: int,
    probes: int,
    sites: Sequence[Site],
    on_probe: Callable[[int], None] = lambda _: None,
) -> dict[str, Scores]:
    """Scores of the units of `sites` on batch `index`: site -> (trajectory [units, 1], output [units]).

    The trajectory column is the sum over all blocks deeper than the unit's.
    """
    model = calibration.model
    batch = calibration.batch(index)
    masks = {s.name: torch.ones(s.units, device=model.device, requires_grad=True) for s in sites if s.units}
    empty: Scores = (np.zeros((0, 1)), np.zeros(0))
    if not masks:
        return {site.name: empty for site in sites}
    leaves = list(masks.values())
    features: dict[int, Tensor] = {}
    own: dict[int, Tensor] = {}
    with torch.enable_grad(), masked(model.module, model.anatomy, masks):
        with block_outputs(model, features):
            output = model.output(batch.inputs)
        with _cut_between_blocks(model), block_outputs(model, own):
            model.output(batch.inputs)
    calibration.check_finite({z: f.detach() for z, f in features.items()}, index)
    rows = calibration.sampled_rows(index, batch, features[0].shape[1])

    def sampled(found: dict[int, Tensor], blocks: int) -> list[Tensor]:
        return [unit_rows(found[z].flatten(0, 1).index_select(0, rows)) for z in range(blocks)]

    depth = len(features)
    deep = sampled(features, depth)
    # The gradient of every feature reaches the units of its own block too. Seen through the graph that is cut
    # between blocks it reaches nothing else, so subtracting that leaves the deeper features alone; the last
    # block has none and keeps its own.
    shallow = sampled(own, depth - 1)
    weights = model.task.row_weights(batch.inputs)
    trajectory = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    change = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    for probe in range(probes):
        again = probe + 1 < probes
        generator = calibration.generator(index, stream=probe + 1)
        seeds = [relation_probe(feature.detach(), generator) for feature in deep]
        seeds += [-seed for seed in seeds[: depth - 1]]
        _add_squares(trajectory, torch.autograd.grad(deep + shallow, leaves, seeds, retain_graph=True))
        value = output_probe(
            output,
            weights,
            generator,
            temperature=calibration.temperature,
            regression=model.task.regression,
        )
        _add_squares(change, torch.autograd.grad(value, leaves, retain_graph=again))
        on_probe(1)
    found = {
        name: ((t / probes).cpu().numpy()[:, None], (c / probes).cpu().numpy())
        for name, t, c in zip(masks, trajectory, change, strict=True)
    }
    return {site.name: found.get(site.name, empty) for site in sites}


@contextmanager
def _cut_between_blocks(model: OpenModel) -> Iterator[None]:
    """Detach what every block receives, so that a gradient stays inside the block it starts in."""

    def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (args[0].detach(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}

    with ExitStack() as stack:
        for path in model.anatomy.blocks:
            block = model.module.get_submodule(path)
            stack.callback(block.register_forward_pre_hook(cut, with_kwargs=True).remove)
        yield


def _add_squares(totals: list[Tensor], gradients: tuple[Tensor, ...]) -> None:
    for total, gradient in zip(totals, gradients, strict=True):
        total += gradient.double().square()
