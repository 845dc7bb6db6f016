"""What `--json` prints: one object a command, with `schema_version` and these keys. docs/schemas/ is made from this.

Keys are added within a version of the schema, never taken away or given another meaning. Readers ignore further keys.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from optin_cli.artefacts.facts import (
    Asked,
    DataFacts,
    LengthFacts,
    ModelFacts,
    Objective,
    PrunedModel,
    Reached,
    TimedSetting,
)
from optin_cli.artefacts.point import TimedPoint


class RankingFacts(TypedDict):
    """A ranking in a few numbers."""

    digest: str
    """SHA-256 of the scores and what they came from."""
    model: ModelFacts
    data: DataFacts
    rows: int
    """Calibration examples."""
    method: str
    units: dict[str, int]
    """Site -> units."""
    ranks: dict[str, int]
    """Site of heads -> their dimensions, where lower ranks were measured."""
    sublayers: list[str]
    """Sites of heads that were measured as a whole, too."""
    tokens: float
    """Mean of a calibration example, without padding."""
    lengths: LengthFacts | None
    """Of the texts; null for other data."""
    macs: float
    """Of all sites, on a mean calibration example."""
    seconds: float
    """That scoring took."""


class ScoreOutput(RankingFacts):
    """`optin score`."""

    ranking: str
    """Path."""
    reused: bool
    """True if nothing was scored."""
    reused_from: str | None
    """Another ranking of the same inputs that was copied; null where none was."""


class DryRunOutput(TypedDict):
    """`optin score --dry-run`."""

    dry_run: Literal[True]
    units: dict[str, int]
    """Site -> units."""
    batches: int
    seconds: float
    """Estimate."""


class MaskFacts(TypedDict):
    """A mask without its indices."""

    digest: str
    budget: Asked
    reached: Reached
    objective: Objective
    kept: dict[str, str]
    """Site -> `kept/units`."""
    merges: list[int]
    """Tokens merged behind each block; empty: none."""
    ranks: dict[str, int]
    """Site of heads -> dimensions that each of its heads keeps, where that is not all."""
    emptied: list[str]
    """Sites without any unit left."""


class SelectOutput(MaskFacts):
    """`optin select` with one budget."""

    mask: str
    """Path."""
    reused: bool
    """True if the file was this mask already."""


class SeveralMasks(TypedDict):
    """`optin select` with a list of budgets."""

    masks: list[SelectOutput]


class Fit(TypedDict):
    """The result of compensation at one site: see the compensation guide."""

    site: str
    method: str
    """`full`, `scale`, `bias` or `none`."""
    ridge: float | None
    before: float
    """Mean squared held-out error, as a share of the dense model's, as `after`."""
    after: float
    rows: int
    note: str
    layer: str


class Seen(TypedDict):
    """Lengths of the texts that a model was made on; null where there were none."""

    scored: LengthFacts | None
    refitted: LengthFacts | None


class AppliedFacts(TypedDict):
    """What became of a model."""

    reused: bool
    """True if the directory was this model already."""
    deviation: float
    """Largest difference between the outputs of the sliced and the masked model."""
    tolerance: float
    """The largest deviation that would have passed."""
    checked_on: str
    params: int
    dense_params: int
    lengths: Seen | None
    compensation: list[Fit]


class ApplyOutput(AppliedFacts):
    """`optin apply`."""

    model: str
    """Directory."""


class PointFacts(TypedDict):
    """One model of a sweep."""

    directory: str
    name: str
    variant: str
    """'' for the sweep's own settings."""
    seed: int
    model: PrunedModel
    """The dense model."""
    ranking: str
    """Digest, as `mask`."""
    mask: str
    budget: Asked
    reached: Reached
    params: int
    evaluation: dict[str, Any]
    """Empty until it is measured."""
    timings: list[TimedPoint]
    timed: dict[str, Any]
    """The settings that were timed."""
    created: str
    versions: dict[str, str]


class PruneOutput(AppliedFacts):
    """`optin prune`."""

    model: str
    """Directory."""
    ranking: str
    """Path."""
    ranking_reused: bool
    mask: MaskFacts
    sweep: NotRequired[str]
    """Folder of the trials, with --max-drop or --min-speedup, as the next two."""
    best: NotRequired[str]
    trials: NotRequired[list[PointFacts]]


class SweepOutput(TypedDict):
    """`optin sweep`."""

    sweep: str
    """Folder."""
    report: str
    """Path of the page."""
    points: list[PointFacts]


class Setting(TypedDict):
    batch_size: int
    size: int
    """Tokens, or pixels a side."""


class TimingRow(TypedDict):
    """One model under one setting."""

    model: str
    setting: Setting
    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int
    throughput: float
    """Examples a second."""
    peak_memory: int | None
    """Bytes; null of an exported file."""
    macs: int
    """Of one example."""
    params: int
    device: str
    threads: int
    dtype: str
    doubling: float | None
    """Time of twice the batch, as a multiple; null where it was not measured."""
    saturated: bool
    execution: str
    warmup: int
    """Rounds before those timed."""
    attention: str
    """`sdpa (flash)`, `eager` and so on; '' without heads."""
    joules: float | None
    """Energy of an example; null where it can't be read."""
    load_ms: float | None
    """With `--first-load`: opening the model from its files, and its first forward."""
    first_ms: float | None
    point: str
    disk_bytes: int | None
    speedup: NotRequired[float]
    """Over the baseline, as the next three."""
    speedup_interval: NotRequired[list[float]]
    ideal_speedup: NotRequired[float]
    efficiency: NotRequired[float]
    predicted_ms: NotRequired[float]
    """By the latency table that the model was selected with."""
    predicted_speedup: NotRequired[float]


