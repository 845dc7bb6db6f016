"""The interface of a scoring method: say what it needs, cut the work into items, run one, combine the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from optin_cli.artefacts.files import digest_json
from optin_cli.artefacts.ranking import RankedSite
from optin_cli.importance import OPTIN_SUM
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.scoring.calibration import Calibration
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.structure.anatomy import CHANNELS, HEADS, NEURONS, Site

Arrays = dict[str, np.ndarray]
"""An item's result: `<site>/<part>` -> array. Parts: `t`, `o` (scores), `tr`, `or` (rows of the sketch)."""
OnWork = Callable[[float], None]
"""Called with the work just done."""
MOST_PROBES = 4096
_TIMED_UNITS = 16


@dataclass(frozen=True)
class Item:
    """A piece of work that is done whole or not at all; its result is kept when a run is cut short."""

    engine: str
    """The method that runs it (one method may use another), or `tokens`."""
    batch: int
    site: str = ""
    """The one site an ablation is of, or the boundary tokens are merged at; others are of all sites at once."""
    units: tuple[int, ...] = ()
    """Of the site; of a boundary its block."""
    probes: tuple[int, int] = (0, 0)
    """First probe and the one after the last."""
    blocks: tuple[int, ...] | None = field(default=None, compare=False)
    """Blocks whose features are probed; None for all. A part that is timed has few (`ScoringMethod.samples`)."""
    estimates: bool = False
    """Its scores are sums over its probes, to be divided by the number of all probes. Scores that are not estimates
    replace them."""
    work: float = field(default=0.0, compare=False)
    """About how many forward passes of one batch it takes."""

    @property
    def key(self) -> str:
        """A file name."""
        parts = [self.engine, str(self.batch)]
        if self.site:
            parts += [self.site, digest_json(self.units)[:12]]
        if self.probes != (0, 0):
            parts += [f"{self.probes[0]}-{self.probes[1]}"]
        return "-".join(parts)


def _part(item: Item, units: int, probes: int) -> Item:
    """At most so many of an item's units and probes."""
    first, stop = item.probes
    some, last = item.units[:units], min(first + probes, stop)
    share = (
        len(some) / len(item.units)
        if item.units
        else (last - first) / (stop - first)
        if stop > first
        else 1.0
    )
    return replace(item, units=some, probes=(first, last), work=item.work * share)


class Measured(Protocol):
    """The results of the items finished so far."""

    def sites(self) -> list[RankedSite]:
        """Every site with its parts, not yet combined."""

    def probing_error(self) -> float:
        """Median over units of the relative standard error that probing leaves."""


