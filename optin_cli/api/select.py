"""Find the mask for a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optin_cli.artefacts.files import check_no_folder
from optin_cli.artefacts.latency import LatencyTable, read_latency_table
from optin_cli.artefacts.mask import Mask, write_mask
from optin_cli.artefacts.ranking import Ranking, read_ranking, read_sketch
from optin_cli.errors import param
from optin_cli.selection.budget import Budget
from optin_cli.selection.select import select as solve
from optin_cli.selection.settings import Request, token_fields
from optin_cli.sizes import parse_size


def select(
    ranking: Ranking | str | Path,
    *,
    output: str | Path | None = None,
    flops: float | None = None,
    params: float | None = None,
    memory: float | str | None = None,
    latency: float | None = None,
    latency_ms: float | None = None,
    latency_table: LatencyTable | str | Path | None = None,
    budgets: Sequence[Budget] = (),
    output_weight: float | None = None,
    feature_weights: str | Sequence[float] | None = None,
    interactions: str = "none",
    min_heads: int = 0,
    min_neurons: int = 0,
    min_channels: int = 0,
    max_prune: float = 1.0,
    protect: str | Sequence[str] = (),
    only: str | None = None,
    round_to: int | str = "auto",
    relative_to: str = "dense",
    tokens: str | float | None = None,
    ranks: bool | None = None,
    uniform: bool = False,
    force: bool = False,
) -> Mask:
    """Find the mask with the largest kept score that meets every budget that is given. Takes milliseconds.

    Costs and budgets are those of the post-training pruning framework (Kwon et al., NeurIPS 2022), as a
    multiple-choice knapsack that is solved to a bound.

    Args:
        ranking: of `score`, or its file.
        output: where the mask is written (JSON).
        flops: share of the MACs of all layers to keep, in (0, 1].
        params: share of the model's parameters to keep, embeddings included, in (0, 1].
        memory: what the stored weights may take, in MiB, or a size such as `60MiB`.
        latency, latency_ms: share of the latency, or milliseconds; both need a `latency_table`.
        latency_table: made by `optin bench MODEL --table`, or its file.
        budgets: further ones, of any kind: `Macs(0.6)`, or of a class of your own.
        output_weight: combine the scores' parts with another lambda.
        feature_weights: how the features of the deeper blocks count: `auto`, `sum` (OPTIN), `fourth-root`, `root`,
            `mean`, `deep`, `last`, or a number for each block.
        interactions: then exchange units so that they cost less together: within a `layer`, `global`, or `none`.
        min_heads, min_neurons, min_channels: units that every layer keeps at least.
        max_prune: largest share of a layer's units that may go.
        protect: globs over site names, such as `blocks.0.*`, to be kept whole.
        only: the one kind of units to prune: `heads`, `neurons` or `channels`.
        round_to: keep neurons in multiples of this, 1 for any number; `auto` picks by device and dtype.
        relative_to: what shares are of: the original `dense` model, or the `current`, ranked one.
        tokens: merge tokens of a vision transformer: `joint` with the units, `only` tokens, or `none`. A number is
            the sequence length that MACs are counted for; by default the calibration's mean.
        ranks: cut heads to lower ranks, too; by default where the ranking says what that costs.
        uniform: the same number of heads, rank of them and number of neurons in every layer, as far as the model's
            class takes such numbers from its config: it then opens with its library alone.
        force: take a latency table of another device or dtype.

    Returns:
        The mask: `keep`, site name -> kept units, ascending; `reached`, what that costs.

    Raises:
        UsageError: for a budget that is none, or options that can't go together.
        BudgetError: where no mask is small enough; it names the smallest budget.
        ArtefactError: for a damaged file, and a latency table of another model.

    Example:
        >>> mask = optin.select(ranking, flops=0.5, min_heads=1)
        >>> mask.reached["flops"] <= 0.5
        True
    """
    scored = ranking if isinstance(ranking, Ranking) else read_ranking(Path(ranking))
    sketch = scored.sketch
    if sketch is None and interactions != "none" and not isinstance(ranking, Ranking):
        sketch = read_sketch(Path(ranking))
    request = make_request(
        flops=flops,
        params=params,
        memory=memory,
        latency=latency,
        latency_ms=latency_ms,
        latency_table=latency_table,
        budgets=tuple(budgets),
        output_weight=output_weight,
        feature_weights=feature_weights,
        interactions=interactions,
        min_heads=min_heads,
        min_neurons=min_neurons,
        min_channels=min_channels,
        max_prune=max_prune,
        protect=protect,
        only=only,
        round_to=round_to,
        relative_to=relative_to,
        tokens=tokens,
        ranks=ranks,
        uniform=uniform,
        force=force,
    )
    request.check()
    if output is not None:
        check_no_folder(Path(output), "mask")
    mask = solve(scored, request, sketch)
    if output is not None:
        write_mask(Path(output), mask)
    return mask


def make_request(
    *,
    memory: float | str | None,
    latency_table: LatencyTable | str | Path | None,
    feature_weights: str | Sequence[float] | None,
    protect: str | Sequence[str],
    tokens: str | float | None,
    **plain: Any,
) -> Request:
    """The options of a mask as one value."""
    table = latency_table
    if isinstance(table, str | Path):
        table = read_latency_table(Path(table))
    if isinstance(memory, str):
        memory = parse_size(memory, param("memory"), "MiB", f"write {param('memory', meta='60MiB')}") / 2**20
    if feature_weights is not None and not isinstance(feature_weights, str):
        feature_weights = tuple(feature_weights)
    return Request(
        memory=memory,
        table=table,
        feature_weights=feature_weights,
        protect=(protect,) if isinstance(protect, str) else tuple(protect),
        **token_fields(tokens),
        **plain,
    )
