"""`apply`: physically remove what a mask leaves out, in memory or into a model directory that loads again.

Four steps, each handed what is open: check that mask and model fit, compensate, slice, write and verify. What was
written is loaded back and compared with the masked dense model on real calibration rows before it gets its final name:
what is on disk is what was checked. Compensation comes before both: the masked model with the new weights is what the
sliced one is compared with. Where the mask merges tokens, weights are compensated on whole sequences first, and both
sides of the comparison run with the schedule.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from optin_cli.architectures.families import family_to_dict
from optin_cli.architectures.resolve import dissect
from optin_cli.architectures.token_sites import check_merges
from optin_cli.artefacts.changes import Change, changes, explain, explain_new
from optin_cli.artefacts.facts import ContentFacts, PruningStep, SeenLengths
from optin_cli.artefacts.files import atomic_dir, check_replaceable, check_space
from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.provenance import library_versions
from optin_cli.artefacts.pruned import FILE_NAME, PrunedRecord, read_checked, size_name, write_pruned
from optin_cli.compensation.batch_norm import reestimate
from optin_cli.compensation.compensate import compensate
from optin_cli.compensation.least_squares import NONE
from optin_cli.compensation.plan import CompensationPlan
from optin_cli.compensation.settings import Progress, SiteFit
from optin_cli.data.batches import Batches
from optin_cli.data.lengths import warn_if_short
from optin_cli.data.likeness import content_of
from optin_cli.errors import ArtefactError, OptinError, OutputDiffers, UsageError, param
from optin_cli.execution.rotation import check_rankable, with_turned_heads
from optin_cli.loading.checkpoint import OpenModel, open_like
from optin_cli.loading.reshaping import remember
from optin_cli.loading.stock import as_stock
from optin_cli.pruning.check import Check, CheckRows, check_batches, check_rows, expect
from optin_cli.pruning.model_card import write_card
from optin_cli.pruning.writers import DIRECTORY_WRITER, Comparison, Writer, compare_outputs
from optin_cli.structure.anatomy import HEADS, NEURONS, Anatomy
from optin_cli.transforms.slicing import Footprint, slice_model
from optin_cli.transforms.token_merging import install_merges, merging_options

log = logging.getLogger("optin")

_PRUNED = " (pruned)"
_CONFIG_NAMES = {HEADS: "num_attention_heads", NEURONS: "intermediate_size"}


@dataclass(frozen=True)
class Applied:
    """The result of `apply`, and how well it matches the masked model."""

    path: Path | None
    """The directory that it was written to; None for a model in memory alone."""
    deviation: float
    """Largest absolute difference between the outputs of the masked and the sliced model, as it was loaded back."""
    checked_on: str
    params: int
    dense_params: int
    fits: tuple[SiteFit, ...] = ()
    """The result of compensation at each site; empty without compensation."""
    reused: bool = False
    tolerance: float = 0.0
    """The largest deviation that would have passed."""
    lengths: SeenLengths | None = None
    """Of the texts that it was scored and refitted on; None in records from before they were kept."""


@dataclass(repr=False)
class PrunedModel(OpenModel):
    """A model that was pruned, ready to run, and how it came about. Its record is what `optin.json` holds."""

    report: Applied = field(kw_only=True)
    mask: Mask = field(kw_only=True)
    check: Check | None = field(default=None, kw_only=True, repr=False)
    """The examples that it was compared on; None if it was read from a directory."""


def check_output(output: Path, model: OpenModel) -> None:
    """Raise `UsageError` unless `output` can be written, and is free or a pruned model other than the one being read.

    Raises `InputError` where the disk is full.
    """
    check_replaceable(output, FILE_NAME, "optin", "pruned models", model.source.folder)


def check_unmade(output: Path) -> None:
    """Raise `UsageError` if a pruned model is at `output`: without a ranking it can't be compared."""
    if (output / FILE_NAME).is_file():
        raise UsageError(
            f"{output} holds a pruned model already, and the ranking to compare it by is still to be made",
            f"choose another name, or {param('force', True)} to replace it",
        )


