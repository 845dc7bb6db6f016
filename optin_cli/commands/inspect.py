"""`optin inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from optin_cli import console
from optin_cli.artefacts.mask import Mask, read_mask
from optin_cli.artefacts.pruned import FILE_NAME, PrunedRecord, read_pruned
from optin_cli.artefacts.ranking import Ranking, output_scale, read_ranking
from optin_cli.commands.score import summary
from optin_cli.commands.select import describe
from optin_cli.errors import UsageError


def inspect(
    artefact: Annotated[str, typer.Argument(metavar="FILE_OR_DIR", help="Ranking, mask or model.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Show what any artefact holds and where it came from.

    Examples:

      optin inspect rankings/minilm.h5

      optin inspect m-60.mask.json

      optin inspect m-60/
    """
    path = Path(artefact).expanduser()
    if (path / FILE_NAME).is_file():
        _show_pruned(path, read_pruned(path), json)
    elif path.is_dir() or artefact.startswith(("demo:", "timm:")):
        _show_model(artefact, json)
    elif not path.exists():
        raise UsageError(f"nothing at {artefact}")
    elif path.suffix == ".json":
        _show_mask(path, read_mask(path), json)
    else:
        _show_ranking(path, read_ranking(path), json)


def _show_ranking(path: Path, ranking: Ranking, json: bool) -> None:
    if json:
        console.emit_json({"kind": "ranking", "path": str(path), **summary(ranking)})
        return
    facts = [
        ["model", f"{ranking.model['id']} ({ranking.model['class']}, {ranking.model['task']})"],
        ["weights", ranking.model["digest"][:16]],
        ["data", f"{ranking.data['spec']} ({ranking.data['split']}), {len(ranking.row_ids)} rows"],
        ["method", ranking.method],
        ["lambda", f"{ranking.settings['output_weight']:g} (x {output_scale(ranking.sites):.3g})"],
        ["mean tokens", f"{ranking.tokens:.2f}"],
        ["MACs in sites", console.count(ranking.macs(ranking.tokens))],
        ["MACs elsewhere", console.count(ranking.dense["fixed_macs"])],
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


def _show_mask(path: Path, mask: Mask, json: bool) -> None:
    if json:
        console.emit_json({"kind": "mask", "path": str(path), **describe(mask)})
        return
    facts = [
        ["budget", f"{mask.budget['flops']:g} of the {mask.budget['relative_to']} MACs"],
        [
            "reached",
            f"{mask.reached['flops']:.6f} ({console.count(mask.reached['macs'])} at "
            f"{mask.budget['tokens']:.1f} tokens)",
        ],
        ["score kept", f"{100 * mask.objective['kept']:.3f} %, gap {100 * mask.objective['gap']:.5f} %"],
        ["ranking", mask.ranking_digest[:16]],
        ["weights", mask.model_digest[:16]],
    ]
    console.facts(f"{path}: mask", facts)
    _show_sizes({n: len(k) for n, k in mask.keep.items()}, mask.units)


def _show_pruned(path: Path, record: PrunedRecord, json: bool) -> None:
    sizes = {name: len(kept) for name, kept in record.kept.items()}
    if json:
        content: dict[str, Any] = {
            "kind": "pruned model",
            "path": str(path),
            "architecture": record.architecture,
            "task": record.task,
            "units": sizes,
            "per_layer_config": record.per_layer_config,
            "dense": record.dense,
            "history": record.history,
        }
        console.emit_json(content)
        return
    facts = [
        ["architecture", f"{record.architecture} ({record.library}), {record.task}"],
        ["dense model", f"{record.dense['id']} ({record.dense['digest'][:16]})"],
        ["parameters", f"{record.history[-1]['params']:,} of {record.dense['params']:,}"],
    ]
    for number, step in enumerate(record.history, 1):
        budget, where = step["budget"], step["checked_on"]
        facts.append(
            [
                f"pruning {number}",
                f"to {step['reached']['flops']:.4f} of the {budget['relative_to']} MACs from {step['model']['id']}; "
                f"differs from the mask by {step['deviation']:.1e} on {where}",
            ]
        )
    console.facts(f"{path}: pruned model", facts)
    _show_sizes(sizes)


def _show_model(spec: str, json: bool) -> None:
    from optin_cli.models.checkpoint import open_model

    model = open_model(spec, device="cpu")
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
            }
        )
        return
    facts = [
        ["architecture", f"{type(model.module).__name__} (family {model.family.name}), {model.task.name}"],
        ["weights", f"{model.digest[:16]}, stored as {str(model.stored_dtype).removeprefix('torch.')}"],
        ["parameters", f"{model.dense['params']:,}"],
    ]
    console.facts(f"{spec}: model", facts)
    _show_sizes(units)


def _show_sizes(sizes: dict[str, int], of: dict[str, int] | None = None) -> None:
    """One line a block, one column a kind of unit."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in sizes))
    blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in sizes))
    rows = []
    for block in blocks:
        cells = [block]
        for kind in kinds:
            name = f"{block}.{kind}"
            total = f"/{of[name]}" if of and name in of else ""
            cells.append(f"{sizes[name]}{total}" if name in sizes else "")
        rows.append(cells)
    console.table("", ["block", *kinds], rows, stdout=True)
