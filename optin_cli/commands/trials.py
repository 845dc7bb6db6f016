"""What the commands that make points of a sweep begin with: models, data and settings, opened and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from optin_cli.commands import options
from optin_cli.commands.groups import Group, Text
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.trials.settings import Measuring

if TYPE_CHECKING:
    from optin_cli.data.sources import DataSpec
    from optin_cli.scoring.plan import Plan
    from optin_cli.trials.run import Trials

MeasuringOptions = Annotated[
    Measuring,
    Group(
        Measuring,
        panel="Timing",
        texts={
            "bench_batch_size": Text(
                lambda text, name: tuple(options.whole_numbers(text, "--bench-batch-size")), default="1,32"
            )
        },
    ),
]


@dataclass(frozen=True)
class Opened:
    """A model to be scored, as plans of any settings, and the trials that measure what comes of it."""

    plan: Plan
    planner: Callable[[ScoreSettings], Plan]
    trials: Trials


def open_all(
    model: str,
    data: DataSpec,
    settings: ScoreSettings,
    measuring: Measuring,
    opening: options.Opening,
    folder: Path,
    *,
    force: bool,
    update: bool = False,
) -> Opened:
    """Open the model in float32 to score it, and as `opening` says to measure it; and all data.

    Raises `UsageError` for sizes of inputs that the model does not have, and what models and data raise.
    """
    from optin_cli.artefacts.files import check_output
    from optin_cli.loading.checkpoint import dtype_name
    from optin_cli.scoring.methods.registry import configured
    from optin_cli.scoring.plan import make_plan
    from optin_cli.trials.run import check_sizes, open_trials

    settings = configured(settings)  # what it raises comes before the model is opened
    check_output(folder / "point", "point")
    scored = opening.open(model, "float32")
    check_sizes(scored, measuring)
    wanted = dtype_name(scored.stored_dtype) if opening.dtype == "auto" else opening.dtype
    dense = scored if wanted == "float32" else opening.open(model, wanted)
    again = replace(opening, family=None)
    trials = open_trials(
        folder,
        dense,
        lambda spec: again.open(spec, wanted),
        measuring.data(data),
        measuring,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        seed=settings.seed,
        force=force,
        update=update,
    )

    def planner(chosen: ScoreSettings) -> Plan:
        return make_plan(scored, data, chosen)

    return Opened(planner(settings), planner, trials)
