"""The plan of a compensation: the settings, the rows, and what makes two compensations the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optin_cli.artefacts.facts import LengthFacts
from optin_cli.artefacts.files import digest_json
from optin_cli.artefacts.mask import Mask
from optin_cli.compensation.batch_norm import check_norms
from optin_cli.compensation.least_squares import NONE
from optin_cli.compensation.settings import Compensation
from optin_cli.data.batches import Batches
from optin_cli.data.lengths import text_lengths
from optin_cli.data.opening import open_batches
from optin_cli.data.packing import cover_positions
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, OptinError, param
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.loading.processors import most_positions


@dataclass
class CompensationPlan:
    """Everything `compensate` needs besides the model."""

    settings: Compensation
    batches: Batches
    lengths: LengthFacts | None = None
    """Of the texts; None for other data."""

    def identity(self) -> dict[str, Any]:
        """Return the facts that make two compensations of one model and mask the same work."""
        examples = self.batches.examples
        return {
            **self.settings.identity(),
            "fingerprint": examples.fingerprint,
            "row_ids": digest_json(examples.row_ids),
        }

    def describe(self) -> dict[str, Any]:
        """Return what `optin.json` records."""
        examples = self.batches.examples
        data = {"spec": examples.data.spec, "config": examples.data.config, "split": examples.data.split}
        return {**self.identity(), "data": data, "rows": len(examples.row_ids)}


def own_data(mask: Mask, workers: int | None = None) -> DataSpec:
    """The data that the mask's ranking was made on."""
    source = mask.calibration
    return DataSpec(
        source["spec"], source["split"], source["config"], tuple(source["text"]), source["label"], source["image"],
        source.get("stream", False), workers, source.get("mask"), source.get("ignore_index", 255), source.get("audio"),
    )  # fmt: skip


def make_plan(
    model: OpenModel,
    mask: Mask,
    settings: Compensation,
    data: DataSpec | None = None,
    *,
    at_most: bool = False,
    workers: int | None = None,
) -> CompensationPlan | None:
    """Open the rows to compensate on: of `data`, or more of the mask's own. None if nothing is to be compensated.

    With `at_most`, fewer rows than the settings ask for raise no note. `workers` decode the images of the
    mask's own data. Raises what the data raises; `InputError` when the mask's own data is gone, and `UsageError` for
    statistics of BatchNorms where there are none.
    """
    if settings.bn:
        check_norms(model)
    elif settings.method == NONE:
        return None
    try:
        batches = open_batches(
            data or own_data(mask, workers),
            model,
            settings.samples,
            settings.batch_size,
            settings.seed,
            at_most=at_most,
            max_length=settings.max_length,
        )
    except OptinError as error:
        if data is not None:
            raise
        raise InputError(
            f"the calibration data of the mask can't be read again to compensate on it ({error.template[0]})",
            f"give other rows with {param('data', meta='DATA')}, or leave it out with {param('compensate', 'none')}",
        ) from error
    covering = cover_positions(batches, settings.joined, settings.holds_out, settings.seed)
    lengths = text_lengths(covering, most_positions(getattr(model.module, "config", None)))
    return CompensationPlan(settings, covering, lengths)
