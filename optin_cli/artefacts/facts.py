"""The JSON objects in artefacts: names and types of their entries.

Plain dicts at run time, so that files keep their bytes and older ones load; typed, so that a misspelt entry does not
pass the type checker. `NotRequired` entries are left out where they don't apply, or by older versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict


class SizedBy(TypedDict):
    """What sizes a site in a model that its stock class builds."""

    entry: str
    """Of the config, or the argument: sites with the same one have the same size."""
    each: int
    """Units of this site for each that the entry counts."""
    counts: NotRequired[list[int]]
    """The numbers of units that the config accepts, where those are not all."""
    width: NotRequired[str]
    """The entry that says the width of a head, where there is one."""
    same: NotRequired[str]
    """Of sites that keep the same units: what they share (T5's position biases)."""


ModelFacts = TypedDict(
    "ModelFacts",
    {
        "id": str,
        "digest": str,
        "family": str,
        "task": str,
        "class": str,
        "merges": NotRequired[list[int]],
        "chained": NotRequired[list[str]],
        "shared": NotRequired[list[dict[str, Any]]],
        "prefix": NotRequired[int],
        "config": NotRequired[dict[str, SizedBy]],
    },
)
"""A ranked model. digest: SHA-256 of its weights; merges: tokens merged behind each block; chained: sites that nothing
goes around; shared: `CoupledLayer`s between two sites; prefix: tokens in front that are never merged, where others can
be; config: the sites that a uniform model may have smaller (older rankings don't say)."""


class DenseFacts(TypedDict):
    """The original dense model: what budgets are relative to."""

    id: str
    digest: str
    params: int
    macs_per_token: float
    """Of all sites, as `macs_per_pair`."""
    macs_per_pair: float
    site_params: float
    """Parameters that belong to units."""
    dtype: NotRequired[str]
    """Of the stored weights."""
    fixed_macs: NotRequired[float]
    """MACs outside the sites on a mean calibration example; of a ranking."""


class LengthFacts(TypedDict):
    """The lengths of texts in tokens, special ones included."""

    shortest: int
    median: float
    longest: int
    takes: int | None
    """The longest that the model takes; null where that is not known."""


class SeenLengths(TypedDict):
    """The lengths of the texts that a pruned model was made on. Null where there were none, or nothing was done."""

    scored: LengthFacts | None
    refitted: LengthFacts | None
    """Joined texts included."""


class ContentFacts(TypedDict):
    """What a sample of data looks like, to compare others with (`data.likeness`)."""

    examples: int
    """That were looked at."""
    tokens: list[int] | None
    """Tokens of texts, counted by a hash of their ids; null for other data."""
    mean: list[float] | None
    """Features of images and recordings; null for texts, as the next."""
    deviation: list[float] | None


class DataFacts(TypedDict):
    """Calibration data: where it is, how its columns are read, and which rows were drawn."""

    spec: str
    config: str | None
    split: str
    text: list[str]
    """Columns, as the next four."""
    image: str | None
    audio: NotRequired[str | None]
    label: str | None
    mask: NotRequired[str | None]
    """Label maps."""
    ignore_index: NotRequired[int]
    fingerprint: str
    rows: int
    """Of the split."""
    lengths: NotRequired[LengthFacts | None]
    """Of the texts that were drawn; null for other data."""
    content: NotRequired[ContentFacts | None]
    stream: NotRequired[bool]
    row_ids: NotRequired[list[int]]
    """The first rows drawn; of a mask."""


class TimedModel(TypedDict):
    """The model of a latency table."""

    id: str
    digest: str
    dense_digest: str
    """Of the weights of the dense original."""
    family: str


class TimedSetting(TypedDict):
    """The conditions that a latency table was measured in."""

    device: str
    processor: str
    """Of a CPU; '' of other devices."""
    threads: int
    dtype: str
    batch_size: int
    size: int
    """Tokens, or pixels a side."""


class RankTimes(TypedDict):
    """Milliseconds by number of heads and rank: a grid, whose last rank is that of whole heads."""

    ranks: list[int]
    """Dimensions of a head, ascending."""
    counts: list[int]
    """Heads, ascending from 0."""
    ms: list[list[float]]
    """[ranks][counts]"""


class Curve(TypedDict):
    """Milliseconds by number of units."""

    counts: list[int]
    """Ascending, from 0."""
    ms: list[float]
    """Median time that so many units add."""
    noise: float
    """The typical error of one ms."""
    ranks: NotRequired[RankTimes]
    """Of heads that can be cut to a lower rank; tables from before ranks have none."""


class TimedSite(TypedDict):
    """A site in a latency table."""

    kind: str
    units: int
    curve: int
    """Index of its curve: alike sites share one."""


class UsedTable(TimedSetting):
    """The latency table that a mask was selected with."""

    model: str
    of: str
    """SHA-256 of the table's model."""
    digest: str
    """Of the table."""


class Asked(TypedDict):
    """The request that a mask was made for. Budgets that were not given are null; other kinds add entries."""

    flops: float | None
    params: float | None
    memory: float | None
    """MiB."""
    latency: float | None
    latency_ms: float | None
    relative_to: str
    """The reference of shares: `dense` or `current`."""
    tokens: float
    """Sequence length that MACs are counted for."""
    output_weight: float
    """Lambda."""
    feature_weights: str | Sequence[float]
    interactions: str
    min_heads: int
    min_neurons: int
    min_channels: int
    max_prune: float
    protect: list[str]
    only: str | None
    round_to: int | str
    """A multiple, or `auto`."""
    merge: NotRequired[str]
    uniform: NotRequired[bool]
    """True if layers are to have the same size: those that one entry of the config sizes."""
    latency_table: UsedTable | None


class Reached(TypedDict):
    """The resources that the pruned and the dense model use. Other kinds of budgets add entries."""

    flops: float
    """Share of the MACs of the sites."""
    macs: float
    dense_macs: float
    params: float
    """Of the whole model, as `memory`."""
    dense_params: float
    memory: float
    """MiB."""
    dense_memory: float
    latency_ms: NotRequired[float]
    """Predicted with a latency table."""
    table_latency_ms: NotRequired[float]
    """Of the table's model."""


class Change(TypedDict):
    """A joint loss, as a share of the total score."""

    before: float
    after: float


class Exchanged(TypedDict):
    """The result of exchanging units for their interactions."""

    ridge: float
    moved: int
    """Units exchanged."""
    dropped: bool
    """True if the gain was not real."""
    error: float
    """Standard error of the held-out difference."""
    fit: Change
    held_out: Change


class FreeMask(TypedDict):
    """The mask of the same request whose layers may differ: what a uniform one is compared with."""

    kept: float
    flops: float
    whole: list[str]
    """Kinds of units that the stock class can't have fewer of: all stay in a uniform model."""


class Objective(TypedDict):
    """The quality of a mask, in shares of the total score."""

    kept: float
    bound: float
    """Upper bound on what any mask within the budgets keeps, less what merging loses."""
    gap: float
    optimal: bool
    """True if it is proved that no mask within the budgets keeps more."""
    merging: NotRequired[float]
    """The loss of merging tokens; bound and gap are net of it."""
    interactions: Exchanged | None
    free: NotRequired[FreeMask]
    """Of a uniform mask."""


class PrunedModel(TypedDict):
    """The model that a pruning started from."""

    id: str
    digest: str


class PruningStep(TypedDict):
    """One pruning in the record of a pruned model."""

    model: PrunedModel
    ranking: str
    """Digest, as `mask`."""
    mask: str
    budget: Asked
    reached: Reached
    versions: dict[str, str]
    compensation: NotRequired[dict[str, Any]]
    """Settings, data and a table of sites (error before and after, method kept, ridge)."""
    lengths: NotRequired[SeenLengths]
    content: NotRequired[ContentFacts | None]
    """Of the data that the model was refitted on, or else scored."""
    deviation: NotRequired[float]
    """Largest difference of the outputs from the masked model's."""
    tolerance: NotRequired[float]
    """The amount that was allowed."""
    checked_on: NotRequired[str]
    params: NotRequired[int]