def existing(
    output: Path, model: OpenModel, mask: Mask, plan: CompensationPlan | None = None
) -> Applied | None:
    """The pruned model already at `output` if it came from this model, mask and compensation; None if nothing is there.

    Raises `UsageError` when another pruned model is there.
    """
    if not (output / FILE_NAME).is_file():
        explain_new(output)
        return None
    mask = _without_empty_ranks(mask)
    last = read_checked(output).history[-1]
    # earlier models lack entries
    without = dict.fromkeys(("bn", "producers", "readout"), False)
    recorded = {**without, **last.get("compensation", {"method": NONE})}
    asked = plan.identity() if plan else {**without, "method": NONE}
    same = (last["mask"], last["model"]["digest"]) == (mask.digest, model.digest)
    refit = changes(recorded, asked)
    explain(output, [*_inputs_changed(last, model, mask), *refit], ("model", "mask", "compensation"))
    if not same or refit:
        what = "compensation" if same else "mask or model"
        raise OutputDiffers(
            f"{output} exists, made with another {what}",
            f"choose another name, or {param('force', True)} to replace it",
        )
    return recorded_report(output, model.dense["params"])


def _inputs_changed(last: PruningStep, model: OpenModel, mask: Mask) -> list[Change]:
    """How model and mask differ from those of a pruning; of two masks what they were made from."""
    was = {"model": last["model"]["digest"], "mask": last["mask"]}
    differs = changes(was, {"model": model.digest, "mask": mask.digest})
    if last["mask"] == mask.digest:
        return differs
    differs += changes({"ranking": last["ranking"]}, {"ranking": mask.ranking_digest})
    return differs + changes(dict(last["budget"]), dict(mask.budget))


def recorded_report(output: Path, dense_params: int) -> Applied:
    """What the record of a pruned model says about the way it was made."""
    last = read_checked(output).history[-1]
    known = {field.name for field in fields(SiteFit)}
    sites = last.get("compensation", {}).get("sites", ())
    fits = tuple(SiteFit(**{name: fit[name] for name in known & set(fit)}) for fit in sites)
    return Applied(
        output,
        last["deviation"],
        last["checked_on"],
        last["params"],
        dense_params,
        fits,
        reused=True,
        tolerance=last.get("tolerance", 0.0),
        lengths=last.get("lengths"),
    )


def reopened(applied: Applied, model: OpenModel, mask: Mask) -> PrunedModel:
    """The pruned model that `existing` found, opened as `model` was."""
    assert applied.path is not None
    return _pruned(open_like(applied.path, model), applied, mask, None)


def apply(
    model: OpenModel,
    mask: Mask,
    output: Path,
    batches: Batches | None = None,
    plan: CompensationPlan | None = None,
    on_progress: Progress = lambda *_: None,
    teacher: OpenModel | None = None,
    writer: Writer = DIRECTORY_WRITER,
) -> Applied:
    """`prune_model`, for those who want what was written alone: its report."""
    return prune_model(model, mask, output, batches, plan, on_progress, teacher, writer).report


def prune_model(
    model: OpenModel,
    mask: Mask,
    output: Path | None = None,
    batches: Batches | None = None,
    plan: CompensationPlan | None = None,
    on_progress: Progress = lambda *_: None,
    teacher: OpenModel | None = None,
    writer: Writer = DIRECTORY_WRITER,
) -> PrunedModel:
    """Slice `model` by `mask`, compensated by `plan`, and write it to `output` if that is given.

    The model in memory is consumed: what comes back holds its module, or what `writer` loaded back from `output`.
    `teacher` is what compensation follows: by default the model itself. The sliced model is compared with the masked
    one on a few examples of `batches`, by default the plan's; without either, of the mask's own calibration data.
    Raises `ArtefactError` when mask and model don't belong together, `InputError` for merges that the model can't
    run, and `OptinError` when the check fails. The mask's schedule replaces the one that the model runs with.
    """
    mask = _without_empty_ranks(mask)
    check_fit(model, mask)
    if output is not None:
        check_output(output, model)
        check_space(output, mask.reached["params"] * model.stored_dtype.itemsize)
    rows = check_rows(model, mask, batches or (plan.batches if plan else None))
    if mask.ranks:
        model = _turned(model, mask, batches, plan)
    fits = _compensate(model, mask, plan, on_progress, teacher)
    if model.merging:
        model.merging.remove()
    check = expect(model, mask, rows)
    record = _record(model, mask)
    record.history[-1]["compensation"] = _compensation(plan, fits)
    record.history[-1]["lengths"] = seen = _lengths(mask, plan)
    record.history[-1]["content"] = _content(mask, plan)
    warn_if_short(seen["refitted"], f"{model.spec} is refitted")
    small = _sliced(model, mask, record)
    if output is None:
        found = check.outputs(small)
        report = _report(None, small, record, rows, compare_outputs(check.expected, found, small.dtype), fits)
        return _pruned(small, report, mask, check)
    return write_verified(
        _pruned(small, Applied(None, 0.0, "", 0, 0, tuple(fits)), mask, check), output, writer
    )


