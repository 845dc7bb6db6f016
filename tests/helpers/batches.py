"""Batches of tables that stand in the test."""

from __future__ import annotations

from helpers.lazy import Lazy
from helpers.models import shared_model
from optin_cli.data.batches import Batch, Batches
from optin_cli.data.columns import find_columns
from optin_cli.data.examples import Examples
from optin_cli.data.sources import DataSpec

datasets = Lazy("datasets")


def rows_of(table: dict[str, list], classes: list[str] | None = None) -> Examples:
    """All rows of a table, as `sample` gives them, but without a file. `classes` names its labels."""
    rows = datasets.Dataset.from_dict(table)
    if classes:
        rows = rows.cast_column("label", datasets.ClassLabel(names=classes))
    data = DataSpec("DATA")
    ids = list(range(len(rows)))
    return Examples(data, find_columns(rows, data, "text"), ids, rows, len(rows), "")


def text_batches(
    table: dict[str, list],
    batch_size: int = 4,
    name: str = "bert",
    classes: list[str] | None = None,
    **options,
) -> Batches:
    return Batches(rows_of(table, classes), shared_model(name).processor, batch_size, **options)


def real_tokens(batch: Batch, position: int) -> list[int]:
    """Token ids of an example without its padding."""
    return batch.inputs["input_ids"][position][batch.valid[position]].tolist()


def by_example(batches: Batches) -> dict[int, list[int]]:
    """Example id -> its token ids."""
    return {
        example: real_tokens(batch, position)
        for batch in batches
        for position, example in enumerate(batch.example_ids)
    }