class ScoringMethod:
    """One value of the setting `method`. A new one is a subclass with a `name` and `run`, handed to `register_method`.

    The class attributes say what the method needs and can; an instance belongs to one run. `items` are done in any
    order and by any process, each is kept on disk when done, and `combine` turns the means over the batches into
    scores. Whatever is drawn at random comes from `calibration.generator(batch, stream)`, so that a killed run
    resumes to the same result.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[str]] = frozenset({HEADS, NEURONS, CHANNELS})
    """Of units that it can score."""
    needs_data: ClassVar[bool] = True
    """It runs the model on the calibration batches."""
    needs_labels: ClassVar[bool] = False
    shuffled: ClassVar[bool] = False
    """Its batches are drawn, not made of texts of one length."""
    batches_compare: ClassVar[bool] = True
    """The scores of one batch alone say how stable the ranking is."""
    whole_blocks: ClassVar[bool] = False
    """The units of a block stay or go together: `select` looks for blocks."""
    takes_ranks: ClassVar[bool] = False
    """It measures what lower ranks of heads cost: sites of dimensions, whose units go from the last one on."""
    takes_sublayers: ClassVar[bool] = False
    """It measures what all heads of a block cost together: sites of one unit."""
    spreads: ClassVar[bool] = False
    """It scores a model that is spread over several devices."""
    takes_strata: ClassVar[bool] = False
    """It has backward passes from features, which `strata` can join."""
    takes_per_batch: ClassVar[bool] = False
    """It has gradients that `per_batch` can average."""
    takes_band: ClassVar[bool] = False
    """It has estimates that `exact_band` can replace."""
    sketches: ClassVar[tuple[str, ...]] = ()
    """Parts of the sketch it keeps: `tr` (gradients of the trajectory), `or` (of the output)."""
    recombines: ClassVar[bool] = False
    """`select` may put trajectory and output together with other weights, as OPTIN does."""
    temperature: ClassVar[float] = 4.0
    """Default of `temperature`."""
    output_weight: ClassVar[float | None] = 0.0
    """Default of `output_weight`, OPTIN's lambda; 0 where there is nothing to weigh, None where the budget decides."""
    feature_weights: ClassVar[str] = OPTIN_SUM
    """Default of `feature_weights`."""

    def __init__(
        self, calibration: Calibration, settings: ScoreSettings, labels: list[Any] | None = None
    ) -> None:
        self.calibration = calibration
        self.model = calibration.model
        self.anatomy = calibration.model.anatomy
        self.settings = settings
        self.labels = labels
        """One for each row of the data, where `needs_labels`."""

    @classmethod
    def engines(cls) -> dict[str, str]:
        """Kind of unit -> the method that measures it. Recorded in the ranking."""
        return dict.fromkeys(cls.kinds, cls.name) if cls.needs_data else {}

    @classmethod
    def misfit(cls, model: OpenModel) -> str:
        """Why it can't score `model`, as a verb and its object; empty if it can."""
        unknown = {site.kind for site in model.anatomy} - cls.kinds
        return f"does not score {' and '.join(sorted(unknown))}, which {model.spec} has" if unknown else ""

    @classmethod
    def facts(cls, model: OpenModel) -> dict[str, Any]:
        """What else decides the scores of a model: it makes two runs different work."""
        return {}

    @classmethod
    def shared_passes(cls, strata: int | None, depth: int) -> int | None:
        """The strata of a model of so many blocks: as given or by default; None where no passes are shared."""
        return None

    def columns(self, site: Site) -> list[int]:
        """The block that each trajectory column of a site is about; none for a method without a trajectory."""
        return []

    def items(self) -> list[Item]:
        """The work that is known from the start; by default one item for each batch."""
        return [Item(self.name, batch, work=1.0) for batch in range(len(self.calibration))]

    def more_items(self, measured: Measured) -> list[Item]:
        """The work that follows from what was measured; asked for until there is none."""
        return []

    def run(self, item: Item, on_work: OnWork) -> Arrays:
        """The scores of one item, as `item_scores` makes them. `on_work` may be called on the way."""
        raise NotImplementedError(f"{type(self).__name__} has items and does not run them")

    def samples(self, item: Item) -> tuple[Item, Item]:
        """Two small parts of an item, the second with more `work` if there is more: a dry run times them for all."""
        return _part(item, _TIMED_UNITS // 2, 1), _part(item, _TIMED_UNITS, 2)

    def release(self) -> None:
        """Let go of what is held for the next item of the same batch: something else needs the memory."""

    def weight(self, item: Item) -> float:
        """The share of a site's score that comes from an item's batch."""
        return self.calibration.weight(item.batch)

    def combine(self, sites: list[RankedSite]) -> dict[str, np.ndarray]:
        """Site name -> score of each unit [units], from the parts; by default the output part."""
        return {site.name: site.output for site in sites}

    def sketched_probes(self) -> int:
        """Probes of each batch whose gradients are kept: whole probes, so that every example counts alike."""
        wanted = -(-self.settings.sketch_rows // self.calibration.batches.count)
        most = MOST_PROBES if self.settings.rel_error is not None else self.settings.probes
        return min(wanted, most)

    def row_examples(self, batch: int) -> list[int]:
        """The example that each kept gradient of one probe is of."""
        return self.calibration.batches.ids(batch)


def item_scores(
    output: Mapping[str, np.ndarray],
    trajectory: Mapping[str, np.ndarray] | None = None,
    *,
    trajectory_rows: Mapping[str, np.ndarray] | None = None,
    output_rows: Mapping[str, np.ndarray] | None = None,
) -> Arrays:
    """Return the results of an item as they are kept on disk. Each part maps site names to arrays.

    `output` is [units] and `trajectory` [units, columns], without columns where it is left out. The rows are
    gradients for the sketch, [rows, units].
    """
    if trajectory is None:
        trajectory = {name: np.zeros((len(found), 0)) for name, found in output.items()}
    parts = {"t": trajectory, "o": output, "tr": trajectory_rows or {}, "or": output_rows or {}}
    return {f"{name}/{part}": array for part, of in parts.items() for name, array in of.items()}