def write_verified(model: PrunedModel, output: Path, writer: Writer = DIRECTORY_WRITER) -> PrunedModel:
    """Write a pruned model, load it back and compare it with the masked one; only then it gets its final name.

    Returns what was loaded back, where that is an `OpenModel`. Raises `OptinError` when the check fails; nothing is
    written then.
    """
    record, check = model.record, model.check
    assert record is not None and check is not None
    with atomic_dir(output) as folder:
        writer.save(folder, model, record)
        loaded = writer.load(folder, model)
        compared = writer.compare(check.expected, check.outputs(loaded), model.dtype)
        report = _report(output, model, record, check.rows, compared, model.report.fits)
        write_pruned(folder, record)
        if writer is DIRECTORY_WRITER:
            write_card(folder, model, record, output)
    if not isinstance(loaded, OpenModel):
        return _pruned(model, report, model.mask, check)
    source = replace(loaded.source, spec=str(output), folder=output, record=record)
    return _pruned(replace(loaded, source=source), report, model.mask, check)


def _without_empty_ranks(mask: Mask) -> Mask:
    """A rank of 0 is no head."""
    empty = [name for name, rank in mask.ranks.items() if rank == 0]
    keep = {**mask.keep, **{name: [] for name in empty}}
    ranks = {name: rank for name, rank in mask.ranks.items() if rank and keep[name]}
    return replace(mask, keep=keep, ranks=ranks) if ranks != mask.ranks else mask


def _turned(
    model: OpenModel, mask: Mask, batches: Batches | None, plan: CompensationPlan | None
) -> OpenModel:
    """The model with its heads turned as their ranks need it, by what they do on the rows that it is compensated on,
    or else compared on."""
    rows = plan.batches if plan else batches
    turned = with_turned_heads(model, rows or check_batches(model, mask), mask.ranks, inplace=True)
    return replace(turned, anatomy=turned.anatomy.cut(mask.ranks))


def _compensate(
    model: OpenModel,
    mask: Mask,
    plan: CompensationPlan | None,
    on_progress: Progress,
    teacher: OpenModel | None,
) -> list[SiteFit]:
    """Refit the model in place, on whole sequences."""
    if plan is None:
        return []
    with model.unmerged(), teacher.unmerged() if teacher else nullcontext():
        fits = compensate(model, mask.keep, plan.batches, plan.settings, on_progress, teacher)
        if plan.settings.bn:
            reestimate(model, plan.batches, mask.keep)
    return fits


def _sliced(model: OpenModel, mask: Mask, record: PrunedRecord) -> OpenModel:
    """The model without the units that the mask leaves out, merging tokens by the mask's schedule."""
    footprint = Footprint(model.module)
    uniform = bool(mask.budget.get("uniform"))
    slice_model(model.module, model.anatomy, mask.keep, uniform=uniform)
    anatomy = dissect(model.module, model.family)
    record.resized = footprint.changes(model.record.resized if model.record else None) | {"merging": None}
    merging = None
    if any(mask.merges):
        merging = install_merges(model.module, anatomy, mask.merges, what="the mask")
        record.resized["merging"] = merging_options(anatomy, mask.merges)
    source = model.source
    if uniform:
        source = as_stock(model.module, anatomy, source, record)
    if source.library == "transformers":
        remember(model.module, record)
    spec = model.spec.removesuffix(_PRUNED) + _PRUNED
    source = replace(source, spec=spec, record=record, in_memory=True)
    return replace(model, source=source, anatomy=anatomy, merging=merging)


def _report(
    path: Path | None,
    model: OpenModel,
    record: PrunedRecord,
    rows: CheckRows,
    compared: Comparison,
    fits: Sequence[SiteFit],
) -> Applied:
    """Summarise the result, also in the record. Raises `OptinError` if the comparison finds the slicing wrong."""
    if not compared.same:
        raise OptinError(
            f"the sliced model differs from the masked one by {compared.deviation:.2e}, more than the "
            f"{compared.tolerance:.0e} that {model.dtype_name} explains; nothing was written",
            "this is a fault in the family's table or in optin: please report it with the mask",
        )
    params = sum(p.numel() for p in model.module.parameters())
    deviation, allowed = compared.deviation, compared.tolerance
    record.history[-1] |= {
        "deviation": deviation,
        "tolerance": allowed,
        "checked_on": rows.where,
        "params": params,
    }
    dense = model.dense["params"]
    return Applied(
        path,
        deviation,
        rows.where,
        params,
        dense,
        tuple(fits),
        tolerance=allowed,
        lengths=record.history[-1].get("lengths"),
    )


