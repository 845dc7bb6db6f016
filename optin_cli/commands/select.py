"""`optin select`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optin_cli import console
from optin_cli.artefacts.mask import Mask, mask_to_json, write_mask
from optin_cli.artefacts.ranking import read_ranking
from optin_cli.commands import options
from optin_cli.errors import UsageError
from optin_cli.selection.select import Guards, emptied_sites
from optin_cli.selection.select import select as solve_mask


def select(
    ranking: Annotated[Path, typer.Argument(metavar="RANKING", help="Written by `optin score`.")],
    flops: options.Flops,
    output: Annotated[Path, typer.Option("--output", "-o", help="Mask to write (JSON).")],
    lambda_: Annotated[
        float | None,
        typer.Option("--lambda", help="Recombine the scores with another weight of the output term."),
    ] = None,
    min_heads: options.MinHeads = 0,
    min_neurons: options.MinNeurons = 0,
    protect: options.Protect = None,
    relative_to: options.RelativeTo = "dense",
    tokens: Annotated[
        float | None,
        typer.Option("--tokens", help="Sequence length the budget holds for (default: calibration mean)."),
    ] = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Find the best mask within a MAC budget. Exact, in milliseconds, without the model.

    Examples:

      optin select rankings/minilm.h5 --flops 0.6 -o m-60.mask.json

      optin select rankings/minilm.h5 --flops 0.5 --min-heads 1 --protect 'blocks.0.*' -o m-50.mask.json
    """
    mask = solve_mask(
        read_ranking(ranking),
        flops,
        guards=Guards(min_heads, min_neurons, tuple(protect or ())),
        output_weight=lambda_,
        relative_to=relative_to,
        tokens=tokens,
    )
    same = output.is_file() and output.read_bytes() == mask_to_json(mask).encode()
    if output.exists() and not same and not force:
        raise UsageError(
            f"{output} exists and holds something else", "choose another name, or --force to replace it"
        )
    if not same:
        write_mask(output, mask)
    if not quiet:
        report(mask)
    if json:
        console.emit_json({"mask": str(output), "reused": same, **describe(mask)})
    else:
        console.data(str(output))


def report(mask: Mask) -> None:
    """Tell what a mask keeps, and which layers it empties."""
    reached = mask.reached
    console.note(
        f"keeps {100 * reached['flops']:.2f} % of the MACs "
        f"({console.count(reached['macs'])} of {console.count(reached['dense_macs'])} at "
        f"{mask.budget['tokens']:.1f} tokens), {100 * mask.objective['kept']:.2f} % of the score, "
        f"at most {100 * mask.objective['gap']:.4f} % from the optimum"
    )
    if emptied := emptied_sites(mask):
        console.note(f"emptied: {', '.join(emptied)} (--min-heads or --min-neurons keep some)")


def describe(mask: Mask) -> dict[str, object]:
    """A mask without its indices, for JSON."""
    return {
        "digest": mask.digest,
        "budget": mask.budget,
        "reached": mask.reached,
        "objective": mask.objective,
        "kept": mask.summary,
        "emptied": emptied_sites(mask),
    }
