"""Tiny models ranked, pruned and written, as the stages do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from helpers.data import tiny_audio_folder, tiny_image_folder, tiny_text_csv
from helpers.models import new_folder, opened, saved_model
from optin_cli.architectures.families import family_to_dict
from optin_cli.architectures.resolve import dissect
from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.pruned import PrunedRecord
from optin_cli.artefacts.ranking import Ranking
from optin_cli.data.sources import DataSpec
from optin_cli.loading.checkpoint import OpenModel, open_model, save_pruned
from optin_cli.pruning.apply import Applied, apply
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import score
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request
from optin_cli.transforms.slicing import Footprint, slice_model
from optin_cli.transforms.token_merging import merging_options


def data_for(model: OpenModel) -> DataSpec:
    """A few examples of what the model reads, written once. Only for reading."""
    return DataSpec(str(_written(model.family.modality, len(model.anatomy.streams) > 1)))


@cache
def _written(modality: str, transcripts: bool) -> Path:
    if modality == "audio":
        return tiny_audio_folder(new_folder(), transcripts=transcripts)
    return tiny_image_folder(new_folder()) if modality == "image" else tiny_text_csv(new_folder())


def rank(model: OpenModel, folder: Path, method: str = "magnitude") -> Ranking:
    """The ranking is written to `folder`."""
    plan = make_plan(model, data_for(model), ScoreSettings(method=method, samples=8))
    return score(plan, folder / "r.h5")


def pruned(
    name: str, folder: Path, flops: float = 0.5, head: str = "classifier"
) -> tuple[Path, Mask, Applied]:
    """(dense model, mask, what apply said) with the result in folder/out."""
    model = open_model(str(saved_model(name, head)))
    mask = select(rank(model, folder), flops)
    return saved_model(name, head), mask, apply(model, mask, folder / "out")


def uniform(model: OpenModel, folder: Path, flops: float = 0.8, **options: Any) -> Mask:
    """A mask of the same number of units in every layer."""
    return select(rank(model, folder), Request(flops=flops, uniform=True, **options))


def pruned_uniformly(name: str, folder: Path, flops: float = 0.7) -> Path:
    """A tiny model so pruned, in folder/out."""
    model = opened(saved_model(name))
    apply(model, uniform(model, folder, flops), folder / "out")
    return folder / "out"


STEP: Any = {
    "model": {"id": "dense", "digest": ""},
    "mask": "",
    "budget": {"relative_to": "dense"},
    "reached": {"flops": 0.5},
}
"""As much of a pruning as optin reads."""


def sliced_copy(
    dense: Path | str | OpenModel,
    target: Path,
    keep: dict[str, list[int]],
    merges: Sequence[int] = (),
    ranks: Mapping[str, int] | None = None,
    **options: Any,
) -> OpenModel:
    """Slice a model, which changes it, or the one in a folder; write it to `target` and return it as it was before."""
    model = dense if isinstance(dense, OpenModel) else opened(dense, **options)
    whole = {site.name: list(range(site.units)) for site in model.anatomy}
    before = model.record.kept if model.record else whole
    facts, footprint = model.dense, Footprint(model.module)
    slice_model(model.module, model.anatomy.cut(ranks or {}), keep)
    model.anatomy = dissect(model.module, model.family)
    resized = footprint.changes(model.record.resized if model.record else None)
    record = PrunedRecord(
        library=model.source.library,
        architecture=model.source.architecture or type(model.module).__name__,
        task=model.task.name,
        family=family_to_dict(model.family),
        kept={**before, **{site: [before[site][i] for i in indices] for site, indices in keep.items()}},
        per_layer_config={},
        dense=facts,
        merges=list(merges),
        history=[*(model.record.history if model.record else []), STEP],
        resized=resized | {"merging": merging_options(model.anatomy, merges) if any(merges) else None},
    )
    target.mkdir()
    save_pruned(target, model, record)
    return model
