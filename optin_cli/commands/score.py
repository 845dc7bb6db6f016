"""`optin score`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optin_cli import console
from optin_cli.artefacts.ranking import Ranking
from optin_cli.commands import options
from optin_cli.errors import UsageError
from optin_cli.scoring.settings import DEFAULT_METHOD, ScoreSettings
from optin_cli.sizes import byte_count

if TYPE_CHECKING:
    from optin_cli.scoring.distributed import Team
    from optin_cli.scoring.plan import Plan


def score(
    model: options.Model,
    data: options.Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="Ranking to write (HDF5).")],
    split: options.Split = "train",
    samples: options.Samples = 512,
    method: options.Method = DEFAULT_METHOD,
    probes: options.Probes = 2,
    rel_error: options.RelError = None,
    exact_band: options.ExactBand = None,
    band_flops: options.BandFlops = None,
    precision: options.Precision = "full",
    sketch_rows: options.SketchRows = 512,
    sketch: options.KeepSketch = True,
    rows: options.Rows = 768,
    per_batch: options.PerBatch = False,
    tokens: options.ScoreTokens = False,
    temperature: options.Temperature = None,
    output_weight: options.ScoreLambda = None,
    batch_size: options.BatchSize = 32,
    max_length: options.MaxLength = None,
    config: options.Config = None,
    text: options.Text = None,
    label: options.Label = None,
    image: options.Image = None,
    audio: options.Audio = None,
    mask: options.Mask = None,
    ignore_index: options.IgnoreIndex = 255,
    stream: options.Stream = False,
    workers: options.Workers = None,
    task: options.Task = None,
    family: options.Anatomy = None,
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    memory: options.Memory = None,
    dtype: options.Dtype = "auto",
    seed: options.Seed = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be scored and about how long it takes.")
    ] = False,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Score every head and neuron of MODEL by how much the model's trajectory changes without it.

    The ranking is paid once and reused for any budget. No labels (fisher alone takes them), no training. A killed
    run resumes. Started by torchrun, several processes share the work.

    Examples:

      optin score demo:minilm --data builtin:docs -o rankings/minilm.h5

      optin score ./my-bert --data glue/sst2 --samples 1024 -o rankings/sst2.h5

      optin score timm:vit_small_patch16_224 --data ./images -o rankings/vit.h5

      torchrun --nproc-per-node 4 -m optin_cli score MODEL --data DATA -o r.h5
    """
    from optin_cli.artefacts.files import check_no_folder
    from optin_cli.scoring import score as stage
    from optin_cli.scoring.distributed import joined
    from optin_cli.scoring.methods.registry import configured
    from optin_cli.scoring.plan import make_plan

    with joined() as team:
        if not team.leads:
            console.mute()
        check_no_folder(output, "ranking")
        settings = ScoreSettings(
            method=method,
            samples=samples,
            batch_size=batch_size,
            max_length=max_length,
            rows=rows,
            probes=probes,
            rel_error=rel_error,
            exact_band=exact_band,
            band_flops=band_flops,
            precision=precision,
            sketch_rows=sketch_rows if sketch else 0,
            temperature=temperature,
            output_weight=output_weight,
            per_batch=per_batch,
            tokens=tokens,
            seed=seed,
        )
        settings = configured(settings)  # what it raises comes before the model is opened
        room = byte_count(memory, "memory") if memory else None
        if device_map:
            _check_device_map(settings, team)
        # half precision would drown the small changes that scores are made of: only on request
        compute = "float32" if dtype == "auto" else dtype
        opened = options.open_with(model, task, family, device, compute, device_map)
        rows_of = options.data_spec(
            data, split, config, text, label, image, stream, workers, mask, ignore_index, audio
        )
        plan = make_plan(opened, rows_of, settings, room)
        if dry_run:
            if team.leads:
                _tell_plan(plan, json)
            return
        ranking = None if force else team.first(lambda: stage.existing(output, plan))
        reused = ranking is not None
        if ranking is None:
            with console.progress(not quiet) as on_progress:
                ranking = stage.score(plan, output, on_progress, team)
        elif not quiet:
            console.note(f"{output} is already the ranking of these inputs")
        if json:
            console.emit_json({"ranking": str(output), "reused": reused, **summary(ranking)})
            return
        if not quiet and not reused:
            console.note(
                f"scored {sum(s.units for s in ranking.sites)} units of {ranking.model['id']} on "
                f"{len(ranking.row_ids)} rows of {ranking.data['spec']} in {console.duration(ranking.seconds)}"
            )
        console.data(str(output))


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


def summary(ranking: Ranking) -> dict[str, object]:
    """A ranking in a few numbers, for JSON."""
    return {
        "digest": ranking.digest,
        "model": ranking.model,
        "data": ranking.data,
        "rows": len(ranking.row_ids),
        "method": ranking.method,
        "units": {site.name: site.units for site in ranking.sites},
        "tokens": ranking.tokens,
        "macs": ranking.macs(ranking.tokens),
        "seconds": ranking.seconds,
    }


def _tell_plan(plan: Plan, json: bool) -> None:
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
