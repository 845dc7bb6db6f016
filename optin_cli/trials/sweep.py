"""`sweep`: one ranking, and a measured model for each budget, each seed and each variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from optin_cli.artefacts.point import Point, Sweep, read_sweep
from optin_cli.compensation.settings import NONE, Compensation
from optin_cli.errors import UsageError
from optin_cli.pipeline import ranking_path
from optin_cli.scoring.plan import Plan
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.selection.settings import Request
from optin_cli.trials.run import Progress, Recipe, Trials, point_name
from optin_cli.trials.settings import RANDOM, UNCOMPENSATED, UNIFORM, check_variants

Planner = Callable[[ScoreSettings], Plan]
"""Opens the calibration data for settings that differ in seed or method."""


@dataclass(frozen=True)
class Series:
    """The series of points of a sweep: one for each seed, and the variants of the first seed."""

    settings: ScoreSettings
    compensation: Compensation
    at_most: bool = True
    seeds: int = 1
    variants: tuple[str, ...] = ()
    ranking: Path | None = None
    """Of the first seed; by default in the sweep's folder, named by what went into it."""

    def check(self) -> None:
        """Raise `UsageError` for variants that there are not, and for no seed at all."""
        check_variants(self.variants, self.seeds)

    def recipes(self, folder: Path, plan: Plan, planner: Planner) -> list[Recipe]:
        """How the points of each are made; `plan` is that of the first seed. Opens the data of the others."""
        found = [Recipe(plan, self.compensation, self.ranking or ranking_path(plan, folder), self.at_most)]
        for number in range(1, self.seeds):
            seed = self.settings.seed + number
            other = planner(replace(self.settings, seed=seed))
            refit = replace(self.compensation, seed=self.compensation.seed + number)
            found.append(
                Recipe(other, refit, ranking_path(other, folder), self.at_most, suffix=f"-seed{seed}")
            )
        for variant in dict.fromkeys(self.variants):
            found.append(self._variant(variant, found[0], folder, planner))
        return found

    def _variant(self, variant: str, first: Recipe, folder: Path, planner: Planner) -> Recipe:
        named = replace(first, variant=variant, suffix=f"-{variant}")
        if variant == UNCOMPENSATED:
            return replace(named, compensation=Compensation(method=NONE))
        if variant == UNIFORM:
            return replace(named, uniform=True)
        assert variant == RANDOM
        settings = self.settings
        drawn = planner(
            ScoreSettings(
                method=RANDOM,
                samples=settings.samples,
                batch_size=settings.batch_size,
                max_length=settings.max_length,
                seed=settings.seed,
            )
        )
        return replace(named, plan=drawn, ranking=ranking_path(drawn, folder))


def sweep(
    trials: Trials,
    recipes: Sequence[Recipe],
    requests: Sequence[Request],
    on_progress: Progress = lambda *_: None,
    on_point: Callable[[Point], None] = lambda point: None,
) -> Sweep:
    """Make and measure a point for each recipe and request, as far as it is not there; returns the whole folder.

    A point is handed to `on_point` as soon as it is there. Raises what the stages raise; points made until then stay.
    """
    check_requests(requests)
    done, total = 0, len(recipes) * len(requests)
    for recipe in recipes:
        for request in requests:
            name = point_name(request, recipe.suffix)

            def report(part: float, whole: float, what: str, done: int = done, name: str = name) -> None:
                on_progress(done + part / whole, total, f"{name} ({done + 1}/{total}): {what}")

            on_point(trials.point(recipe, request, report))
            done += 1
    on_progress(total, total, "done")
    return read_sweep(trials.folder)


def check_requests(requests: Sequence[Request]) -> None:
    """Raise `UsageError` for budgets that are none, and for two that would be the same point."""
    for request in requests:
        request.check()
    names = [point_name(request) for request in requests]
    if twice := [name for index, name in enumerate(names) if name in names[:index]]:
        raise UsageError(f"the budget {twice[0]} is given twice", "leave one out")
