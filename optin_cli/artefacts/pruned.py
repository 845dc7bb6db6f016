"""`optin.json`: what makes a folder with a config and safetensors a pruned model that loads again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from optin_cli.artefacts.facts import DenseFacts, PruningStep
from optin_cli.artefacts.files import read_record, to_json
from optin_cli.errors import ArtefactError

FORMAT = "optin-pruned-model"
SCHEMA_VERSION = 2
"""1 merged no tokens."""
FILE_NAME = "optin.json"


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
    """Block -> sizes left, under the names transformers uses: num_attention_heads, intermediate_size."""
    dense: DenseFacts
    merges: list[int] = field(default_factory=list)
    """Tokens merged behind each block, from the first one on; empty: none."""
    history: list[PruningStep] = field(default_factory=list)
    """The prunings, the last one last."""


def write_pruned(folder: Path, record: PrunedRecord) -> None:
    data = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(record)}
    (folder / FILE_NAME).write_text(to_json(data) + "\n")


def read_pruned(folder: str | Path) -> PrunedRecord:
    """Read `optin.json` of a pruned folder. Raises `ArtefactError` when it is damaged or too new.

    Example:
        >>> record = optin.read_pruned(folder / "small")
        >>> record.kept == small.mask.keep
        True
    """
    path, what = Path(folder) / FILE_NAME, "the record of a pruned model"
    return read_record(
        path, PrunedRecord, what, FORMAT, SCHEMA_VERSION, maker="optin apply", optional=("merges",)
    )


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
