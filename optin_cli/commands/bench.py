"""`optin bench`."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optin_cli import console
from optin_cli.artefacts.files import check_writable
from optin_cli.commands import options
from optin_cli.commands.groups import Group, everyday
from optin_cli.commands.present import advise_latency, show_generation, show_profile, show_timings
from optin_cli.errors import UsageError

if TYPE_CHECKING:
    from optin_cli.loading.checkpoint import OpenModel

log = logging.getLogger("optin")

_BATCH_SIZES, _TABLE_BATCH_SIZE = "1,32", "32"
KNEE = "knee"
_NOISY = 0.03
"""Error of a site's time, as a share of it, beyond which predictions are not worth much."""


@dataclass(frozen=True)
class Settings:
    """What is timed, and for how long."""

    batch_size: str | None = field(
        default=None,
        metadata={
            "help": f"Batch sizes (default: {_BATCH_SIZES}; {_TABLE_BATCH_SIZE} for a table), or knee: 1, 2, 4, ... "
            "until more give the first model less than 5 % more throughput.",
        },
    )
    seq_len: str | None = field(
        default=None, metadata={"help": "Sequence lengths, e.g. 64,128 (text models)."}
    )
    image_size: str | None = field(default=None, metadata={"help": "Image sides in pixels (vision models)."})
    repeats: int = field(default=10, metadata={"least": 1, "help": "Forwards of each model, at least."})
    seconds: float = field(default=5.0, metadata={"help": "Time spent on each setting."})
    new_tokens: int | None = field(
        default=None,
        metadata={
            "metavar": "N",
            "least": 1,
            "help": "Time decoders as they read --seq-len tokens (prefill) and write N more (decode).",
        },
    )
    compile: bool = field(default=False, metadata={"help": "Time the models as torch.compile makes them."})
    cuda_graph: bool = field(
        default=False,
        metadata={"help": "Record each model's forward as a CUDA graph and time its replay."},
    )
    first_load: bool = field(
        default=False,
        metadata={"help": "Also time opening each model from its files, and its first forward."},
    )
    profile: bool = field(
        default=False,
        metadata={"help": "Say where the time goes instead: the layers of each site, and elsewhere."},
    )
    seed: int = field(default=0, metadata={"least": 0, "help": "Seed of everything drawn."})

    @property
    def effort(self) -> dict[str, Any]:
        return {"repeats": self.repeats, "seconds": self.seconds, "seed": self.seed}