class BenchOutput(TypedDict):
    """`optin bench`."""

    timings: list[TimingRow]


class GenerationRow(TypedDict):
    """One decoder at one batch size."""

    model: str
    batch_size: int
    prompt: int
    new: int
    prefill_ms: float
    decode_ms: float
    """Of one token of each example."""
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    rounds: int
    prefill_speedup: NotRequired[float]
    decode_speedup: NotRequired[float]


class GenerationOutput(TypedDict):
    """`optin bench --new-tokens`."""

    generation: list[GenerationRow]


class ProfiledSite(TypedDict):
    """The layers of one site."""

    site: str
    kind: str
    units: list[int]
    """Of each model, as `ms`."""
    ms: list[float]


class ProfileFacts(TypedDict):
    """The time of a forward of each model, by site."""

    models: list[str]
    batch_size: int
    size: int
    device: str
    sites: list[ProfiledSite]
    elsewhere_ms: list[float]
    total_ms: list[float]
    rounds: int


class ProfileOutput(TypedDict):
    """`optin bench --profile`."""

    profiles: list[ProfileFacts]


class TableOutput(TypedDict):
    """`optin bench --table`."""

    table: str
    """Path."""
    reused: bool
    digest: str
    setting: TimedSetting
    total_ms: float
    fixed_ms: float


class EvalOutput(TypedDict):
    """`optin eval`."""

    model: str
    baseline: str | None
    data: str
    task: str
    examples: int
    metrics: dict[str, float]
    main: str
    """The metric that `drop` is about; '' where there are no labels."""
    baseline_metrics: dict[str, float]
    fidelity: dict[str, float]
    drop: float | None
    """Points lost to the baseline; of an error rate gained, of perplexity per cent."""
    broken: int
    """Examples left out."""
    longest: int | None
    """Tokens of the longest text; null for other data."""
    seen: int | None
    """Of the longest that the model was pruned on."""
    longer: int
    """Texts longer than that."""
    unlike: str
    """How the data differs from what the model was pruned on, in words; '' where it does not."""


class ExportOutput(TypedDict):
    """`optin export`."""

    file: str
    """Path."""
    bytes: int
    """On disk, weights beside the file included."""
    reused: bool
    """True if the file was there already, of the same model and settings."""
    to: str
    precision: str
    """`float32`, `float16` or `int8`."""
    opset: int | None
    """Of ONNX; null of others."""
    inputs: list[str]
    outputs: list[str]
    deviation: float
    """Largest difference from the outputs of the model in torch."""
    tolerance: float | None
    """The largest deviation that would have passed; null of int8, as the next are of others."""
    agreement: dict[str, float] | None
    """Fidelity to the model in torch."""
    examples: int | None
    """That the agreement is of."""
    max_error: float | None
    float_layers: list[str] | None
    """Layers left in float32."""
    checked_on: str
    """Data, or `noise`."""
    shapes: list[list[int]]
    """Of the first input in the two batches that were compared."""
    versions: dict[str, str]
    """Package -> version."""


class PushOutput(TypedDict):
    """`optin push`."""

    repo: str
    url: str
    """Of the commit; empty of a dry run."""
    files: dict[str, int]
    """Path in the repository -> bytes."""
    bytes: int
    dry_run: bool


class PickOutput(PointFacts):
    """`optin pick`."""


class ReportOutput(TypedDict):
    """`optin report`."""

    written: list[str]
    """Paths."""


class FamiliesOutput(TypedDict):
    """`optin families`."""

    families: list[dict[str, Any]]
    """Tables: see docs/anatomy.md."""


class TracedSite(TypedDict):
    name: str
    blocks: list[int]
    units: list[list[int]]
    """[units, width] of each kind of block."""
    params: float
    """Of a unit, as `macs`."""
    macs: float
    notes: list[str]


class LeftOut(TypedDict):
    where: str
    why: str


class TraceOutput(TypedDict):
    """`optin families --trace`."""

    model: str
    anatomy: str | None
    """Path of the table that was written."""
    listed: str | None
    """The family that lists the model already."""
    random_weights: bool
    family: dict[str, Any]
    blocks: list[str]
    positions: int
    sites: list[TracedSite]
    left_out: list[LeftOut]


class OptionRow(TypedDict):
    command: str
    option: str
    value: str | float | int | bool | list[Any] | None
    source: Literal["environment", "file", "default"]
    origin: str
    """The variable, or the key and its file; '' of a default."""


class ConfigOutput(TypedDict):
    """`optin config`."""

    file: str | None
    """That is read for defaults."""
    options: list[OptionRow]


class Place(TypedDict):
    name: str
    """`here`, `OPTIN_RANKINGS`, `user cache`, `repository` or `given`."""
    path: str


class ListedRanking(TypedDict):
    """A ranking's file. One that can't be read has a problem, and none of the facts."""

    path: str
    place: str
    problem: str | None
    digest: NotRequired[str]
    model: NotRequired[str]
    model_digest: NotRequired[str]
    """Of its weights."""
    data: NotRequired[str]
    rows: NotRequired[int]
    method: NotRequired[str]
    created: NotRequired[str]


class RankingsOutput(TypedDict):
    """`optin rankings`."""

    places: list[Place]
    rankings: list[ListedRanking]
