"""Options that several commands share, so that the same thing has the same name everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optin_cli.errors import UsageError

if TYPE_CHECKING:
    from optin_cli.data.sources import DataSpec
    from optin_cli.models.checkpoint import OpenModel

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, directory, pruned directory, timm:NAME[?checkpoint=FILE], or demo:minilm.",
        show_default=False,
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Hub data set (glue/sst2), CSV, JSONL, Parquet, image folder, or builtin:docs.",
        show_default=False,
    ),
]
OptionalData = Annotated[
    str | None,
    typer.Option("--data", metavar="DATA", help="Rows to check on, instead of the calibration rows."),
]
Split = Annotated[str, typer.Option("--split", help="Split of the data.")]
Config = Annotated[str | None, typer.Option("--config", help="Configuration of a hub data set.")]
Text = Annotated[str | None, typer.Option("--text", metavar="A[,B]", help="Text column, or two of them.")]
Label = Annotated[str | None, typer.Option("--label", help="Label column.")]
Image = Annotated[str | None, typer.Option("--image", help="Image column.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Examples in a batch.")]
MaxLength = Annotated[int | None, typer.Option("--max-length", help="Cut texts to this many tokens.")]
Task = Annotated[str | None, typer.Option("--task", help="What the model does, if its config does not say.")]
Anatomy = Annotated[
    Path | None,
    typer.Option("--anatomy", metavar="FILE.yaml", help="Family table of an unlisted architecture."),
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
        help="auto (heads by ablation, neurons by curvature), ablation, curvature, magnitude or random.",
    ),
]
Samples = Annotated[int, typer.Option("--samples", help="Calibration examples.")]
Probes = Annotated[int, typer.Option("--probes", help="Curvature probes for each batch.")]
Rows = Annotated[int, typer.Option("--rows", help="Tokens of a batch that enter the relations.")]
Temperature = Annotated[float, typer.Option("--temperature", help="Of the output term.")]
ScoreLambda = Annotated[
    float, typer.Option("--lambda", help="Weight of the output term against the trajectory.")
]
Flops = Annotated[
    float, typer.Option("--flops", metavar="FRACTION", help="Share of the MACs to keep.", show_default=False)
]
MinHeads = Annotated[int, typer.Option("--min-heads", help="Heads every layer keeps at least.")]
MinNeurons = Annotated[int, typer.Option("--min-neurons", help="Neurons every layer keeps at least.")]
Protect = Annotated[
    list[str] | None,
    typer.Option("--protect", metavar="GLOB", help="Keep matching sites whole, e.g. 'blocks.0.*'."),
]
RelativeTo = Annotated[
    str, typer.Option("--relative-to", help="Budget of the original `dense` or of the `current` model.")
]


def data_spec(
    data: str, split: str, config: str | None, text: str | None, label: str | None, image: str | None
) -> DataSpec:
    """The data options as one value."""
    from optin_cli.data.sources import DataSpec

    columns = tuple(part.strip() for part in text.split(",")) if text else ()
    return DataSpec(data, split, config, columns, label, image)


def open_with(model: str, task: str | None, anatomy: Path | None, device: str, dtype: str) -> OpenModel:
    """Open MODEL with the options that say how."""
    from optin_cli.models.checkpoint import open_model
    from optin_cli.models.families import read_family

    family = read_family(anatomy) if anatomy else None
    return open_model(model, task=task, device=device, dtype=dtype, family=family)


def whole_numbers(text: str, option: str) -> list[int]:
    """`1,32` -> [1, 32]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is no list of whole numbers", f"write {option} 1,32") from error