@everyday("baseline", "table", "batch_size", "seq_len", "image_size", "device")
def bench(
    model: options.Model,
    timing: Annotated[Settings, Group(Settings, panel="Timing")],
    opening: options.TypedOpening,
    writing: options.Timed,
    baseline: options.Baseline = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="FILE.csv",
            rich_help_panel="Output",
            help="Write the timings with timm's columns, too.",
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--table",
            metavar="FILE.json",
            help="Write a latency table for `optin select --latency` instead: one batch size, one length.",
        ),
    ] = None,
) -> None:
    """Measure latency, throughput, memory and MACs, dense and pruned interleaved in one process.

    Examples:

      optin bench m-60/ --baseline demo:minilm

      optin bench m-60/ --baseline demo:minilm --batch-size 1,32 --seq-len 64

      optin bench m-60/ --baseline demo:minilm --batch-size knee --csv t.csv

      optin bench m-60/ --baseline demo:minilm --batch-size 32 --profile

      optin bench small/ --baseline ./my-llama --new-tokens 64

      optin bench m-60-onnx/ --baseline demo:minilm --batch-size 1,32

      optin bench demo:minilm --table cpu.json --batch-size 32 --seq-len 64
    """
    from optin_cli.measure import latency
    from optin_cli.measure.comparison import compare
    from optin_cli.measure.inputs import default_size
    from optin_cli.measure.runners import Execution

    if table is not None and baseline:
        raise UsageError("--table times one model, --baseline compares two", "leave one of them out")
    if table is not None and (timing.compile or timing.cuda_graph):
        raise UsageError(
            "a latency table is of models run as they are", "leave --compile and --cuda-graph out"
        )
    to_knee = timing.batch_size == KNEE
    _check(timing, table, csv)
    for path, kind in ((table, "latency table"), (csv, "table")):
        if path is not None:
            check_writable(path, kind)
    opened = opening.open_measured(model)
    if opened.runtime is not None and (table is not None or timing.new_tokens is not None):
        raise UsageError(
            f"{model} is an exported file: --table and --new-tokens are about models in torch",
            "leave them out, or give the model that it was exported from",
        )
    images = opened.family.modality == "image"
    if (timing.seq_len if images else timing.image_size) is not None:
        raise UsageError(
            f"{model} reads {opened.family.modality}{'' if opened.family.modality == 'audio' else 's'}",
            "use --image-size" if images else "use --seq-len",
        )
    asked = timing.seq_len or timing.image_size
    sizes = options.whole_numbers(asked, "--seq-len or --image-size") if asked else None
    default = _BATCH_SIZES if table is None else _TABLE_BATCH_SIZE
    asked_sizes = default if to_knee else timing.batch_size or default
    batch_sizes = options.whole_numbers(asked_sizes, "--batch-size")
    if table is not None:
        if len(batch_sizes) > 1 or len(sizes or []) > 1:
            raise UsageError("a table is for one batch size and one length", "make a table for each")
        size = (sizes or [default_size(opened)])[0]
        _tabulate(opened, table, batch_sizes[0], size, timing.effort, writing)
        return
    models = [opened]
    if baseline:
        models.insert(0, opening.open_baseline(baseline, opened, str(opened.dtype)[6:]))
    with console.progress(not (writing.json or writing.quiet)) as on_progress:
        if timing.new_tokens is not None:
            prompt = sizes[0] if sizes else None
            _show_generation(models, batch_sizes, prompt, timing, writing.json, on_progress)
            return
        if timing.profile:
            _show_profiles(models, batch_sizes, sizes, timing, writing.json, on_progress)
            return
        effort = {
            **timing.effort,
            "execution": Execution(timing.compile, timing.cuda_graph),
            "first_load": timing.first_load,
        }
        if to_knee:
            timings = latency.bench_to_knee(models, sizes, **effort, on_progress=on_progress)
        else:
            timings = latency.bench(models, batch_sizes, sizes, **effort, on_progress=on_progress)
    rows = compare(models, timings)
    if csv is not None:
        _write_csv(csv, rows, images)
    if writing.json:
        console.emit_json({"timings": rows})
    else:
        show_timings(rows)
        advise_latency(rows)
        for other in _unmet(models, rows):
            console.note(other)


def _check(timing: Settings, table: Path | None, csv: Path | None) -> None:
    """Raise `UsageError` for settings that can't go together."""
    to_knee = timing.batch_size == KNEE
    if table is not None and (timing.batch_size == KNEE or timing.new_tokens is not None or csv is not None):
        raise UsageError("a latency table is for one batch size", "leave knee, --new-tokens and --csv out")
    if timing.profile and (
        timing.compile or timing.cuda_graph or to_knee or timing.new_tokens or table or csv
    ):
        raise UsageError(
            "--profile looks into models as they are, at batch sizes that are given",
            "leave --compile, --cuda-graph, knee, --new-tokens, --table and --csv out",
        )
    if timing.new_tokens is None:
        return
    if timing.compile or timing.cuda_graph or timing.batch_size == KNEE or csv is not None:
        raise UsageError(
            "--new-tokens times models as they are, at batch sizes that are given",
            "leave --compile, --cuda-graph, knee and --csv out",
        )
    if timing.seq_len is not None and "," in timing.seq_len:
        raise UsageError("--new-tokens reads prompts of one length", "give --seq-len one number")


def _write_csv(path: Path, rows: list[dict[str, Any]], images: bool) -> None:
    """Write timings as a table for other tools."""
    import csv
    import io

    from optin_cli.artefacts.files import atomic_file
    from optin_cli.measure.comparison import csv_rows

    found, text = csv_rows(rows, images), io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    with atomic_file(path) as temporary:
        temporary.write_text(text.getvalue())


