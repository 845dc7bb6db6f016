"""Curvature: all units from a few random probes, each a backward pass through the activations alone.

At the full mask the loss and its gradient are zero, so the leading term of I(u) is the second one, and there
Gauss-Newton is exact: I(u) ~ sum_z ||dR_z/dm_u||^2 + lambda (dy/dm_u)^T H (dy/dm_u). For a random sign matrix V
E[(d<V, R>/dm_u)^2] = ||dR/dm_u||^2, for every unit at once (docs/method.md, section 3).

A probe is one backward pass from the output and one from every stratum, a run of blocks whose features share a pass.
Their signs are unrelated, so that the square of the joint gradient still has the sum over the blocks as its mean. A
unit's block stays out of its trajectory: the part that comes from it takes a pass through that block alone and is
subtracted. Where every stratum is one block there is nothing to subtract, and every deeper block has a separate column;
but then the passes grow with the square of the depth. The gradient splits into one part an example, because examples
meet in no activation; squares are taken of the parts. That drops what two examples share, but also the products of
their unrelated signs, which are most of the scatter.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from optin_cli.data.batches import Batch
from optin_cli.execution.hooks import block_outputs
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.scoring.calibration import Calibration, gather_rows, mean_tokens
from optin_cli.scoring.graphs import in_pieces, record_graph
from optin_cli.scoring.losses import draw_signs, output_probe, relation_probe
from optin_cli.scoring.methods.ablation import AblationMethod
from optin_cli.scoring.methods.base import MOST_PROBES, Arrays, Item, Measured, OnWork, item_scores
from optin_cli.scoring.methods.trajectory import TrajectoryMethod
from optin_cli.scoring.passes import Pass, ProbeSums, Tally
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.structure.anatomy import BESIDE, SUBLAYERS, Site

log = logging.getLogger("optin")

_PROBES_AT_ONCE = 8  # seeds of so many are held; the graph is recorded once for all of them
_SEEDS = 1 << 26  # and of the output so many numbers: a language model's rows are long
# MACs of a block, of all probes in one backward pass. Beyond this a GPU is busy for longer than its kernels take to be
# launched, and copies would only cost forwards: on an H200 8 probes of BERT-base take 0.74 s without copies, 0.55 s at
# 2^36, 0.52 s at 2^37, 0.56 s at 2^38 and 2^39. A CPU is always busy.
_WORK_PER_CALL = {"cuda": 1 << 37}
_IMPOSSIBLE = -1e4  # a logit: what question answering gives to padding
_OWN_PASSES = 10  # up to so many blocks each has a pass of its own by default: strata would save little
_STRATA = 3  # of deeper models
_WHOLE = 16  # examples on which whole sublayers are ablated, at least: what they cost differs by orders of magnitude


class CurvatureMethod(TrajectoryMethod):
    """Estimates all units at once; scores those near a cut by ablation, if asked to."""

    name = "curvature"
    takes_band = True
    takes_ranks = True
    takes_strata = True
    takes_sublayers = True
    spreads = True
    sketches = ("tr", "or")
    ablated: ClassVar[frozenset[str]] = frozenset()
    """Kinds of units that are scored by ablation instead."""

    def __init__(
        self, calibration: Calibration, settings: ScoreSettings, labels: list[Any] | None = None
    ) -> None:
        super().__init__(calibration, settings, labels)
        self.ablation = AblationMethod(calibration, settings)
        alone = _lone(self.model)
        self.wholes = [site for site in self.anatomy if site.kind == SUBLAYERS]
        self.exact = [s for s in self.anatomy if s.kind in self.ablated or s.name in alone]
        self.estimated = [s for s in self.anatomy if s not in self.exact and s not in self.wholes]
        self.few = _few(calibration)
        """Batches on which whole sublayers are ablated."""
        self._probed, self._banded = 0, False
        """Probes asked for so far, and whether the band was."""

    @classmethod
    def engines(cls) -> dict[str, str]:
        curved = dict.fromkeys(cls.kinds, CurvatureMethod.name)
        return curved | dict.fromkeys(cls.ablated, AblationMethod.name)

    @classmethod
    def facts(cls, model: OpenModel) -> dict[str, Any]:
        return {"lone_units": AblationMethod.name} if _lone(model) else {}

    @classmethod
    def shared_passes(cls, strata: int | None, depth: int) -> int | None:
        count = strata or (_STRATA if depth > _OWN_PASSES else depth)
        return count if count < depth else None

    def items(self) -> list[Item]:
        batches = range(len(self.calibration))
        exact = [
            item
            for batch in batches
            for site in (*self.exact, *(self.wholes if batch in self.few else ()))
            for item in self.ablation.items_of(batch, site)
        ]
        return exact if self.settings.rel_error is not None else exact + self._probes(0, self.settings.probes)

    def more_items(self, measured: Measured) -> list[Item]:
        return self._more_probes(measured) or self._band(measured)

    def _probes(self, first: int, stop: int) -> list[Item]:
        """Probes `first`..`stop` of every batch."""
        self._probed = stop
        work = self._work(stop - first, self._features())
        return [
            Item(CurvatureMethod.name, batch, probes=(first, stop), estimates=True, work=work)
            for batch in range(len(self.calibration))
            if self.estimated
        ]

    def _features(self) -> list[int]:
        """Blocks whose features are in some trajectory."""
        return sorted({block for site in self.estimated for block in self.columns(site)})

    def _strata(self, within: Collection[int] | None = None) -> list[tuple[int, ...]]:
        """The measured blocks, cut in order into runs of nearly equal length; those `within` some blocks."""
        blocks = np.array(self._features(), dtype=int)
        count = min(self.settings.strata or len(blocks), len(blocks))
        runs = [tuple(run.tolist()) for run in np.array_split(blocks, count)] if count else []
        return [run for run in runs if within is None or set(run) <= set(within)]

    def _work(self, probes: int, blocks: Sequence[int]) -> float:
        """Forward passes that as many probes of these blocks' features take.

        A pass without a graph, one with it for every few probes, and of each probe a backward pass from the output and
        one from every stratum, through what lies before its last block and once more through each of its blocks alone.
        """
        depth = len(self.anatomy.blocks)
        probed = self._strata(blocks)
        back = sum(stratum[-1] + 1 + (len(stratum) if len(stratum) > 1 else 0) for stratum in probed)
        return 1 + -(-probes // _PROBES_AT_ONCE) + probes * (1 + back / depth)

    def samples(self, item: Item) -> tuple[Item, Item]:
        """One probe of the output, and one of two strata besides: the others take as long by depth."""
        if item.engine != CurvatureMethod.name:
            return super().samples(item)
        first, every = item.probes[0], self._strata()
        some_strata = dict.fromkeys(every[place * len(every) // 4] for place in (1, 3) if every)
        few = tuple(block for stratum in some_strata for block in stratum)
        none, some = (
            replace(item, probes=(first, first + 1), blocks=blocks, work=self._work(1, blocks))
            for blocks in ((), few)
        )
        return none, some

    def _more_probes(self, measured: Measured) -> list[Item]:
        """Probe until the relative error is reached: it falls with the root of the number of probes."""
        target, done = self.settings.rel_error, self._probed
        if target is None or self._banded or not self.estimated:
            return []
        wanted = 2  # one probe has no scatter
        if done:
            error = measured.probing_error()
            wanted = min(max(done + 1, round(0.8 * done * (error / target) ** 2)), 2 * done, MOST_PROBES)
            if error <= target or wanted == done:
                log.info("%d probes a batch: the scores' relative error from probing is %.3f", done, error)
                return []
        return [item for probe in range(done, wanted) for item in self._probes(probe, probe + 1)]

    def _band(self, measured: Measured) -> list[Item]:
        """Ablation of the estimated units near the cut."""
        band, flops = self.settings.exact_band, self.settings.band_flops
        if band is None or flops is None or self._banded:
            return []
        self._banded = True
        found = [site for site in measured.sites() if site.kind not in BESIDE]
        scores, tokens = self.combine(found), mean_tokens(self.calibration)
        units = [site for site in self.anatomy if site.kind not in BESIDE]
        near = near_the_cut(units, scores, flops, band, tokens)
        return [
            item
            for batch in range(len(self.calibration))
            for site in self.estimated
            if site.name in near
            for item in self.ablation.items_of(batch, site, near[site.name])
        ]

    def run(self, item: Item, on_work: OnWork) -> Arrays:
        if item.engine == self.ablation.name:
            return self.ablation.run(item, on_work)
        self.release()
        # units that ablation scores are probed, too: the sketch is of all
        sketched = self.sketched_probes()
        sites = [site for site in self.anatomy if site not in self.wholes] if sketched else self.estimated
        probes = range(*item.probes)
        each = item.work / len(probes)
        passes = self._strata(item.blocks)
        found = curvature(
            self.calibration, item.batch, sites, probes, sketched, lambda n: on_work(n * each), passes
        )
        kept = sketched > probes.start
        return item_scores(
            found.output,
            found.trajectory,
            trajectory_rows=found.trajectory_rows if kept else None,
            output_rows=found.output_rows if kept else None,
        )

    def weight(self, item: Item) -> float:
        share = super().weight(item)
        if any(site.name == item.site for site in self.wholes):
            share /= sum(self.calibration.weight(batch) for batch in self.few)
        return share

    def release(self) -> None:
        self.ablation.release()


def curvature(
    calibration: Calibration,
    index: int,
    sites: Sequence[Site],
    probes: range,
    sketched: int = 0,
    on_probe: Callable[[int], None] = lambda _: None,
    passes: Sequence[tuple[int, ...]] | None = None,
) -> ProbeSums:
    """Probe batch `index` with every number of `probes`, which also seeds its signs.

    Gradients of the probes with a number below `sketched` are kept as rows. `passes` are the strata whose features are
    probed, by default every block by itself.
    """
    sites = [site for site in sites if site.units]
    reported = 0

    def report(done: int) -> None:
        nonlocal reported
        if done > reported:  # a second try reports nothing twice
            on_probe(done - reported)
            reported = done

    return in_pieces(
        calibration,
        index,
        sites,
        lambda pieces: _probed(calibration, index, pieces, sites, probes, sketched, report, passes),
        beside=1 + min(len(probes), _PROBES_AT_ONCE),
    )


def _probed(
    calibration: Calibration,
    index: int,
    pieces: list[Batch],
    sites: Sequence[Site],
    probes: range,
    sketched: int,
    report: Callable[[int], None],
    passes: Sequence[tuple[int, ...]] | None,
) -> ProbeSums:
    model = calibration.model
    depth = len(model.anatomy.blocks)
    kept = len(probes[: max(0, sketched - probes.start)])
    tally = Tally(sites, len(calibration.batches.ids(index)), depth, kept)
    passes = [(z,) for z in range(depth)] if passes is None else passes
    shared = [p for stratum in passes if (p := Pass.of(stratum, sites, tally.columns)).sites]
    measured = sorted({z for one in shared for z in one.blocks})
    dense = _DensePass(calibration, index, pieces, measured)
    at_once = max(1, min(_PROBES_AT_ONCE, _SEEDS // max(1, sum(o.numel() for o in dense.outputs))))
    for group in _chunks(probes, _PROBES_AT_ONCE):
        generators = [calibration.generator(index, stream=probe + 1) for probe in group]
        with _drawn(generators, dense.draw, model.device) as drawn:
            for chunk in _chunks(group, at_once):
                seeds = [dense.seeds(next(drawn)) for _ in chunk]
                first = 0  # example
                for number, piece in enumerate(pieces):
                    copies = _copies(calibration, piece, dense.tokens[number], len(chunk))
                    # one piece at a time: that bounds the memory
                    graph = record_graph(model, piece.repeated(copies), sites)
                    with torch.enable_grad():
                        unit = {
                            z: gather_rows(
                                graph.features[z].unflatten(0, (copies, -1)), dense.rows[z][number]
                            )
                            for z in measured
                        }
                    for start in range(0, len(chunk), copies):
                        some = seeds[start : start + copies]
                        place = chunk[start] - probes.start, first
                        for one in shared:
                            seeds_of = {
                                z: torch.stack([features[z][number] for features, _ in some])
                                for z in one.blocks
                            }
                            found = one.gradients(graph, unit, seeds_of)
                            tally.add_features(one, _by_probe(found, copies), place)
                        seed = torch.cat([output[number] for _, output in some])
                        found = graph.gradients([graph.output], [seed], sites)
                        tally.add_output(sites, _by_probe(found, copies), place)
                    first += len(piece)
                    del graph, unit  # before the next piece's graph is made
                report(chunk[-1] + 1 - probes.start)
    return tally.result


def _by_probe(gradients: Sequence[Tensor], copies: int) -> list[Tensor]:
    return [gradient.unflatten(0, (copies, -1)) for gradient in gradients]


def _chunks(probes: range, size: int) -> list[range]:
    return [probes[start : start + size] for start in range(0, len(probes), size)]


def _copies(calibration: Calibration, piece: Batch, tokens: int, probes: int) -> int:
    """Return how many probes share one backward pass, each with a copy of `piece` in the graph; a divisor of `probes`.

    On a GPU as many as keep it busy while the next kernels are launched, and as fit into memory.
    """
    most = _WORK_PER_CALL.get(calibration.model.device.type, 0) // max(
        1, tokens * _block_weights(calibration)
    )
    if calibration.graph_slots is not None:
        most = min(most, calibration.graph_slots // max(1, piece.slots))
    return max(n for n in range(1, probes + 1) if n == 1 or (probes % n == 0 and n <= most))


def _block_weights(calibration: Calibration) -> int:
    """Numbers in the weights of a block, in the mean: about the MACs of a token in it."""
    module, blocks = calibration.model.module, calibration.model.anatomy.blocks
    weights = sum(p.numel() for block in set(blocks) for p in module.get_submodule(block).parameters())
    return max(1, weights // len(blocks))


@contextmanager
def _drawn(
    generators: Sequence[torch.Generator], draw: Callable[[torch.Generator], Tensor], device: torch.device
) -> Iterator[Iterator[Tensor]]:
    """Return the draws of each generator. For a GPU threads draw ahead: a core draws the signs of a probe for longer
    than the GPU works on it."""
    if device.type == "cpu" or len(generators) == 1:
        yield map(draw, generators)
        return
    with ThreadPoolExecutor(min(len(generators), os.cpu_count() or 1)) as pool:
        yield pool.map(draw, generators)


class _DensePass:
    """Features and outputs without a graph: what the probes of a batch are drawn for."""

    def __init__(
        self, calibration: Calibration, index: int, pieces: list[Batch], measured: list[int]
    ) -> None:
        self.calibration = calibration
        self.rows: dict[int, list[Tensor]] = {}
        found: dict[int, list[Tensor]] = {z: [] for z in measured}
        self.outputs: list[Tensor] = []
        self.tokens: list[int] = []
        """Of each piece: the most rows that a feature has, all examples together."""
        for number, piece in enumerate(pieces):
            features: dict[int, Tensor] = {}
            with torch.no_grad(), block_outputs(calibration.model, features):
                self.outputs.append(calibration.model.output(piece.inputs))
            calibration.check_finite(features, index)
            self.tokens.append(max((math.prod(f.shape[:2]) for f in features.values()), default=1))
            if not self.rows:
                # images are all of one length; text is not
                lengths = {z: [feature.shape[1]] * len(pieces) for z, feature in features.items()}
                self.rows = calibration.feature_rows(index, pieces, lengths)
            for z in measured:  # rows alone are kept: whole features of a batch can be large
                found[z].append(gather_rows(features[z], self.rows[z][number]))
        self.features = {z: torch.cat(parts) for z, parts in found.items()}
        self.weights = [
            calibration.model.row_weights(piece.inputs, output)
            for piece, output in zip(pieces, self.outputs, strict=True)
        ]

    @property
    def _output_shape(self) -> tuple[int, int, int]:
        """Of all pieces at once, as long as the longest: the same draws however the batch is cut."""
        rows, classes = (max(output.shape[axis] for output in self.outputs) for axis in (1, 2))
        return sum(len(output) for output in self.outputs), rows, classes

    @property
    def _sizes(self) -> list[int]:
        """Return how many signs each of a probe's seeds takes, in the order in which they are drawn."""
        return [*(len(f) ** 2 for f in self.features.values()), math.prod(self._output_shape)]

    def draw(self, generator: torch.Generator) -> Tensor:
        """One probe's signs for `seeds`, in one tensor on the CPU."""
        return draw_signs([sum(self._sizes)], generator)

    def seeds(self, drawn: Tensor) -> tuple[dict[int, tuple[Tensor, ...]], list[Tensor]]:
        """One probe's gradients: block -> one (rows, d) a piece, and one (examples, rows, classes) a piece."""
        signs = iter(drawn.to(self.calibration.model.device).split(self._sizes))
        features = {
            z: relation_probe(f, signs).split([len(rows) for rows in self.rows[z]])
            for z, f in self.features.items()
        }
        _, rows, classes = self._output_shape
        output, weight = [], []
        for o, w in zip(self.outputs, self.weights, strict=True):
            output.append(pad(o, (0, classes - o.shape[2], 0, rows - o.shape[1]), value=_IMPOSSIBLE))
            weight.append(pad(w, (0, rows - w.shape[1])))
        joined = torch.cat(weight)
        probed = output_probe(
            torch.cat(output),
            joined / joined.sum(),
            signs,
            temperature=self.calibration.temperature,
            term=self.calibration.model.task.term,
        ).split([len(o) for o in self.outputs])
        cut = [p[:, : o.shape[1], : o.shape[2]] for p, o in zip(probed, self.outputs, strict=True)]
        return features, cut


