"""`optin export`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer

from optin_cli import console
from optin_cli.artefacts.files import check_writable
from optin_cli.commands import options
from optin_cli.commands.groups import Group, everyday
from optin_cli.commands.outputs import ExportOutput
from optin_cli.commands.present import agreement_words, deviation_words
from optin_cli.errors import OutputDiffers
from optin_cli.runtimes.settings import INT8, ExportSettings

if TYPE_CHECKING:
    from optin_cli.runtimes.export import Exported


@dataclass(frozen=True)
class Drawing:
    """Which examples the file is compared on."""

    max_length: int | None = field(
        default=None, metadata={"least": 1, "help": "Cut texts to this many tokens."}
    )
    seed: int = field(default=0, metadata={"least": 0, "help": "Seed of everything drawn."})


@everyday("to", "output", "int8", "fp16", "data")
def export(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File (.onnx, .xml, .pt2), or directory for several.")
    ],
    settings: Annotated[ExportSettings, Group(ExportSettings)],
    data: options.ComparedData,
    drawing: Annotated[Drawing, Group(Drawing, panel="Calibration")],
    opening: Annotated[
        options.Opening, Group(options.Opening, without="device dtype device_map", panel="Model")
    ],
    writing: options.Updated,
) -> None:
    """Write a model for another runtime, pruned or not: ONNX, OpenVINO or torch.export.

    The file is run on batches of two sizes and compared with the model in torch before it gets its name. A directory
    has the layout that optimum and sentence-transformers look for; other files of the same model are added to it.

    Examples:

      optin export m-60/ --to onnx -o m-60-onnx/

      optin export m-60/ --to onnx --int8 --data glue/sst2 -o m-60-onnx/

      optin bench m-60-onnx/onnx/model.onnx --baseline demo:minilm
    """
    from optin_cli.runtimes import export as stage
    from optin_cli.runtimes.checks import open_checks

    target = stage.target_of(settings)
    check_writable(output, "file" if stage.is_file(output, target) else "folder")
    opened = replace(opening, device="cpu").open(model, "float32")

    def write(force: bool) -> stage.Exported:
        with console.progress(not writing.quiet) as on_progress:
            return stage.export(
                opened, settings, output,
                lambda plain: open_checks(plain, data, drawing.seed, drawing.max_length),
                force=force, on_progress=on_progress,
            )  # fmt: skip

    try:
        made = write(writing.force)
    except OutputDiffers:
        if not writing.update:
            raise
        made = write(True)
    if not writing.quiet:
        _show(made)
    if writing.json:
        known = {"file": str(made.path), "bytes": made.bytes, "reused": made.reused, **made.facts}
        console.emit_json({name: known.get(name) for name in get_type_hints(ExportOutput)})
    else:
        console.data(str(made.path))


def _show(made: Exported) -> None:
    """What was written, and how near it is to the model, on stderr."""
    facts = made.facts
    opset = f", opset {facts['opset']}" if "opset" in facts else ""
    console.note(
        f"{'reused' if made.reused else 'wrote'} {made.path}: {facts['to']}{opset}, {facts['precision']}, "
        f"{console.size(made.bytes)}"
    )
    console.note(f"largest deviation from torch: {deviation_words(facts)}")
    if facts["precision"] != INT8:
        return
    console.note(f"int8 beside float32 on {facts['examples']} examples: {agreement_words(facts)}")
    if left := facts.get("float_layers"):
        console.note(f"{console.plural(len(left), 'layer')} left in float32: {', '.join(left)}")