def _show_generation(
    models: list[OpenModel],
    batch_sizes: list[int],
    prompt: int | None,
    timing: Settings,
    json: bool,
    on_progress: console.ProgressCallback,
) -> None:
    """Time decoders as they read and write, and show it."""
    from optin_cli.measure.generation import bench_generation

    assert timing.new_tokens is not None
    found = bench_generation(
        models, batch_sizes, prompt, timing.new_tokens, **timing.effort, on_progress=on_progress
    )
    rows = []
    for index, one in enumerate(found):
        dense = found[index - index % len(models)]
        rows.append(asdict(one))
        if one is not dense:
            rows[-1]["prefill_speedup"] = dense.prefill_ms / one.prefill_ms
            rows[-1]["decode_speedup"] = dense.decode_ms / one.decode_ms
    if json:
        console.emit_json({"generation": rows})
    else:
        show_generation(rows)


def _show_profiles(
    models: list[OpenModel],
    batch_sizes: list[int],
    sizes: list[int] | None,
    timing: Settings,
    json: bool,
    on_progress: console.ProgressCallback,
) -> None:
    """Time the layers of each site at each setting, and show it."""
    from optin_cli.measure.profile import profile

    every: list[int | None] = list(sizes) if sizes else [None]
    found = [
        profile(models, batch_size, size, **timing.effort, on_progress=on_progress)
        for size in every
        for batch_size in batch_sizes
    ]
    if json:
        console.emit_json({"profiles": [asdict(one) for one in found]})
    else:
        for one in found:
            show_profile(one)


def _tabulate(
    model: OpenModel, path: Path, batch_size: int, size: int, effort: dict[str, Any], writing: options.Writing
) -> None:
    """Make a latency table, unless `path` is one of this model and setting already."""
    from optin_cli.artefacts.files import check_output
    from optin_cli.artefacts.latency import write_latency_table
    from optin_cli.measure.inputs import check_setting
    from optin_cli.measure.latency_table import existing, make_table

    check_setting(model, batch_size, size)
    check_output(path, "latency table")
    there = options.existing(writing, path, lambda: existing(path, model, batch_size, size))
    reused = there is not None
    if there is not None:
        console.note(f"{path} is already the table of this model and setting; --force times it again")
    else:
        with console.progress(not (writing.json or writing.quiet)) as on_progress:
            there = make_table(model, batch_size, size, **effort, on_progress=on_progress)
        write_latency_table(path, there)
        console.note(
            f"{there.total_ms:.2f} ms, {there.fixed_ms:.2f} ms of it outside heads and neurons; "
            f"{there.sizes} sizes timed"
        )
        doubt = max(curve["noise"] / max(*curve["ms"], 1e-9) for curve in there.curves)
        if doubt > _NOISY:
            log.warning(
                "the times are known to about %.0f %% only: let nothing else run on the device, or give more --seconds",
                100 * doubt,
            )
    if writing.json:
        facts = {"setting": there.setting, "total_ms": there.total_ms, "fixed_ms": there.fixed_ms}
        console.emit_json({"table": str(path), "reused": reused, "digest": there.digest, **facts})
    else:
        console.data(str(path))


def _unmet(models: list[OpenModel], rows: list[dict[str, Any]]) -> list[str]:
    """Where to look for predictions that none of the settings could be compared with."""
    from optin_cli.measure.comparison import prediction

    notes = []
    for model in models:
        if (foretold := prediction(model)) and not any("predicted_ms" in row for row in rows):
            notes.append(
                f"{foretold['latency_ms']:.2f} ms were predicted for {model.spec} at --batch-size "
                f"{foretold['batch_size']}, size {foretold['size']}, {foretold['dtype']} on {foretold['device']}"
                + (f" with {foretold['threads']} threads" if foretold["threads"] else "")
            )
    return notes
