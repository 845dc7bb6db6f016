"""`optin.json`: what makes a folder with a config and safetensors a pruned model that loads again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from safetensors import SafetensorError, safe_open

from optin_cli.artefacts import typed
from optin_cli.artefacts.facts import ContentFacts, DenseFacts, PrunedModel, PruningStep, UsedTable
from optin_cli.artefacts.files import as_record, read_record, to_json
from optin_cli.errors import ArtefactError

FORMAT = "optin-pruned-model"
SCHEMA_VERSION = 3
"""1 merged no tokens, 2 did not say how modules are resized."""
FILE_NAME = "optin.json"
_LATER = ("merges", "resized", "sized_config")


@dataclass
class PrunedRecord:
    """The difference of a pruned model from its dense original, and how it was made."""

    library: str
    """`transformers` or `timm`: who reads config.json."""
    architecture: str
    """Class of the model (transformers) or its registered name (timm)."""
    task: str
    family: dict[str, Any]
    """The family's table, so that loading needs no registration."""
    kept: dict[str, list[int]]
    """Site name -> unit indices kept, counted in the dense original (pruning twice composes)."""
    per_layer_config: dict[str, dict[str, int]]
    """Block -> sizes left, under the names transformers uses: num_attention_heads, intermediate_size, and where heads
    were cut to a lower rank, `size_name` of theirs."""
    dense: DenseFacts
    merges: list[int] = field(default_factory=list)
    """Tokens merged behind each block, from the first one on; empty: none."""
    resized: dict[str, Any] = field(default_factory=dict)
    """What is smaller in its modules than in the dense model's, or runs otherwise: all that `modeling_optin.py` needs.
    `sizes` (path of a module -> attribute: number, tensor: shape), `runs` (path -> changes), `merging` (or null).
    Empty in older records."""
    sized_config: bool = False
    """True if a uniform pruning wrote its sizes into config.json: `resized` is then relative to those."""
    history: list[PruningStep] = field(default_factory=list)
    """The prunings, the last one last."""

    @property
    def is_stock(self) -> bool:
        """Return whether the config has all sizes, so that the library's own class is the pruned model."""
        return self.sized_config and not any(self.resized.values())


def size_name(label: str) -> str:
    """The name of the size of a site's heads in a layer's config: of two sites in a block, one has another label."""
    return "head_dim" if label == "heads" else f"{label}_head_dim"


def ranks_of(record: PrunedRecord) -> dict[str, int]:
    """Site of heads -> dimensions of each, where those were cut."""
    found = {}
    for name in record.kept:
        block, _, label = name.removeprefix("blocks.").rpartition(".")
        found[name] = record.per_layer_config.get(block, {}).get(size_name(label))
    return {name: rank for name, rank in found.items() if rank}


class _Data(TypedDict):
    spec: str


class _Fit(TypedDict):
    site: str
    method: str
    ridge: float | None
    before: float
    after: float
    rows: int
    note: NotRequired[str]
    layer: NotRequired[str]


class _Compensation(TypedDict):
    method: str
    rows: NotRequired[int]
    data: NotRequired[_Data]
    sites: NotRequired[list[_Fit]]


class _Asked(TypedDict):
    relative_to: str
    latency_table: NotRequired[UsedTable | None]


class _Reached(TypedDict):
    flops: float
    latency_ms: NotRequired[float]
    table_latency_ms: NotRequired[float]


class _Step(TypedDict):
    """What optin reads of a `PruningStep`: steps that earlier versions made may lack the rest."""

    model: PrunedModel
    mask: str
    budget: _Asked
    reached: _Reached
    compensation: NotRequired[_Compensation]
    content: NotRequired[ContentFacts | None]
    deviation: NotRequired[float]
    checked_on: NotRequired[str]
    params: NotRequired[int]


def pruned_json(record: PrunedRecord) -> str:
    """The text of `optin.json`."""
    return to_json({"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(record)}) + "\n"


def write_pruned(folder: Path, record: PrunedRecord) -> None:
    (folder / FILE_NAME).write_text(pruned_json(record))


def read_pruned(folder: str | Path) -> PrunedRecord:
    """Read `optin.json` of a pruned folder. Raises `ArtefactError` when it is damaged or too new.

    Example:
        >>> record = optin.read_pruned(folder / "small")
        >>> record.kept == small.mask.keep
        True
    """
    path, what = Path(folder) / FILE_NAME, "the record of a pruned model"
    record = read_record(
        path, PrunedRecord, what, FORMAT, SCHEMA_VERSION, maker="optin apply", optional=_LATER,
        shallow=("history",),
    )  # fmt: skip
    return _checked(record, path)


def parse_pruned(text: str, where: str) -> PrunedRecord:
    """The record in the text of an `optin.json`. Raises what `read_pruned` does, naming `where` it is from."""
    record = as_record(
        json.loads(text), Path(where), PrunedRecord, SCHEMA_VERSION, maker="optin apply", optional=_LATER,
        shallow=("history",),
    )  # fmt: skip
    return _checked(record, Path(where))


def read_checked(folder: str | Path) -> PrunedRecord:
    """The same of a model whose outputs were compared, as of everything that has its final name."""
    record = read_pruned(folder)
    wanted = ("deviation", "checked_on", "params")
    for index, step in enumerate(record.history):
        if missing := [name for name in wanted if name not in step]:
            raise ArtefactError(
                f"{Path(folder) / FILE_NAME} is a damaged record: history[{index}].{missing[0]} is missing",
                "run `optin apply` again",
            )
    return record


def _checked(record: PrunedRecord, path: Path) -> PrunedRecord:
    if problems := _problems(record):
        raise ArtefactError(f"{path} is a damaged record: {', '.join(problems)}", "run `optin apply` again")
    return record


def _problems(record: PrunedRecord) -> list[str]:
    problems = typed.problems(record.history, list[_Step], "history")
    if not record.history:
        problems.append("history is empty")
    if problems:
        return problems
    for index, step in enumerate(record.history):
        done, where = step.get("compensation", {}), f"history[{index}]"
        if done.get("sites"):
            wanted = ("rows", "data")
            problems += [f"{where}.compensation.{name} is missing" for name in wanted if name not in done]
        if step["budget"].get("latency_table"):
            times = ("latency_ms", "table_latency_ms")
            problems += [
                f"{where}.reached.{name} is missing" for name in times if name not in step["reached"]
            ]
    return problems


def check_weights(folder: Path) -> None:
    """Raise `ArtefactError` where the weights of a pruned folder are missing or cut short. Reads headers alone."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ArtefactError(f"{folder} holds no weights", "run `optin apply` again")
    for path in files:
        try:
            safe_open(path, "numpy").__exit__(None, None, None)
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{path} is damaged: {error}", "run `optin apply` again") from error
