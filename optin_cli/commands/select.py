"""`optin select`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from optin_cli import console
from optin_cli.artefacts.files import check_no_folder
from optin_cli.artefacts.mask import Mask, mask_to_json, write_mask
from optin_cli.artefacts.ranking import read_ranking, read_sketch
from optin_cli.commands import budgets, options
from optin_cli.errors import UsageError
from optin_cli.selection.select import emptied_sites
from optin_cli.selection.select import select as solve_mask

log = logging.getLogger("optin")


def select(
    ranking: Annotated[Path, typer.Argument(metavar="RANKING", help="Written by `optin score`.")],
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="Mask to write (JSON); {} stands for the budget of a list."),
    ],
    flops: budgets.Flops = None,
    params: budgets.Params = None,
    memory: budgets.Memory = None,
    latency: budgets.Latency = None,
    latency_table: budgets.Table = None,
    output_weight: Annotated[
        float | None,
        typer.Option("--lambda", help="Recombine the scores with another weight of the output term."),
    ] = None,
    feature_weights: budgets.FeatureWeights = None,
    interactions: budgets.Interactions = "none",
    min_heads: budgets.MinHeads = 0,
    min_neurons: budgets.MinNeurons = 0,
    min_channels: budgets.MinChannels = 0,
    max_prune: budgets.MaxPrune = 1.0,
    protect: budgets.Protect = None,
    only: budgets.Only = None,
    round_to: budgets.RoundTo = "1",
    relative_to: budgets.RelativeTo = "dense",
    tokens: budgets.Tokens = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Find the best mask within one or several budgets. Milliseconds, without the model.

    Examples:

      optin select rankings/minilm.h5 --flops 0.6 -o m-60.mask.json

      optin select rankings/minilm.h5 --flops 0.9,0.8,0.7 -o 'm-{}.mask.json'

      optin select rankings/vit.h5 --flops 0.6 --tokens joint -o m.mask.json

      optin select r.h5 --latency 0.6 --latency-table cpu.json -o m.mask.json
    """
    asked = budgets.requests(
        flops=flops, params=params, memory=memory, latency=latency, table=latency_table,
        relative_to=relative_to, tokens=tokens, min_heads=min_heads, min_neurons=min_neurons,
        min_channels=min_channels,
        max_prune=max_prune, protect=protect, only=only, round_to=round_to, output_weight=output_weight,
        feature_weights=feature_weights, interactions=interactions, force=force,
    )  # fmt: skip
    if len(asked) > 1 and "{}" not in output:
        raise UsageError(
            f"{len(asked)} budgets make {len(asked)} masks, and {output} is one name",
            "put {} where the budget goes: -o 'm-{}.mask.json'",
        )
    check_no_folder(output, "mask")
    scored = read_ranking(ranking)
    sketch = read_sketch(ranking) if interactions != "none" else None
    masks = {
        Path(output.replace("{}", name)): solve_mask(scored, request, sketch)
        for name, request in asked.items()
    }
    reused = {path: _is_there(path, mask, force) for path, mask in masks.items()}
    for path, mask in masks.items():
        if not reused[path]:
            write_mask(path, mask)
        if not quiet:
            report(mask)
            if reused[path]:
                console.note(f"{path} is already this mask")
    told = [{"mask": str(path), "reused": reused[path], **describe(mask)} for path, mask in masks.items()]
    if json:
        console.emit_json(told[0] if len(told) == 1 else {"masks": told})
    else:
        console.data("\n".join(map(str, masks)))


def _is_there(path: Path, mask: Mask, force: bool) -> bool:
    """Whether `path` is this mask already; raises `UsageError` when it holds something else."""
    check_no_folder(path, "mask")
    same = path.is_file() and path.read_bytes() == mask_to_json(mask).encode()
    if path.exists() and not same and not force:
        raise UsageError(
            f"{path} exists and holds something else", "choose another name, or --force to replace it"
        )
    return same


def report(mask: Mask) -> None:
    """Tell what a mask keeps, and warn of the layers it empties."""
    reached, objective = mask.reached, mask.objective
    current = mask.budget["relative_to"] == "current"
    of = "current MACs" if current else "MACs"
    dense = f"{'; dense' if current else ' of'} {console.count(reached['dense_macs'])}"
    console.note(
        f"keeps {100 * reached['flops']:.2f} % of the {of} ({console.count(reached['macs'])}{dense} at "
        f"{mask.budget['tokens']:.1f} tokens), {console.count(reached['params'])} of "
        f"{console.count(reached['dense_params'])} parameters ({reached['memory']:.1f} MiB)"
    )
    if any(mask.merges):
        console.note(
            f"merges {sum(mask.merges)} tokens: {', '.join(map(str, mask.merges))} behind the first blocks"
        )
    if table := mask.budget["latency_table"]:
        share = 100 * reached["latency_ms"] / reached["table_latency_ms"]
        console.note(
            f"predicted latency {reached['latency_ms']:.2f} of {reached['table_latency_ms']:.2f} ms ({share:.1f} %), "
            f"batch {table['batch_size']} at size {table['size']}, {table['device']}"
        )
    moves, exchanges = exchanged(mask), objective["interactions"]
    best = "the best there is" if objective["optimal"] else "no better one was found"
    if exchanges and exchanges["moved"]:
        best = "less than it could for units one by one"
    lost = f", merging loses {100 * objective['merging']:.2f} %" if "merging" in objective else ""
    console.note(
        f"keeps {100 * objective['kept']:.2f} % of the score{lost}: {best}, at most {100 * objective['gap']:.4f} % "
        "below the bound"
    )
    if moves:
        console.note(moves)
    if (
        mask.keep
        and all(len(mask.keep[name]) == units for name, units in mask.units.items())
        and not any(mask.merges)
    ):
        pruned = not current and reached["macs"] < reached["dense_macs"]
        log.warning(
            "nothing is pruned: the model meets the budget as it is%s",
            " (it is pruned already; --relative-to current counts from what is left)" if pruned else "",
        )
    if emptied := emptied_sites(mask):
        log.warning(
            "emptied: %s (--min-heads, --min-neurons, --min-channels or --max-prune-per-layer keep some)",
            ", ".join(emptied),
        )


def exchanged(mask: Mask) -> str:
    """What the interactions changed, '' if they were not asked for."""
    if not (found := mask.objective.get("interactions")):
        return ""
    before, after = found["held_out"]["before"], found["held_out"]["after"]
    change = f"{100 * (after / before - 1):+.1f} %" if before > 0 else "no change"
    if found["dropped"]:
        return (
            f"kept the units as they were: exchanges changed the joint loss of held-out examples by {change}"
        )
    if not found["moved"]:
        return "kept the units as they were: no exchange lowers their joint loss"
    return f"moved {found['moved']} units in or out for their interactions: {change} joint loss on held-out examples"


def describe(mask: Mask) -> dict[str, object]:
    """A mask without its indices, for JSON."""
    return {
        "digest": mask.digest,
        "budget": mask.budget,
        "reached": mask.reached,
        "objective": mask.objective,
        "kept": mask.summary,
        "merges": mask.merges,
        "emptied": emptied_sites(mask),
    }
