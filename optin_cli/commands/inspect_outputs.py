"""What `optin vocab` and `optin inspect` print with `--json`, and the table of what every command prints."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from optin_cli.artefacts.exported import ExportedFile, ExportedFrom
from optin_cli.artefacts.facts import Curve, DenseFacts, PruningStep, TimedModel, TimedSetting, TimedSite
from optin_cli.commands import outputs
from optin_cli.commands.outputs import MaskFacts, PointFacts, RankingFacts


class VocabularyFacts(TypedDict):
    """The tokens of a model that has fewer than the one it was made from."""

    tokens: int
    """Rows of the embedding."""
    dense_tokens: int
    always: int
    """Tokens that are kept whatever the data has."""
    counted: int
    """Tokens of the data, special ones not counted."""
    covered: float
    """Share of those that are kept."""
    unseen: float
    """Share of the tokens of more text of the same kind that the data has not, estimated from those it has once."""
    params: int
    dense_params: int
    deviation: float
    """Largest difference of the outputs, on kept tokens."""
    checked_on: str


class VocabOutput(VocabularyFacts):
    """`optin vocab`."""

    model: str
    """Directory."""
    reused: bool
    """True if the directory was this model already."""
    bytes: int
    """Of the stored weights."""
    dense_bytes: int


class InspectedRanking(RankingFacts):
    """`optin inspect` of a ranking."""

    kind: Literal["ranking"]
    path: str


class InspectedMask(MaskFacts):
    """`optin inspect` of a mask."""

    kind: Literal["mask"]
    path: str


class InspectedTable(TypedDict):
    """`optin inspect` of a latency table."""

    kind: Literal["latency table"]
    path: str
    model: TimedModel
    setting: TimedSetting
    total_ms: float
    fixed_ms: float
    curves: list[Curve]
    sites: dict[str, TimedSite]
    created: str
    versions: dict[str, str]
    digest: str
    whole_ms: dict[str, float]
    """Site -> milliseconds with all units."""


class InspectedModel(TypedDict):
    """`optin inspect` of a model that is not pruned."""

    kind: Literal["model"]
    path: str
    architecture: str
    family: str
    task: str
    units: dict[str, int]
    dense: DenseFacts
    vocabulary: VocabularyFacts | None
    """Null of a model that has all of its tokens."""


class InspectedPruned(TypedDict):
    """`optin inspect` of a pruned model."""

    kind: Literal["pruned model"]
    path: str
    architecture: str
    task: str
    units: dict[str, int]
    per_layer_config: dict[str, dict[str, int]]
    merges: list[int]
    dense: DenseFacts
    history: list[PruningStep]
    vocabulary: VocabularyFacts | None


class InspectedExport(TypedDict):
    """`optin inspect` of an exported file, or of a directory of them."""

    kind: Literal["exported model"]
    path: str
    model: ExportedFrom
    prunings: int
    """How many times the model was pruned; of a single file that is not recorded, and 0."""
    files: dict[str, ExportedFile]
    """Path from the record's folder -> what is known of the file."""


class InspectedSweep(TypedDict):
    """`optin inspect` of a sweep."""

    kind: Literal["sweep"]
    path: str
    points: list[PointFacts]


class InspectedStability(TypedDict):
    """`optin inspect --stability`. Of rankings that can't tell, `agreement` is null and the numbers are left out."""

    kind: Literal["stability"]
    path: str
    note: str
    agreement: dict[str, dict[str, Any]] | None
    """Kind of unit -> agreement; `all` for all."""
    batches: NotRequired[int]
    examples: NotRequired[int]
    target: NotRequired[float]
    near: NotRequired[dict[str, list[dict[str, Any]]]]
    """Budget -> the units closest to the cut."""
    needed: NotRequired[int | None]


OUTPUTS: dict[str, tuple[type, ...]] = {
    "prune": (outputs.PruneOutput,),
    "score": (outputs.ScoreOutput, outputs.DryRunOutput),
    "select": (outputs.SelectOutput, outputs.SeveralMasks),
    "apply": (outputs.ApplyOutput,),
    "export": (outputs.ExportOutput,),
    "bench": (outputs.BenchOutput, outputs.GenerationOutput, outputs.ProfileOutput, outputs.TableOutput),
    "eval": (outputs.EvalOutput,),
    "sweep": (outputs.SweepOutput,),
    "pick": (outputs.PickOutput,),
    "report": (outputs.ReportOutput,),
    "push": (outputs.PushOutput,),
    "vocab": (VocabOutput,),
    "inspect": (
        InspectedRanking,
        InspectedMask,
        InspectedTable,
        InspectedModel,
        InspectedPruned,
        InspectedExport,
        InspectedSweep,
        InspectedStability,
    ),
    "rankings": (outputs.RankingsOutput,),
    "families": (outputs.FamiliesOutput, outputs.TraceOutput),
    "config": (outputs.ConfigOutput,),
}
"""Command -> what its JSON may be."""
