"""`optin-vocab.json`: which tokens a model with fewer of them has, and how they were chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from optin_cli.artefacts.facts import DataFacts
from optin_cli.artefacts.files import read_record, to_json

FORMAT = "optin-vocabulary"
SCHEMA_VERSION = 1
FILE_NAME = "optin-vocab.json"


class ReducedFrom(TypedDict):
    """The model whose tokens were chosen from."""

    id: str
    digest: str
    task: str
    tokens: int
    """Rows of its embedding."""
    params: int


@dataclass
class VocabularyRecord:
    """The tokens that were kept, and why."""

    model: ReducedFrom
    data: DataFacts
    settings: dict[str, Any]
    """`keep`, `coverage`, `samples` and `seed`, as they were asked for."""
    kind: str
    """WordPiece, BPE or Unigram."""
    kept: list[int]
    """Old id of each token: the new id is the place in this list."""
    tokens: int
    """Rows of the embedding: ids in `kept` beyond the model's rows have none."""
    params: int
    always: int
    """Tokens that are kept whatever the data has."""
    counted: int
    """Tokens of the data, special ones not counted."""
    covered: float
    """Share of those that are kept."""
    unseen: float
    """Share of the tokens of more text of the same kind that the data has not, as Good (1953) estimates it: of those it
    has once. Text whose subjects change has more of them."""
    deviation: float
    """Largest absolute difference of the outputs from those of the model it was made from."""
    checked_on: str
    versions: dict[str, str]

    def facts(self) -> dict[str, Any]:
        """The same in a few numbers."""
        return {
            "tokens": self.tokens,
            "dense_tokens": self.model["tokens"],
            "always": self.always,
            "counted": self.counted,
            "covered": self.covered,
            "unseen": self.unseen,
            "params": self.params,
            "dense_params": self.model["params"],
            "deviation": self.deviation,
            "checked_on": self.checked_on,
        }


def write_vocabulary(folder: Path, record: VocabularyRecord) -> None:
    data = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(record)}
    (folder / FILE_NAME).write_text(to_json(data) + "\n")


def read_vocabulary(folder: Path) -> VocabularyRecord:
    """Read the record of a directory. Raises `ArtefactError` when it is damaged or too new."""
    return read_record(
        folder / FILE_NAME, VocabularyRecord, "the record of a smaller vocabulary", FORMAT, SCHEMA_VERSION,
        maker="optin vocab",
    )  # fmt: skip
