"""Tiny models ranked, pruned and written, as the stages do it."""

from __future__ import annotations

from pathlib import Path

from helpers.data import tiny_audio_folder, tiny_image_folder, tiny_text_csv
from helpers.models import saved_model
from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.ranking import Ranking
from optin_cli.data.sources import DataSpec
from optin_cli.export.apply import Applied, apply
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import score
from optin_cli.selection.select import select


def data_for(model: OpenModel, folder: Path) -> DataSpec:
    """A few examples of what the model reads, written to `folder`."""
    if model.family.modality == "audio":
        transcripts = len(model.anatomy.streams) > 1
        return DataSpec(str(tiny_audio_folder(folder / "audio", transcripts=transcripts)))
    image = model.family.modality == "image"
    return DataSpec(str(tiny_image_folder(folder / "images") if image else tiny_text_csv(folder)))


def rank(model: OpenModel, folder: Path, method: str = "magnitude") -> Ranking:
    """Data and ranking are written to `folder`."""
    plan = make_plan(model, data_for(model, folder), ScoreSettings(method=method, samples=8))
    return score(plan, folder / "r.h5")


def pruned(
    name: str, folder: Path, flops: float = 0.5, head: str = "classifier"
) -> tuple[Path, Mask, Applied]:
    """(dense model, mask, what apply said) with the result in folder/out."""
    model = open_model(str(saved_model(name, head)))
    mask = select(rank(model, folder), flops)
    return saved_model(name, head), mask, apply(model, mask, folder / "out")
