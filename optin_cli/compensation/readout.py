"""What stands behind the last block: a pooler, a classifier, a projection.

Each of its layers is refitted like a consumer, in the order they run: on what it reads in the pruned model, everything
before it refitted, to what it gives in the dense one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from optin_cli.compensation.equations import Equations, Fitted, left_alone
from optin_cli.compensation.residual import by_example
from optin_cli.compensation.row_sampling import RowChoice
from optin_cli.compensation.settings import Compensation, SiteFit
from optin_cli.compensation.write_back import layer_of
from optin_cli.data.batches import Batch, Batches
from optin_cli.execution.activation_cache import ActivationCache
from optin_cli.execution.block_runs import Place, run_to
from optin_cli.execution.block_streams import BlockRunner
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.structure.layers import is_linear, matrix

_MOST_OUTPUTS = 4_096
"""Of a layer: beyond this it is a vocabulary's, whose rows are too many to fit on what calibration there is."""
_POSITIONS = 256
"""Of an example, at most so many are fitted: neighbours are alike."""


@torch.no_grad()
def readout_layers(model: OpenModel, batch: Batch) -> list[str]:
    """Paths of the linear layers behind the last block that the output depends on, in the order they run.

    Each runs once and shares its weight with no other: an output layer that is tied to the embeddings is theirs. A
    layer that belongs to a site is refitted with its block.
    """
    layers = _candidates(model)
    ran: list[str] = []
    behind: list[str] = []
    last = model.module.get_submodule(model.anatomy.blocks[-1])

    def note(path: str) -> Callable[..., None]:
        def hear(*_: object) -> None:
            ran.append(path)
            behind.append(path)

        return hear

    with ExitStack() as stack:
        stack.callback(last.register_forward_hook(lambda *_: behind.clear()).remove)
        for path, layer in layers.items():
            stack.callback(layer.register_forward_hook(note(path)).remove)
        dense = model.output(batch.inputs)
    once = [path for path in behind if ran.count(path) == 1]
    return [path for path in once if _matters(model, layers[path], batch, dense)]


def _candidates(model: OpenModel) -> dict[str, nn.Module]:
    anatomy, module = model.anatomy, model.module
    inside = tuple(f"{path}." for path in anatomy.blocks)
    of_sites = {path for site in anatomy for path in (site.consumer, *(p.path for p in site.producers))}
    uses = Counter(id(p) for each in module.modules() for p in each._parameters.values() if p is not None)
    return {
        path: layer
        for path, layer in module.named_modules()
        if is_linear(layer)
        and path not in of_sites
        and not path.startswith(inside)
        and uses[id(layer.weight)] == 1
        and len(matrix(layer)) <= _MOST_OUTPUTS
    }


def _matters(model: OpenModel, layer: nn.Module, batch: Batch, dense: Tensor) -> bool:
    """Whether the output changes with what a layer gives: an embedding takes no notice of its pooler."""
    handle = layer.register_forward_hook(lambda _, __, output: output + 1)
    try:
        return not torch.equal(model.output(batch.inputs), dense)
    finally:
        handle.remove()


class Readout:
    """The layers `paths` of the dense and the pruned model, both streams behind the last block."""

    def __init__(
        self,
        model: OpenModel,
        pruned: nn.Module,
        teacher: OpenModel,
        paths: Sequence[str],
        batches: Batches,
        rows: RowChoice,
        store: ActivationCache,
    ) -> None:
        self.model, self.pruned, self.teacher = model, pruned, teacher
        self.paths, self.batches, self.rows, self.store = paths, batches, rows, store

    def read_dense(self, index: int, dense: BlockRunner) -> None:
        """Keep what the dense layers give on a batch."""
        given = {Place(path, 0, None): path for path in self.paths}
        found = self._seen(self.teacher.module, given, index, dense)
        for place, path in given.items():
            self.store["readout", path, index] = found[place]

    def by_example(self) -> list[str]:
        """The layers whose rows are those of examples: (examples, d) or (examples, positions, d)."""
        count = len(self.batches.ids(0))
        shapes = {path: self.store["readout", path, 0].shape for path in self.paths}
        return [path for path, shape in shapes.items() if len(shape) in (2, 3) and shape[0] == count]

    def equations(self, path: str, settings: Compensation) -> Equations[Fitted]:
        """Those of one layer, still empty."""
        layer = layer_of(self.pruned, path)
        gain = torch.ones(len(matrix(layer)), dtype=torch.float64, device=self.model.device)
        target = Fitted(name=path, path=path, where=path, gain=gain)
        return Equations([layer], [target], self.model.device, settings)

    def gather(self, equations: Equations[Fitted], index: int, ours: BlockRunner) -> None:
        """Add what the layer reads on a batch of the pruned model, and what its outputs lack."""
        path, count = equations.targets[0].path, len(self.batches.ids(index))
        places = Place(path, 0, 0), Place(path, 0, None)
        found = self._seen(self.pruned, places, index, ours)
        dense = self.store.pop(("readout", path, index)).to(self.model.device)
        x, own, there = (
            by_example(part.to(equations.dtype), count) for part in (*(found[p] for p in places), dense)
        )
        weight = self._weights(index, own[..., 0])
        few = _spread(own.shape[1]).to(own.device)
        x, own, there, weight = (part[:, few] for part in (x, own, there, weight))
        equations.add(x, [there - own], weight, [there], self.rows.held_out(index, like=weight))

    def _seen(
        self, module: nn.Module, places: Collection[Place], index: int, stream: BlockRunner
    ) -> dict[Place, Tensor]:
        batch = self.batches[index].to(self.model.device, self.model.dtype)
        return run_to(lambda: stream.finish(index, batch), module, places, stop=True)

    def _weights(self, index: int, like: Tensor) -> Tensor:
        """Those of the last block's tokens, where these are its tokens; else the root of an example's length.

        Joined texts are few and long. With one weight for each example they are lost, and longer texts come out worse
        than without the refit; with the length itself there are hardly more than those to fit.
        """
        last = len(self.model.anatomy.blocks) - 1
        valid = self.rows.valid[index][self.model.anatomy.stream_of(last).mask]
        if valid is None:
            return torch.ones_like(like)
        if valid.shape != like.shape:
            return valid.sum(1, keepdim=True).to(like).sqrt().expand(like.shape)
        return self.rows.weights(last, index, like, in_order=True)


def not_by_example(path: str) -> SiteFit:
    """The record of a layer whose rows are not those of examples."""
    return left_alone(path, path, "its rows are not positions of the examples")


def _spread(positions: int) -> Tensor:
    return torch.linspace(0, positions - 1, min(positions, _POSITIONS)).round().long()