def _pruned(model: OpenModel, report: Applied, mask: Mask, check: Check | None) -> PrunedModel:
    parts = {field.name: getattr(model, field.name) for field in fields(OpenModel)}
    return PrunedModel(**parts, report=report, mask=mask, check=check)


def _compensation(plan: CompensationPlan | None, fits: list[SiteFit]) -> dict[str, Any]:
    """Return the record's entries about a compensation."""
    if plan is None:
        return {"method": NONE}
    return {**plan.describe(), "sites": [asdict(fit) for fit in fits]}


def _lengths(mask: Mask, plan: CompensationPlan | None) -> SeenLengths:
    refitted = plan.lengths if plan and plan.settings.method != NONE else None
    return {"scored": mask.calibration.get("lengths"), "refitted": refitted}


def _content(mask: Mask, plan: CompensationPlan | None) -> ContentFacts | None:
    """Of the rows of a refit: they decide most; without one, of those that were scored."""
    refitted = plan is not None and plan.settings.method != NONE
    return content_of(plan.batches) if plan and refitted else mask.calibration.get("content")


def check_fit(model: OpenModel, mask: Mask) -> None:
    """Raise `ArtefactError` unless `mask` was selected for exactly this model."""
    here = {site.name: site.units for site in model.anatomy}
    if mask.units != here:
        odd = [n for n in sorted(set(here) | set(mask.units)) if here.get(n) != mask.units.get(n)]
        raise ArtefactError(
            f"the mask is for other sites than {model.spec} has: {odd[0]} has {here.get(odd[0], 0)} units, "
            f"the mask says {mask.units.get(odd[0], 0)}",
            "select from a ranking of this model"
            if mask.family == model.family.name
            else f"it was scored with the table {mask.family!r}, and this is {model.family.name!r}: give the same "
            f"{param('family', meta='FILE.yaml')}",
        )
    if mask.model_digest != model.digest:
        raise ArtefactError(
            f"the mask belongs to other weights ({mask.model_digest[:12]}) than {model.spec} ({model.digest[:12]})",
            "score and select with this model, or give the model the ranking was made on",
        )
    check_merges(model.anatomy, mask.merges, "the mask")
    if mask.ranks:
        check_rankable(model)
    for name, rank in mask.ranks.items():
        site = model.anatomy[name]
        if site.ranks is None or rank > site.width:
            why = f"heads of {site.width} dimensions" if site.ranks else f"{site.kind} that have no rank"
            raise ArtefactError(
                f"the mask keeps {rank} dimensions of {name}, and {model.spec} has {why} there",
                "select from a ranking of this model",
            )


def _record(model: OpenModel, mask: Mask) -> PrunedRecord:
    """The record of the model to come; what it was made from goes into its history."""
    earlier = model.record
    kept = mask.keep
    if earlier is not None:  # indices count in the dense original, however often it was pruned
        kept = {name: [earlier.kept[name][i] for i in indices] for name, indices in mask.keep.items()}
    step: PruningStep = {
        "model": {"id": model.spec, "digest": model.digest},
        "ranking": mask.ranking_digest,
        "mask": mask.digest,
        "budget": mask.budget,
        "reached": mask.reached,
        "versions": library_versions(),
    }
    return PrunedRecord(
        library=model.source.library,
        architecture=model.source.architecture or type(model.module).__name__,
        task=model.task.name,
        family=family_to_dict(model.family),
        kept=kept,
        per_layer_config=_per_layer(model.anatomy, mask, earlier.per_layer_config if earlier else {}),
        dense=model.dense,
        merges=mask.merges,
        sized_config=earlier is not None and earlier.sized_config,
        history=[*(earlier.history if earlier else []), step],
    )


def _per_layer(
    anatomy: Anatomy, mask: Mask, earlier: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    layers: dict[str, dict[str, int]] = {}
    for site in anatomy:
        layer, units = layers.setdefault(str(site.block), {}), len(mask.keep[site.name])
        plain = site.label == site.kind  # of two sites of heads, one has another name
        layer[_CONFIG_NAMES.get(site.kind, site.label) if plain else site.label] = units * site.group
        if site.rank or size_name(site.label) in earlier.get(str(site.block), {}):
            layer[size_name(site.label)] = site.kept_width
        if site.group > 1 or site.one_group or "num_key_value_heads" in earlier.get(str(site.block), {}):
            layer["num_key_value_heads"] = min(units, 1) if site.one_group else units
    return layers
