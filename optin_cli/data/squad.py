"""Files in SQuAD's own layout, version 1 or 2: {"data": [{"paragraphs": [{"context", "qas": [...]}]}]}."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optin_cli.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_HEAD = 100_000  # characters within which the first paragraph begins


def looks_like(path: Path) -> bool:
    """Return whether a JSON file is one object with paragraphs in it, rather than rows."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        head = stream.read(_HEAD)
    return head.lstrip().startswith("{") and '"paragraphs"' in head and '"data"' in head


def load(files: list[Path]) -> Dataset:
    """One row a question, with the columns of the hub's `squad`. Raises `InputError` for another layout."""
    import datasets

    text = datasets.Value("string")
    answers = {"text": datasets.List(text), "answer_start": datasets.List(datasets.Value("int32"))}
    features = {"id": text, "title": text, "context": text, "question": text, "answers": answers}
    rows = [row for file in files for row in _rows(file)]
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        for article in json.loads(file.read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    # unanswerable questions may have plausible answers beside: they are none
                    answers = [] if asked.get("is_impossible") else asked.get("answers", [])
                    yield {
                        "id": str(asked.get("id", "")),
                        "title": article.get("title", ""),
                        "context": paragraph["context"],
                        "question": asked["question"],
                        "answers": {key: [a[key] for a in answers] for key in ("text", "answer_start")},
                    }
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{file} is not quite in SQuAD's layout: it lacks {error}",
            "a paragraph has a `context` and `qas`, each of them an `id`, a `question` and `answers`, each of "
            "those a `text` and an `answer_start`",
        ) from error
