"""Options that say what a mask must meet, and the requests they make: the same in `select` and `prune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from optin_cli.artefacts.latency import read_latency_table
from optin_cli.errors import UsageError
from optin_cli.selection.budgets import budget_kinds
from optin_cli.selection.settings import TOKEN_SEARCHES, Request

Flops = Annotated[
    str | None,
    typer.Option("--flops", metavar="FRACTION", help="Share of the MACs of all layers to keep."),
]
Params = Annotated[
    str | None,
    typer.Option(
        "--params", metavar="FRACTION", help="Share of the model's parameters to keep, embeddings included."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="What the stored weights may take, e.g. 60MiB."),
]
Latency = Annotated[
    str | None,
    typer.Option(
        "--latency",
        metavar="FRACTION|MS",
        help="Share of the latency, or milliseconds (12.5ms); needs --latency-table.",
    ),
]
Table = Annotated[
    Path | None,
    typer.Option(
        "--latency-table",
        metavar="FILE.json",
        help="Made by `optin bench MODEL --table`; also predicts the latency under other budgets.",
    ),
]
RelativeTo = Annotated[
    str,
    typer.Option("--relative-to", help="Shares of the original `dense` or of the `current` model."),
]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        metavar="joint|only|none|LENGTH",
        help="Merge tokens of a vision transformer: joint with heads and neurons, only tokens, or none (default). A "
        "number is the sequence length that MACs are counted for (default: calibration mean).",
    ),
]
MinHeads = Annotated[int, typer.Option("--min-heads", help="Heads every layer keeps at least.")]
MinNeurons = Annotated[int, typer.Option("--min-neurons", help="Neurons every layer keeps at least.")]
MinChannels = Annotated[
    int, typer.Option("--min-channels", help="Channels every site of a CNN keeps at least.")
]
MaxPrune = Annotated[
    float,
    typer.Option(
        "--max-prune-per-layer",
        metavar="FRACTION",
        help="Largest share of a layer's heads, and of its neurons, that may go.",
    ),
]
Protect = Annotated[
    list[str] | None,
    typer.Option(
        "--protect", metavar="GLOB", help="Keep matching sites whole, e.g. 'blocks.0.*'; may be repeated."
    ),
]
Only = Annotated[
    str | None,
    typer.Option("--only", metavar="KIND", help="Prune units of one kind alone: heads, neurons or channels."),
]
RoundTo = Annotated[
    str,
    typer.Option(
        "--round-to",
        metavar="N|auto",
        help="Keep neurons of a layer in multiples of 8, 16, 32 or 64; auto picks by device and dtype.",
    ),
]
FeatureWeights = Annotated[
    str | None,
    typer.Option(
        "--feature-weights",
        metavar="NAME|W,W,...",
        help="Weigh the blocks' features in the scores: auto (by the budget), sum (OPTIN), fourth-root, root, mean, "
        "deep, last, or one for each block.",
    ),
]
Interactions = Annotated[
    str,
    typer.Option(
        "--interactions",
        metavar="SCOPE",
        help="Then exchange units so that they cost less together: within a layer, global, or none.",
    ),
]


def requests(
    *,
    flops: str | None,
    params: str | None,
    memory: str | None,
    latency: str | None,
    table: Path | None,
    relative_to: str,
    tokens: str | None,
    min_heads: int,
    min_neurons: int,
    min_channels: int,
    max_prune: float,
    protect: Sequence[str] | None,
    only: str | None,
    round_to: str,
    output_weight: float | None,
    feature_weights: str | None,
    interactions: str,
    force: bool,
) -> dict[str, Request]:
    """One request for each budget of the one option that may hold a list (`0.9,0.8`), by the budget as written.

    Raises `UsageError` for what is no number or no budget, and `ArtefactError` for a table that can't be read.
    """
    base = Request(
        table=read_latency_table(table) if table else None,
        min_heads=min_heads,
        min_neurons=min_neurons,
        min_channels=min_channels,
        max_prune=max_prune,
        protect=tuple(protect or ()),
        only=only,
        round_to=_round_to(round_to),
        output_weight=output_weight,
        feature_weights=_feature_weights(feature_weights),
        interactions=interactions,
        relative_to=relative_to,
        **_tokens(tokens),
        force=force,
    )
    given = {"--flops": flops, "--params": params, "--memory": memory, "--latency": latency}
    return with_budgets(base, {option: text for option, text in given.items() if text is not None})


def with_budgets(request: Request, texts: Mapping[str, str]) -> dict[str, Request]:
    """The request with the budgets that options hold as text, option -> text: one for each entry of the one list.

    Raises `UsageError` for two lists, and for what is no number or no budget.
    """
    lists = {option: _parts(option, text) for option, text in texts.items()}
    several = [option for option, parts in lists.items() if len(parts) > 1]
    if len(several) > 1:
        raise UsageError(
            f"{' and '.join(several)} are both lists", "give one list, the others one value each"
        )
    found, kinds = {}, budget_kinds()
    for part in lists[several[0]] if several else [next(iter(lists.values()), [""])[0]]:
        chosen = {option: part if option in several else parts[0] for option, parts in lists.items()}
        found[part] = request.with_budgets(kinds[option].parse(text) for option, text in chosen.items())
        found[part].check()
    return found


def single(found: dict[str, Request]) -> Request:
    """The one request; raises `UsageError` for a list."""
    if len(found) > 1:
        raise UsageError(
            f"one model has one budget, not {', '.join(found)}",
            "`optin select` writes a mask for each budget of a list in one call",
        )
    return next(iter(found.values()))


def _parts(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    twice = [part for index, part in enumerate(parts) if part in parts[:index]]
    if twice:
        raise UsageError(f"{option} {text} holds {twice[0]} twice")
    return parts


def _tokens(text: str | None) -> dict[str, Any]:
    """Fields of the request that `--tokens` sets: how tokens are merged, or the length MACs are counted for."""
    if text is None:
        return {}
    if text in TOKEN_SEARCHES:
        return {"merge": text}
    try:
        return {"tokens": float(text)}
    except ValueError as error:
        raise UsageError(
            f"--tokens {text!r} is neither a way to merge tokens nor a length",
            f"use {', '.join(TOKEN_SEARCHES)}, or a number of tokens",
        ) from error


def _feature_weights(text: str | None) -> str | tuple[float, ...] | None:
    """A name, or numbers; `Request.check` knows the names."""
    if text is None or not any(letter.isdigit() for letter in text):
        return text
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"--feature-weights {text!r} is no list of numbers", "write a weight for each block as 0,0.5,1"
        ) from error


def _round_to(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text
