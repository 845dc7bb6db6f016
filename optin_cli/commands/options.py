"""The options that several commands share, so that the same thing has the same name everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from optin_cli.artefacts.files import renew
from optin_cli.commands import defaults
from optin_cli.commands.groups import Group, Text
from optin_cli.compensation.settings import Compensation
from optin_cli.data.sources import DataSpec
from optin_cli.errors import OutputDiffers, UnknownArchitecture, UsageError, param
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.sizes import byte_count

if TYPE_CHECKING:
    from optin_cli.architectures.families import Family
    from optin_cli.loading.checkpoint import OpenModel


# ---- what is opened, and how ----

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, directory, pruned directory, timm:NAME or torchvision:NAME[?checkpoint=FILE], or demo:minilm.",
        show_default=False,
    ),
]
Baseline = Annotated[
    str | None, typer.Option("--baseline", metavar="MODEL", help="Dense model to compare with.")
]


@dataclass(frozen=True)
class Opening:
    """How models are opened."""

    task: str | None = field(
        default=None,
        metadata={"panel": "Model", "help": "What the model does, if its config does not say."},
    )
    family: Path | None = field(
        default=None,
        metadata={
            "panel": "Model",
            "flag": "anatomy",
            "metavar": "FILE.yaml",
            "help": "Family table of an unlisted architecture.",
        },
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16."})
    device_map: str | None = field(
        default=None,
        metadata={"metavar": "auto", "help": "Spread a model over all GPUs, for one larger than a GPU."},
    )

    trust_remote_code: bool = field(
        default=False,
        metadata={
            "panel": "Model",
            "help": "Run the Python code in MODEL's directory, for a class that transformers lacks.",
        },
    )

    def open(self, model: str, dtype: str | None = None, family: Family | None = None) -> OpenModel:
        """Open MODEL, perhaps in another dtype than was asked for; by the table `family` if none was given."""
        from optin_cli.architectures.families import read_family
        from optin_cli.loading.checkpoint import open_model

        return open_model(
            model,
            task=self.task,
            device=self.device,
            dtype=dtype or self.dtype,
            family=read_family(self.family) if self.family else family,
            device_map=self.device_map,
            trust_remote_code=self.trust_remote_code,
        )

    def open_measured(self, model: str) -> OpenModel:
        """Open MODEL, or an exported file to be run by its runtime."""
        from optin_cli.runtimes.opening import is_exported, open_exported

        if not is_exported(model):
            return self.open(model)
        if self.dtype not in ("auto", "float32"):
            raise UsageError(
                f"{model} is an exported file, whose dtype is fixed",
                f"leave {param('dtype', self.dtype)} out",
            )
        return open_exported(model, device=self.device, trust_remote_code=self.trust_remote_code)

    def open_baseline(self, model: str, pruned: OpenModel, dtype: str | None = None) -> OpenModel:
        """Open the dense MODEL: of an unlisted architecture by the table that `pruned` carries."""
        from optin_cli.runtimes.opening import is_exported

        if is_exported(model):
            return self.open_measured(model)
        beside = replace(self, device="cpu") if pruned.runtime is not None else self
        try:
            return beside.open(model, dtype)
        except UnknownArchitecture:
            if pruned.record is None:
                raise
            return beside.open(model, dtype, pruned.family)


SpreadOpening = Annotated[Opening, Group(Opening, panel="Machine")]
TypedOpening = Annotated[Opening, Group(Opening, without="device_map", panel="Machine")]
PlainOpening = Annotated[Opening, Group(Opening, without="dtype device_map", panel="Machine")]
Task = Annotated[str | None, Group(Opening, "task", make=lambda task: task)]
TrustRemoteCode = Annotated[
    bool, Group(Opening, "trust_remote_code", make=lambda trust_remote_code: trust_remote_code)
]

# ---- data ----


def _columns(text: str, name: str) -> tuple[str, ...]:
    """`a, b` -> (a, b)"""
    return tuple(part.strip() for part in text.split(",")) if text else ()


def _data(**given: Any) -> DataSpec:
    return DataSpec(**{name: value for name, value in given.items() if value is not None})


def _optional(**given: Any) -> DataSpec | None:
    """The data, if there is any. Raises `UsageError` for options that are about none."""
    if given["spec"]:
        return _data(**given)
    # a default from a file or the environment is for the commands that read data
    typed = (name for name, value in given.items() if value is not None and defaults.is_typed(name))
    if any(name != "workers" for name in typed):
        raise UsageError(
            "--split, --config, --text, --image, --audio and --mask say how to read --data, which is not given"
        )
    return None


_TEXTS = {"text": Text(_columns)}
StreamedData = Annotated[DataSpec, Group(DataSpec, panel="Calibration", texts=_TEXTS, make=_data)]
CalibrationData = Annotated[
    DataSpec, Group(DataSpec, without="stream", panel="Calibration", texts=_TEXTS, make=_data)
]
TextData = Annotated[
    DataSpec,
    Group(
        DataSpec,
        without="image stream workers mask ignore_index audio",
        panel="Calibration",
        texts=_TEXTS,
        make=_data,
    ),
]
"""Of a command for models of text alone."""
LabelledData = Annotated[
    DataSpec,
    Group(
        DataSpec,
        without="stream",
        panel="Data",
        texts=_TEXTS,
        changes={"split": {"default": "validation"}},
        make=_data,
    ),
]
OptionalData = Annotated[
    DataSpec | None,
    Group(
        DataSpec,
        without="label ignore_index stream",
        shared="workers",
        panel="Calibration",
        texts=_TEXTS,
        changes={
            "spec": {
                "default": None,
                "help": "Rows to compensate and check on, instead of the calibration data.",
            },
            "split": {"default": None, "help": "Split of the data (default: train)."},
        },
        make=_optional,
    ),
]
ComparedData = Annotated[
    DataSpec | None,
    Group(
        DataSpec,
        without="label ignore_index stream",
        panel="Calibration",
        texts=_TEXTS,
        changes={
            "spec": {
                "default": None,
                "help": "Examples to compare on, and to choose by what stays in float (default: builtin:prose; noise).",
            },
            "split": {"default": None, "help": "Split of the data (default: train)."},
        },
        make=_optional,
    ),
]
Workers = Annotated[int | None, Group(DataSpec, "workers", make=lambda workers: workers)]

# ---- work ----


@dataclass(frozen=True)
class Refit:
    """Compensation, and whether fewer examples than its default will do."""

    settings: Compensation
    at_most: bool


def _refit(samples: int | None, **fields: Any) -> Refit:
    if samples is not None:
        fields["samples"] = samples
    return Refit(Compensation(**fields), at_most=samples is None)


def compensation(prefix: str = "", shared: str = "") -> Group:
    """The options of compensation. `prefix` begins the names of those that another stage has, too."""
    return Group(
        Compensation,
        shared=shared,
        panel="Compensation",
        changes={
            "samples": {"name": f"{prefix}samples", "default": None},
            "memory": {"name": f"{prefix}memory"},
        },
        texts={"memory": Text(byte_count, default="4GiB")},
        make=_refit,
    )


Seed = Annotated[int, Group(ScoreSettings, "seed", panel="Timing", make=lambda seed: seed)]

# ---- what is written ----


@dataclass(frozen=True)
class Writing:
    """What happens to an output that is there, and what is printed."""

    force: bool = field(default=False, metadata={"help": "Replace an existing output."})
    update: bool = field(
        default=False,
        metadata={
            "help": "Replace an output that was made from other inputs; keep one that is up to date (for make)."
        },
    )
    explain: bool = field(
        default=False,
        metadata={
            "help": "Say which inputs have changed since an output was made, or that it is up to date."
        },
    )
    quiet: bool = field(
        default=False, metadata={"short": "-q", "help": "Print only the path that was written."}
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object on stdout."})


T = TypeVar("T")


def existing(writing: Writing, path: Path, find: Callable[[], T | None]) -> T | None:
    """What `find` finds at an output if it is to be kept; its time becomes that of now.

    Raises what `find` raises: `OutputDiffers` unless such an output is to be replaced.
    """
    if writing.force:
        return None
    try:
        found = find()
    except OutputDiffers:
        if not writing.update:
            raise
        return None
    if found is not None:
        renew(path)
    return found


Output = Annotated[Writing, Group(Writing, without="update explain", panel="Output")]
Updated = Annotated[Writing, Group(Writing, panel="Output")]
"""Of a command whose outputs say what they were made from."""
_SHOWN = {"quiet": {"help": "Print nothing but the result, warnings and errors."}}
Timed = Annotated[Writing, Group(Writing, panel="Output", changes=_SHOWN)]
Shown = Annotated[Writing, Group(Writing, "quiet json", panel="Output", changes=_SHOWN)]
"""Of a command that prints what it finds."""
Json = Annotated[bool, Group(Writing, "json", panel="Output", make=lambda json: json)]


def whole_numbers(text: str, option: str) -> list[int]:
    """`1,32` -> [1, 32]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is no list of whole numbers", f"write {option} 1,32") from error
