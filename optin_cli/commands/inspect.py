"""`optin inspect`."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer

from optin_cli import console
from optin_cli.artefacts import exported, latency, vocabulary
from optin_cli.artefacts.exported import ExportedFile, ExportRecord, read_export, record_of
from optin_cli.artefacts.facts import Asked, LengthFacts
from optin_cli.artefacts.files import read_json
from optin_cli.artefacts.kinds import stated_kind
from optin_cli.artefacts.latency import LatencyTable, read_latency_table
from optin_cli.artefacts.mask import Mask, read_mask
from optin_cli.artefacts.point import SUFFIX, read_sweep
from optin_cli.artefacts.pruned import FILE_NAME, PrunedRecord, check_weights, ranks_of, read_checked
from optin_cli.artefacts.ranking import Ranking, read_ranking
from optin_cli.artefacts.vocabulary import read_vocabulary
from optin_cli.commands import drawing, options
from optin_cli.commands.present import (
    exchanged,
    exported_facts,
    mask_facts,
    merged,
    point_facts,
    ranked,
    ranking_facts,
    show_fits,
    show_points,
    show_sizes,
)
from optin_cli.data.lengths import describe
from optin_cli.errors import UsageError
from optin_cli.importance import AUTO, output_scale, own_output_weight, scored_with
from optin_cli.selection.budgets import budget_kinds
from optin_cli.selection.stability import (
    ALL,
    BUDGETS,
    FEWEST_BATCHES,
    TARGET,
    Stability,
    calibration_examples,
)
from optin_cli.selection.stability import stability as measure_stability

log = logging.getLogger("optin")
HEADS = "heads"


def inspect(
    artefact: Annotated[
        str, typer.Argument(metavar="FILE_OR_DIR", help="Ranking, mask, model, sweep or export.")
    ],
    writing: options.Shown,
    trust_remote_code: options.TrustRemoteCode,
    stability: Annotated[
        bool,
        typer.Option("--stability", help="How much a ranking's scores owe to which examples were drawn."),
    ] = False,
    target: Annotated[
        float, typer.Option("--target", help="Rank agreement that --stability counts the samples for.")
    ] = TARGET,
) -> None:
    """Show what any artefact holds and where it came from.

    Examples:

      optin inspect rankings/minilm.h5

      optin inspect rankings/minilm.h5 --stability

      optin inspect m-60.mask.json

      optin inspect m-60/

      optin inspect m-60-onnx/
    """
    json = writing.json
    path = Path(artefact).expanduser()
    if stability:
        _show_stability(path, read_ranking(path), target, json)
    elif (path / FILE_NAME).is_file():
        _show_pruned(path, read_checked(path), json)
    elif (path / exported.FILE_NAME).is_file():
        record = read_export(path / exported.FILE_NAME)
        _show_exported(path, record, record.files, json)
    elif path.is_dir() and any(path.glob(f"*{SUFFIX}")):
        _show_sweep(path, json)
    elif path.is_dir() or artefact.startswith(("demo:", "timm:", "torchvision:")):
        _show_model(artefact, json, trust_remote_code)
    elif not path.exists():
        raise UsageError(f"nothing at {artefact}")
    elif (found := record_of(path)) is not None:
        name, record, _ = found
        _show_exported(path, record, {name: record.files[name]}, json)
    elif path.suffix == ".json" or stated_kind(path) not in (None, "ranking"):
        _show_json(path, json)
    else:
        _show_ranking(path, read_ranking(path), json)


def _show_ranking(path: Path, ranking: Ranking, json: bool) -> None:
    if json:
        console.emit_json({"kind": "ranking", "path": str(path), **ranking_facts(ranking)})
        return
    features, by_budget = scored_with(ranking), ranking.settings.get("feature_weights") == AUTO
    facts = [
        ["model", f"{ranking.model['id']} ({ranking.model['class']}, {ranking.model['task']})"],
        ["weights", ranking.model["digest"][:16]],
        ["data", f"{ranking.data['spec']} ({ranking.data['split']}), {len(ranking.row_ids)} rows"],
        ["method", ranking.method],
        ["lambda", f"{own_output_weight(ranking):g} (x {output_scale(ranking.sites, features):.3g})"],
        ["features", f"auto ({features} here; each budget decides)" if by_budget else features],
        ["mean tokens", f"{ranking.tokens:.2f}"],
        *([["texts", describe(seen)]] if (seen := ranking.data.get("lengths")) else []),
        *([["merging tokens", "measured"]] if ranking.token_sites else []),
        *([["ranks of heads", f"measured at {len(ranking.rank_sites)} sites"]] if ranking.rank_sites else []),
        *([["whole sublayers", f"measured at {len(ranking.sublayers)} sites"]] if ranking.sublayers else []),
        ["MACs in sites", console.count(ranking.macs(ranking.tokens))],
        ["MACs elsewhere", console.count(ranking.dense.get("fixed_macs", 0))],
        ["made", f"{ranking.created} in {console.duration(ranking.seconds)} on {ranking.device}"],
        ["digest", ranking.digest[:16]],
    ]
    console.facts(f"{path}: ranking", facts)
    rows = []
    for site in ranking.sites:
        spread = np.quantile(site.score, [0.1, 0.5, 0.9]) if site.units else [np.nan] * 3
        rows.append([site.name, str(site.units), console.count(site.macs_per_unit(ranking.tokens))])
        rows[-1] += [f"{value:.3g}" for value in spread]
    console.table("", ["site", "units", "MACs a unit", "p10", "median", "p90"], rows, stdout=True)
    console.data("")
    plain, sites = console.plain_characters(), ranking.sites
    notes = {site.name: f"{np.median(site.score):.3g}" if site.units else "" for site in sites}
    bars = drawing.bars(drawing.log_shares(sites), notes, plain=plain)
    console.drawing("median score, on a logarithmic axis", drawing.lines(bars))
    heads = drawing.heat([site for site in sites if site.kind == HEADS], plain=plain)
    console.drawing("heads, by the rank of their score (fuller is higher)", drawing.lines(heads))


def _show_stability(path: Path, ranking: Ranking, target: float, json: bool) -> None:
    if not 0 < target < 1:
        raise UsageError(f"--target {target:g} is no rank agreement", "give more than 0 and less than 1")
    found = measure_stability(ranking, target)
    told = _stability_note(ranking, found)
    if json:
        content = asdict(found) | {"needed": found.needed} if found else {"agreement": None}
        console.emit_json({"kind": "stability", "path": str(path), **content, "note": told})
        return
    facts = [
        [
            "data",
            f"{ranking.data['spec']} ({ranking.data['split']}), {calibration_examples(ranking)} examples",
        ],
        ["batches", str(len(ranking.batch_weights))],
        ["verdict", told],
    ]
    console.facts(f"{path}: stability", facts)
    if found is None:
        return
    rows = []
    for name, of in found.agreement.items():
        needed = str(of.needed) if of.needed is not None else "?"
        rows.append([name, str(of.units), f"{of.halves:.3f}", f"{of.full:.3f}", needed])
        rows[-1] += [f"{100 * of.error:.1f} %", *(f"{100 * share:.1f} %" for share in of.undecided.values())]
    cuts = [f"undecided at {budget:g}" for budget in BUDGETS]
    columns = ["units", "", "half : half", "all : all", f"samples for {target:g}", "error of a score", *cuts]
    console.table("", columns, rows, stdout=True)
    if found.low:
        log.warning("%s", told)


def _stability_note(ranking: Ranking, found: Stability | None) -> str:
    """One sentence: how far another draw of examples would agree, and what would make it agree more."""
    batches = len(ranking.batch_weights)
    if found is None:
        if batches < FEWEST_BATCHES and any(len(site.by_batch) for site in ranking.sites):
            return f"can't be told from {batches} batch{'es' * (batches > 1)}: score {FEWEST_BATCHES} or more"
        return f"can't be told: a {ranking.method} ranking holds no scores by batch"
    agreement = found.agreement[ALL].full
    told = f"another draw of {found.examples} examples would rank units with Spearman {agreement:.3f}"
    if not found.low:
        return told
    if found.needed is None:
        return f"{told}: too little to tell how many samples would do"
    return f"{told}: score with --samples {found.needed} for {found.target:g}"


def _show_json(path: Path, json: bool) -> None:
    stated = read_json(path, "a mask or a latency table").get("format")
    if stated == latency.FORMAT:
        _show_latency_table(path, read_latency_table(path), json)
    elif stated == exported.FORMAT:
        record = read_export(path)
        _show_exported(path, record, record.files, json)
    else:
        _show_mask(path, read_mask(path), json)


def _show_mask(path: Path, mask: Mask, json: bool) -> None:
    if json:
        console.emit_json({"kind": "mask", "path": str(path), **mask_facts(mask)})
        return
    facts = [
        ["budget", _asked(mask.budget)],
        [
            "reached",
            f"{mask.reached['flops']:.6f} ({console.count(mask.reached['macs'])} at "
            f"{mask.budget['tokens']:.1f} tokens)",
        ],
        *_predicted(mask),
        ["score kept", f"{100 * mask.objective['kept']:.3f} %, gap {100 * mask.objective['gap']:.5f} %"],
        *([["interactions", exchanged(mask)]] if exchanged(mask) else []),
        ["ranking", mask.ranking_digest[:16]],
        ["weights", mask.model_digest[:16]],
    ]
    console.facts(f"{path}: mask", facts)
    sizes = {name: len(units) for name, units in mask.keep.items()}
    show_sizes(sizes | ranked(mask.ranks) | merged(mask.merges), mask.units)
    console.data("")
    plain = console.plain_characters()
    shares = {name: len(mask.keep[name]) / units if units else 0.0 for name, units in mask.units.items()}
    bars = drawing.bars(shares, {name: f"{100 * share:.0f} %" for name, share in shares.items()}, plain=plain)
    console.drawing("units kept", drawing.lines(bars))
    heads = {name: units for name, units in mask.units.items() if name.endswith(HEADS)}
    console.drawing(
        "heads, as they are kept or removed", drawing.lines(drawing.kept(mask.keep, heads, plain=plain))
    )


def _asked(budget: Asked) -> str:
    """`0.6 of the dense MACs, 12.5 ms`: every budget that a mask was asked to meet."""
    found = [one for kind in budget_kinds().values() for one in kind.recorded(budget)]
    return ", ".join(one.words(budget["relative_to"]) for one in found)


def _predicted(mask: Mask) -> list[list[str]]:
    if not (table := mask.budget.get("latency_table")):
        return []
    where = f"batch {table['batch_size']} at size {table['size']}, {table['device']}, {table['dtype']}"
    reached = mask.reached
    return [
        ["latency", f"{reached['latency_ms']:.2f} of {reached['table_latency_ms']:.2f} ms predicted, {where}"]
    ]


def _show_latency_table(path: Path, table: LatencyTable, json: bool) -> None:
    sites = table.sites.items()
    whole = {name: float(table.site_ms(name, [site["units"]])[0]) for name, site in sites}
    if json:
        console.emit_json(
            {
                "kind": "latency table",
                "path": str(path),
                **asdict(table),
                "digest": table.digest,
                "whole_ms": whole,
            }
        )
        return
    setting = table.setting
    threads = f", {setting['processor']}, {setting['threads']} threads" if setting["processor"] else ""
    facts = [
        ["model", f"{table.model['id']} ({table.model['digest'][:16]})"],
        ["setting", f"batch {setting['batch_size']} at size {setting['size']}, {setting['dtype']}"],
        ["device", f"{setting['device']}{threads}"],
        ["latency", f"{table.total_ms:.2f} ms, {table.fixed_ms:.2f} ms of it outside the sites"],
        ["made", table.created],
        ["digest", table.digest[:16]],
    ]
    console.facts(f"{path}: latency table", facts)
    rows = [
        [name, str(site["units"]), f"{whole[name]:.3f}", *_at(table, name, site["units"])]
        for name, site in sites
    ]
    console.table("", ["site", "units", "ms", "at 3/4", "at 1/2", "at 1/4"], rows, stdout=True)


def _at(table: LatencyTable, name: str, units: int) -> list[str]:
    return [f"{ms:.3f}" for ms in table.site_ms(name, [units * 3 // 4, units // 2, units // 4])]


def _show_pruned(path: Path, record: PrunedRecord, json: bool) -> None:
    check_weights(path)
    sizes = {name: len(kept) for name, kept in record.kept.items()}
    if json:
        content: dict[str, Any] = {
            "kind": "pruned model",
            "path": str(path),
            "architecture": record.architecture,
            "task": record.task,
            "units": sizes,
            "per_layer_config": record.per_layer_config,
            "merges": record.merges,
            "dense": record.dense,
            "history": record.history,
            "vocabulary": _vocabulary(path),
        }
        console.emit_json(content)
        return
    facts = [
        ["architecture", f"{record.architecture} ({record.library}), {record.task}"],
        ["dense model", f"{record.dense['id']} ({record.dense['digest'][:16]})"],
        ["parameters", f"{record.history[-1]['params']:,} of {record.dense['params']:,}"],
        *_tokens(path),
    ]
    for number, step in enumerate(record.history, 1):
        budget, where = step["budget"], step["checked_on"]
        facts.append(
            [
                f"pruning {number}",
                f"to {step['reached']['flops']:.4f} of the {budget['relative_to']} MACs from {step['model']['id']}; "
                f"differs from the mask by {step['deviation']:.1e} on {where}"
                + (
                    "; statistics of BatchNorms measured anew"
                    if step.get("compensation", {}).get("bn")
                    else ""
                ),
            ]
        )
        for what, seen in step.get("lengths", {}).items():
            if seen:
                facts.append([f"{what} on texts", describe(cast(LengthFacts, seen))])
    console.facts(f"{path}: pruned model", facts)
    show_sizes(sizes | ranked(ranks_of(record)) | merged(record.merges))
    console.data("")
    largest: dict[str, int] = {}
    for name, count in sizes.items():
        largest[_kind(name)] = max(count, largest.get(_kind(name), 1))
    shares = {name: count / largest[_kind(name)] for name, count in sizes.items()}
    bars = drawing.bars(shares, {name: str(n) for name, n in sizes.items()}, plain=console.plain_characters())
    console.drawing("units, beside the largest site of their kind", drawing.lines(bars))
    for number, step in enumerate(record.history, 1):
        done = step.get("compensation", {})
        if done.get("sites"):
            where = f"{done['rows']} rows of {done['data']['spec']}"
            title = f"compensation of pruning {number} ({done['method']}) on {where}"
            show_fits(title, done["sites"], stdout=True)


def _kind(site: str) -> str:
    return site.rpartition(".")[2]


def _show_sweep(path: Path, json: bool) -> None:
    sweep = read_sweep(path)
    if json:
        points = [point_facts(sweep, point) for point in sweep.points]
        console.emit_json({"kind": "sweep", "path": str(path), "points": points})
        return
    model = sweep.points[0].model
    console.facts(f"{path}: sweep", [["model", f"{model['id']} ({model['digest'][:16]})"]])
    show_points(sweep.points, stdout=True)
    shares = {point.name: point.share for point in sweep.points}
    notes = {point.name: "" if point.drop is None else f"drop {point.drop:.2f}" for point in sweep.points}
    console.data("")
    bars = drawing.bars(shares, notes, plain=console.plain_characters())
    console.drawing("MACs kept", drawing.lines(bars))


def _show_exported(path: Path, record: ExportRecord, files: dict[str, ExportedFile], json: bool) -> None:
    """All that a record says of some of its files."""
    before = [step["model"]["id"] for step in (record.pruned or {}).get("history", [])]
    if json:
        console.emit_json(
            {
                "kind": "exported model",
                "path": str(path),
                "model": record.model,
                "prunings": len(before),
                "files": files,
            }
        )
        return
    model = record.model
    facts = [
        ["model", f"{model['id']} ({model['digest'][:16]}), {model['task']}"],
        ["dense model", model["dense"]],
        *([["pruned", console.plural(len(before), "time")]] if before else []),
    ]
    for name, one in files.items():
        opset = f", opset {one['opset']}" if "opset" in one else ""
        facts.append([name, f"{one['to']}{opset}, {one['precision']}"])
        facts += [[f"  {what}", words] for what, words in exported_facts(one)]
    console.facts(f"{path}: exported model", facts)


def _show_model(spec: str, json: bool, trust_remote_code: bool) -> None:
    from optin_cli.loading.checkpoint import open_model

    model = open_model(spec, device="cpu", trust_remote_code=trust_remote_code)
    units = {site.name: site.units for site in model.anatomy}
    if json:
        console.emit_json(
            {
                "kind": "model",
                "path": spec,
                "architecture": type(model.module).__name__,
                "family": model.family.name,
                "task": model.task.name,
                "units": units,
                "dense": model.dense,
                "vocabulary": _vocabulary(Path(spec).expanduser()),
            }
        )
        return
    facts = [
        ["architecture", f"{type(model.module).__name__} (family {model.family.name}), {model.task.name}"],
        ["weights", f"{model.digest[:16]}, stored as {str(model.stored_dtype).removeprefix('torch.')}"],
        ["parameters", f"{model.dense['params']:,}"],
        *_tokens(Path(spec).expanduser()),
    ]
    console.facts(f"{spec}: model", facts)
    show_sizes(units)


def _vocabulary(path: Path) -> dict[str, object] | None:
    """What the record of a smaller vocabulary says, if the directory has one."""
    return read_vocabulary(path).facts() if (path / vocabulary.FILE_NAME).is_file() else None


def _tokens(path: Path) -> list[list[str]]:
    """The same in a line."""
    if not (path / vocabulary.FILE_NAME).is_file():
        return []
    record = read_vocabulary(path)
    return [
        [
            "tokens",
            f"{record.tokens:,} of the {record.model['tokens']:,} of {record.model['id']}; they cover "
            f"{100 * record.covered:.3f} % of {record.data['spec']}",
        ]
    ]
