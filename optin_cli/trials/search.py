"""`search`: the smallest model that loses at most so much, or the largest that is so much faster, by bisection.

Quality falls and speed rises as the budget falls, nearly always: the search takes both as monotone, which costs at most
a model that is not the very best. It halves the budgets between two that are known, on a grid of `STEP`, with one
ranking. Every trial is a point.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from optin_cli.artefacts.files import atomic_dir
from optin_cli.artefacts.point import Point
from optin_cli.artefacts.pruned import FILE_NAME
from optin_cli.errors import BudgetError, GateError, OutputDiffers, param
from optin_cli.pruning.model_card import keep_edited
from optin_cli.selection.settings import Request
from optin_cli.trials.pick import Promise, pick
from optin_cli.trials.run import Progress, Recipe, Trials

STEP = 0.02
"""Shares of the MACs that are tried are multiples of it: six trials at most."""


@dataclass(frozen=True)
class Found:
    """The best point, and all trials in the order they were made."""

    best: Point
    trials: tuple[Point, ...]


def search(trial: Callable[[float, int], Point], promise: Promise, where: str) -> Found:
    """The best point of `trial(share of the MACs, number of the trial)` that keeps `promise`.

    With a `max_drop`, the fewest MACs that lose at most that; a `min_speedup` or `max_latency` beside it must then
    hold, too. Without, the most MACs that are fast enough. Budgets that no mask can meet count as too small.
    Raises `GateError` with the nearest miss if none keeps the promise; all trials are kept.
    """
    promise.check()
    by_quality = promise.max_drop is not None
    judged = replace(promise, min_speedup=None, max_latency=None) if by_quality else promise
    low, high = 0, round(1 / STEP)  # of the grid; neither is tried
    trials: list[Point] = []
    unreachable: BudgetError | None = None
    while high - low > 1:
        middle = (low + high) // 2
        try:
            point = trial(round(middle * STEP, 10), len(trials) + 1)
        except BudgetError as error:
            unreachable, low = error, middle
            continue
        trials.append(point)
        # fewer MACs are better where quality is promised, more where speed is
        if judged.kept(point) == by_quality:
            high = middle
        else:
            low = middle
    if not trials:
        raise unreachable or GateError(f"no model of {where} could be tried")
    return Found(pick(trials, promise, where), tuple(trials))


def search_budget(
    trials: Trials,
    recipe: Recipe,
    request: Request,
    promise: Promise,
    on_progress: Progress = lambda *_: None,
    on_point: Callable[[Point], None] = lambda _: None,
) -> Found:
    """`search` among the points of `request` at other shares of the MACs; `on_point` hears of each."""

    def trial(share: float, number: int) -> Point:
        def report(part: float, whole: float, what: str) -> None:
            on_progress(part, whole, f"trial {number}, {share:g} of the MACs: {what}")

        point = trials.point(recipe, replace(request, flops=share), report)
        on_point(point)
        return point

    return search(trial, promise, str(trials.folder))


def copy_model(point: Path, output: Path, *, force: bool = False, update: bool = False) -> bool:
    """Copy a point's model to `output`, whole or not at all; False where it is there already.

    Raises `OutputDiffers` where another model is, unless `update` replaces it.
    """
    there = output / FILE_NAME
    if there.is_file() and not force:
        if there.read_bytes() == (point / FILE_NAME).read_bytes():
            return False
        if update:
            return copy_model(point, output, force=True)
        raise OutputDiffers(
            f"{output} exists, made with another mask or compensation",
            f"choose another name, or {param('force', True)} to replace it",
        )
    with atomic_dir(output) as folder:
        shutil.copytree(point, folder, dirs_exist_ok=True)
        keep_edited(folder, output)
    return True