def _lone(model: OpenModel) -> set[str]:
    """Sites of one unit alone, such as an attention that has one head left: they are ablated.

    A norm right behind the site, as in Gemma, undoes any scaling of it: its derivative is zero whatever it is worth.
    Ablation needs the model on one device.
    """
    if len(model.devices) > 1:
        return set()
    return {site.name for site in model.anatomy if site.units == 1 and site.kind not in BESIDE}


def _few(calibration: Calibration) -> list[int]:
    """As few batches from the middle on as hold `_WHOLE` examples, or all: those of middling texts."""
    count, found = 0, []
    for batch in sorted(range(len(calibration)), key=lambda batch: abs(batch - len(calibration) // 2)):
        if count >= _WHOLE:
            break
        found.append(batch)
        count += len(calibration.batches.ids(batch))
    return sorted(found)


def near_the_cut(
    sites: Sequence[Site], scores: Mapping[str, np.ndarray], flops: float, band: float, tokens: float
) -> dict[str, np.ndarray]:
    """Units of each site whose rank in score per MAC is within `band` (a share of all units) of the last one kept.

    `flops` is the share of the MACs that is kept; returns site name -> unit indices.
    """
    owners = np.concatenate([np.full(s.units, i) for i, s in enumerate(sites)])
    units = np.concatenate([np.arange(s.units) for s in sites])
    costs = np.concatenate([np.full(s.units, s.macs_per_unit(tokens)) for s in sites])
    order = np.argsort(-np.concatenate([scores[s.name] for s in sites]) / costs, kind="stable")
    cut = int(np.searchsorted(np.cumsum(costs[order]), flops * costs.sum(), side="right"))
    reach = int(np.ceil(band * len(order)))
    near = order[max(0, cut - reach) : cut + reach]
    return {site.name: np.sort(units[near][owners[near] == i]) for i, site in enumerate(sites)}
