"""Options that several commands share, so that the same thing has the same name everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optin_cli.errors import UsageError

if TYPE_CHECKING:
    from optin_cli.data.sources import DataSpec
    from optin_cli.loading.checkpoint import OpenModel

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, directory, pruned directory, timm:NAME or torchvision:NAME[?checkpoint=FILE], or demo:minilm.",
        show_default=False,
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Hub data set (glue/sst2), CSV, JSONL, Parquet, image or audio folder, or builtin:docs.",
        show_default=False,
    ),
]
OptionalData = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="DATA", help="Rows to compensate and check on, instead of the calibration data."
    ),
]
Split = Annotated[str, typer.Option("--split", help="Split of the data.")]
Config = Annotated[str | None, typer.Option("--config", help="Configuration of a hub data set.")]
Text = Annotated[str | None, typer.Option("--text", metavar="A[,B]", help="Text column, or two of them.")]
Label = Annotated[
    str | None,
    typer.Option("--label", metavar="A[,B..]", help="Label column; of multi-label models perhaps one each."),
]
Image = Annotated[str | None, typer.Option("--image", help="Image column (or folder, beside --mask).")]
Audio = Annotated[str | None, typer.Option("--audio", help="Column of recordings, or of their paths.")]
Mask = Annotated[
    str | None, typer.Option("--mask", help="Column (or folder) of label maps, for segmentation models.")
]
IgnoreIndex = Annotated[
    int, typer.Option("--ignore-index", help="Id of a label map's pixels that count nothing.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Examples in a batch.")]
MaxLength = Annotated[int | None, typer.Option("--max-length", help="Cut texts to this many tokens.")]
Task = Annotated[str | None, typer.Option("--task", help="What the model does, if its config does not say.")]
Anatomy = Annotated[
    Path | None,
    typer.Option("--anatomy", metavar="FILE.yaml", help="Family table of an unlisted architecture."),
]
Stream = Annotated[
    bool,
    typer.Option("--stream", help="Sample from the first rows, reading no more: data larger than the disk."),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", help="Processes that decode files (default: up to 4, by cores; 0 for none)."),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map", metavar="auto", help="Spread a model over all GPUs, for one larger than a GPU."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="What activations may take, e.g. 4GiB (default: most of what is free).",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything drawn.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the path that was written.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

Method = Annotated[
    str,
    typer.Option(
        "--method",
        help="curvature, ablation, mixed (heads by ablation, the rest by curvature); fisher (PTF; needs labels), "
        "knowledge (K-prune), reference (OPTIN's released code, for comparison), magnitude, random.",
    ),
]
Samples = Annotated[int, typer.Option("--samples", help="Calibration examples.")]
Probes = Annotated[int, typer.Option("--probes", help="Curvature probes for each batch.")]
RelError = Annotated[
    float | None,
    typer.Option("--rel-error", help="Probe until the scores' relative error from probing is this (0.1)."),
]
ExactBand = Annotated[
    float | None,
    typer.Option("--exact-band", help="Share of the units on either side of the cut to score by ablation."),
]
BandFlops = Annotated[
    float | None, typer.Option("--band-flops", help="Budget whose cut --exact-band is around.")
]
Precision = Annotated[
    str,
    typer.Option("--precision", help="full, or reduced: ablation multiplies changes in TF32 or bfloat16."),
]
SketchRows = Annotated[
    int, typer.Option("--sketch-rows", help="Gradients kept for interactions between units.")
]
KeepSketch = Annotated[bool, typer.Option("--sketch/--no-sketch", help="Keep the sketch in the ranking.")]
Rows = Annotated[int, typer.Option("--rows", help="Tokens of a batch that enter the relations.")]
PerBatch = Annotated[
    bool,
    typer.Option("--per-batch", help="fisher: square the mean gradient of each batch, as PTF's code does."),
]
ScoreTokens = Annotated[
    bool,
    typer.Option("--tokens", help="Measure what merging tokens costs, too (vision transformers)."),
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Of the output term (default: 4; knowledge: 2).")
]
ScoreLambda = Annotated[
    float | None,
    typer.Option(
        "--lambda",
        help="Weight of the output term against the trajectory (default: the budget decides, 0.3 or 0.1; knowledge: "
        "0.00025 of the representations; reference: 0.1).",
    ),
]

Compensate = Annotated[
    str,
    typer.Option(
        "--compensate",
        help="Refit what is left to the dense model, without training: auto, none, bias, scale or full.",
    ),
]

Producers = Annotated[
    bool,
    typer.Option(
        "--producers/--no-producers",
        help="Refit the layers that make the units, too: to make of what they now read what the dense ones made.",
    ),
]

Bn = Annotated[
    bool,
    typer.Option(
        "--bn/--no-bn", help="Then measure the statistics of BatchNorms anew, on the same examples."
    ),
]


def data_spec(
    data: str,
    split: str,
    config: str | None,
    text: str | None,
    label: str | None,
    image: str | None,
    stream: bool = False,
    workers: int | None = None,
    mask: str | None = None,
    ignore_index: int = 255,
    audio: str | None = None,
) -> DataSpec:
    """The data options as one value."""
    from optin_cli.data.sources import DataSpec

    columns = tuple(part.strip() for part in text.split(",")) if text else ()
    return DataSpec(data, split, config, columns, label, image, stream, workers, mask, ignore_index, audio)


def open_with(
    model: str,
    task: str | None,
    anatomy: Path | None,
    device: str,
    dtype: str,
    device_map: str | None = None,
) -> OpenModel:
    """Open MODEL with the options that say how."""
    from optin_cli.architectures.families import read_family
    from optin_cli.loading.checkpoint import open_model

    family = read_family(anatomy) if anatomy else None
    return open_model(model, task=task, device=device, dtype=dtype, family=family, device_map=device_map)


def whole_numbers(text: str, option: str) -> list[int]:
    """`1,32` -> [1, 32]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is no list of whole numbers", f"write {option} 1,32") from error
