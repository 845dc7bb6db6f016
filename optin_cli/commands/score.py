"""`optin score`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optin_cli import console
from optin_cli.artefacts.rankings import places
from optin_cli.commands import options
from optin_cli.commands.groups import Group, Within, everyday
from optin_cli.commands.present import ranking_facts, show_reading
from optin_cli.data.lengths import describe
from optin_cli.errors import UsageError
from optin_cli.scoring import distributed
from optin_cli.scoring.distributed import Team
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.sizes import byte_count

if TYPE_CHECKING:
    from optin_cli.artefacts.ranking import Ranking
    from optin_cli.scoring.distributed import Team
    from optin_cli.scoring.plan import Plan


@dataclass(frozen=True)
class Running:
    """How the work is done, and whether."""

    sketch: bool = field(
        default=True, metadata={"panel": "Scoring", "switch": True, "help": "Keep the sketch in the ranking."}
    )
    memory: str | None = field(
        default=None,
        metadata={
            "panel": "Machine",
            "metavar": "SIZE",
            "help": "What activations may take, e.g. 4GiB (default: most of what is free).",
        },
    )
    reuse: tuple[str, ...] = field(
        default=(),
        metadata={
            "panel": "Output",
            "metavar": "FILE_OR_DIR",
            "help": "Look there, too, for a ranking of the same inputs before anything is scored; may be repeated.",
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"panel": "Output", "help": "Say what would be scored and about how long it takes."},
    )


@everyday("data", "output", "samples", "method", "batch_size", "device")
def score(
    team: Annotated[Team, Within(lambda: distributed.joined())],
    model: options.Model,
    data: options.StreamedData,
    output: Annotated[Path, typer.Option("--output", "-o", help="Ranking to write (HDF5).")],
    settings: Annotated[ScoreSettings, Group(ScoreSettings, panel="Calibration")],
    opening: options.SpreadOpening,
    writing: options.Updated,
    running: Annotated[Running, Group(Running)],
) -> None:
    """Score every head and neuron of MODEL by how much the model's trajectory changes without it.

    The ranking is paid once and reused for any budget. No labels (fisher alone takes them), no training. A killed
    run resumes. Started by torchrun, several processes share the work.

    Examples:

      optin score demo:minilm --data builtin:prose -o rankings/minilm.h5

      optin score ./my-bert --data glue/sst2 --samples 1024 -o rankings/sst2.h5

      optin score timm:vit_small_patch16_224 --data ./images -o rankings/vit.h5

      torchrun --nproc-per-node 4 -m optin_cli score MODEL --data DATA -o r.h5
    """
    from optin_cli.artefacts.files import check_writable
    from optin_cli.scoring import score as stage
    from optin_cli.scoring.methods.registry import configured
    from optin_cli.scoring.plan import make_plan

    if not team.leads:
        console.mute()
    check_writable(output, "ranking")
    where = places(map(Path, running.reuse))
    if not running.sketch:
        settings = replace(settings, sketch_rows=0)
    settings = configured(settings)  # what it raises comes before the model is opened
    room = byte_count(running.memory, "memory") if running.memory else None
    if opening.device_map:
        _check_device_map(settings, team)
    # half precision would drown the small changes that scores are made of: only on request
    opened = opening.open(model, "float32" if opening.dtype == "auto" else None)
    plan = make_plan(opened, data, settings, room)
    if not writing.quiet:
        show_reading(plan.examples)
    if running.dry_run:
        if team.leads:
            _show_plan(plan, writing.json)
        return
    ranking = team.first(lambda: options.existing(writing, output, lambda: stage.existing(output, plan)))
    reused, source = ranking is not None, None
    if ranking is None:
        taken = None if writing.force else team.first(lambda: _taken(plan, output, where))
        ranking, source = taken or (None, None)
    elif not writing.quiet:
        console.note(f"{output} is already the ranking of these inputs")
    if ranking is None:
        with console.progress(not writing.quiet) as on_progress:
            ranking, reused = stage.score_once(plan, output, on_progress, team)
    reused = reused or source is not None
    if writing.json:
        console.emit_json(
            {
                "ranking": str(output),
                "reused": reused,
                "reused_from": source and str(source),
                **ranking_facts(ranking),
            }
        )
        return
    if not writing.quiet and not reused:
        console.note(
            f"scored {sum(s.units for s in ranking.sites)} units of {ranking.model['id']} on "
            f"{len(ranking.row_ids)} rows of {ranking.data['spec']} in {console.duration(ranking.seconds)}"
        )
        if seen := ranking.data.get("lengths"):
            console.note(f"the texts have {describe(seen)}")
    console.data(str(output))


def _taken(plan: Plan, output: Path, where: list[tuple[str, Path]]) -> tuple[Ranking, Path] | None:
    """A ranking of the same inputs that is kept elsewhere, copied to `output`; None where there is none."""
    from optin_cli.scoring import score as stage

    found = stage.matching(plan, where)
    if found is None:
        return None
    place, path, ranking = found
    stage.copy_ranking(path, output)
    console.note(
        f"nothing is scored: {path} ({place}) ranks the same weights on the same rows with the same settings, and is "
        f"copied to {output}; --force scores again"
    )
    return ranking, path


def _check_device_map(settings: ScoreSettings, team: Team) -> None:
    """Raise `UsageError` for what a model that is spread over devices can't do."""
    from optin_cli.scoring.methods.registry import method_named

    if team.size > 1:
        raise UsageError(
            "--device-map spreads one model over all GPUs; several processes want one each",
            "start one process with --device-map, or several without",
        )
    if not method_named(settings.method).spreads or settings.exact_band is not None:
        raise UsageError(
            "a model spread with --device-map is scored by gradients alone, not by ablation",
            "use --method curvature, without --exact-band",
        )


def _show_plan(plan: Plan, json: bool) -> None:
    from optin_cli.scoring.estimate import estimate_seconds

    seconds = estimate_seconds(plan)
    units = {site.name: site.units for site in plan.model.anatomy}
    if json:
        console.emit_json(
            {"dry_run": True, "units": units, "batches": len(plan.calibration), "seconds": seconds}
        )
        return
    console.note(
        f"would score {sum(units.values())} units in {len(units)} sites of {plan.model.spec} by "
        f"{plan.settings.method} on {plan.calibration.batches.count} examples in {len(plan.calibration)} "
        f"batches: about {console.duration(seconds)}"
    )
