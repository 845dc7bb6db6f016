"""Open a model from a hub id, a directory, timm or a pruned directory; write a pruned directory.

Weights are read by transformers and timm themselves, so their key conversions, shards and dtypes hold for
pruned models too. Nothing is unpickled except through torch's `weights_only`.
"""

from __future__ import annotations

import copy
import inspect
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.architectures.families import Family, family_from_dict
from optin_cli.architectures.positions import image_size
from optin_cli.architectures.resolve import dissect, family_of
from optin_cli.artefacts.facts import DenseFacts
from optin_cli.artefacts.files import digest_bytes, digest_files
from optin_cli.artefacts.pruned import PrunedRecord, write_pruned
from optin_cli.errors import ArtefactError, InputError, UsageError, param
from optin_cli.loading.audio_processors import AudioProcessor, audio_processor
from optin_cli.loading.from_transformers import open_transformers, save_transformers
from optin_cli.loading.given_processors import given_processor
from optin_cli.loading.processors import (
    ImageProcessor,
    TextProcessor,
    text_processor,
    timm_image_processor,
    transformers_image_processor,
)
from optin_cli.loading.reshaping import remember, reshape_as_recorded
from optin_cli.loading.sources import Source, resolve
from optin_cli.loading.standalone_file import NAME as CODE_FILE
from optin_cli.loading.standalone_file import code_for
from optin_cli.loading.timm_torchvision import LIBRARIES, open_vision, save_vision, save_vision_config
from optin_cli.loading.weight_errors import clear_errors
from optin_cli.structure.anatomy import AUDIO, IMAGE, Anatomy
from optin_cli.structure.audio_inputs import has_decoder
from optin_cli.tasks.base import Task
from optin_cli.transforms.fusion import fuse_batch_norms
from optin_cli.transforms.token_merging import Merging, install_merges

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(repr=False)
class OpenModel:
    """A model ready to run: eval mode, parameters frozen, on its device."""

    source: Source
    module: nn.Module
    family: Family
    anatomy: Anatomy
    task: Task
    stored_dtype: torch.dtype
    """The dtype of the weights on disk, which a pruned copy keeps."""
    merging: Merging | None = None
    """Its token merging; None if it never merges."""
    given: Any = None
    """The tokenizer, image processor, feature extractor or transform that came with a module in memory."""
    original: nn.Module | None = field(default=None, repr=False)
    """The caller's module in memory: `module` shares its weights and nothing else."""
    runtime: Any = field(default=None, repr=False)
    """What runs its exported file (`runtimes.targets.Runtime`), whose outputs are measured; None of any other model."""

    def __repr__(self) -> str:
        """A line for a notebook: the parts would fill pages."""
        millions = sum(p.numel() for p in self.module.parameters()) / 1e6
        return f"<{type(self).__name__} {self.spec}: {self.family.name}, {self.task.name}, {millions:.1f} M parameters>"

    @property
    def spec(self) -> str:
        return self.source.spec

    @property
    def device(self) -> torch.device:
        """The device that inputs go to: that of the first parameter that is on one."""
        found = (p.device for p in self.module.parameters() if p.device.type != "meta")
        return next(found, torch.device("cpu"))

    @property
    def devices(self) -> list[torch.device]:
        """The devices of its parameters: several for a model opened with a device map, without those that
        accelerate has moved out of the way until they are needed."""
        found = dict.fromkeys(parameter.device for parameter in self.module.parameters())
        return [device for device in found if device.type != "meta"]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def dtype_name(self) -> str:
        """The same as options and files have it: float32, bfloat16, float16; of an exported file perhaps int8."""
        return self.runtime.precision if self.runtime else dtype_name(self.dtype)

    @property
    def merges(self) -> list[int]:
        """Tokens merged behind each block; empty where none are."""
        return self.merging.merges if self.merging else []

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Within the context, no tokens are merged: units are scored and compensated on whole sequences."""
        with self.merging.suspended() if self.merging else nullcontext():
            yield

    @property
    def record(self) -> PrunedRecord | None:
        return self.source.record

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights as stored; of the state dict when timm made it by name."""
        files = self.source.weight_files()
        if files:
            return digest_files(files)
        state = self.module.state_dict()
        return digest_bytes(
            *(k.encode() + v.float().cpu().contiguous().numpy().tobytes() for k, v in sorted(state.items()))
        )

    @cached_property
    def processor(self) -> TextProcessor | ImageProcessor | AudioProcessor:
        """Tokenizer, image transform or feature extractor: as given, or from the model's own files or config.

        Raises `InputError` where there is none.
        """
        if self.given is not None:
            return given_processor(self.given, self.module, self.family.modality, self.source.folder)
        if self.source.library in LIBRARIES:
            return timm_image_processor(self.module)
        if self.source.folder is None:
            raise InputError(
                f"{self.spec} is a module in memory, and came without its tokenizer or image processor",
                f"open it with {param('processor')}, or give batches of tensors",
            )
        config, trusted = self.module.config, self.source.trust_remote_code
        if self.family.modality == AUDIO:
            return audio_processor(self.source.folder, config, has_decoder(self.module), trusted)
        if self.family.modality == IMAGE:
            return transformers_image_processor(self.source.folder, config, trusted)
        return text_processor(self.source.folder, config, trusted)

    @cached_property
    def dense(self) -> DenseFacts:
        """The original dense model."""
        if self.record is not None:
            return self.record.dense
        return {
            "id": self.spec,
            "digest": self.digest,
            "params": sum(p.numel() for p in self.module.parameters()),
            "dtype": dtype_name(self.stored_dtype),
            "macs_per_token": sum(s.units * s.macs_per_token + s.base_macs_per_token for s in self.anatomy),
            "macs_per_pair": sum(s.units * s.macs_per_pair for s in self.anatomy),
            "site_params": sum(s.params(s.units) for s in self.anatomy),
        }

    def run(self, inputs: Mapping[str, Tensor]) -> Any:
        """One forward, with the arguments that its family adds to the data; what the module gives."""
        return self.task.body(self.module)(**inputs, **self.family.arguments)

    def output(self, inputs: Mapping[str, Tensor], module: nn.Module | None = None) -> Tensor:
        """The model's output, [batch, rows, classes] (see `Task.output`); or that of a sliced copy, `module`."""
        return self.task.output(module or self.runtime or self.module, {**inputs, **self.family.arguments})

    def full_output(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the output that metrics are measured on (see `Task.full_output`)."""
        return self.task.full_output(self.runtime or self.module, {**inputs, **self.family.arguments})

    def row_weights(self, inputs: Mapping[str, Tensor], output: Tensor) -> Tensor:
        """Weight of each row of `output`, [batch, rows] (see `Task.row_weights`)."""
        return self.task.row_weights(inputs).expand(output.shape[:2])


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA when there is one. Raises `UsageError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", "use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"optin does not compute on the device {name!r}", "use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device is available", f"use {param('device', 'cpu')}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"there is no CUDA device {device.index}", f"use {param('device', 'cuda')}")
    return device


def open_model(
    spec: str,
    *,
    task: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    family: Family | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
    pruned: PrunedRecord | None = None,
) -> OpenModel:
    """Open any MODEL argument.

    `dtype` `auto` computes in float32 on CPU and in the stored dtype on a GPU. `family` overrides the table that
    the architecture's name would pick. `device_map` spreads a transformers model over devices (see accelerate).
    `trust_remote_code` runs the Python code that comes with a model of a class of its own. Without need of `weights`
    they may be missing, as in `open_module`. `pruned` is the record of a directory that has none in a file.
    Raises `UsageError`, `InputError` or `UnknownArchitecture`.
    """
    if device_map is not None:
        _check_device_map(device_map, device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", f"use auto, {', '.join(DTYPES)}")
    where = pick_device(device)
    compute = DTYPES.get(dtype) if device_map else None
    source, module, found_task, stored = open_module(
        spec, task, device_map, compute, weights, trust_remote_code, pruned
    )
    record = source.record
    if record is not None:
        family = _recorded(source)
    else:
        family = family_of(module, family)
    if found_task.reads_stages:
        family = replace(family, chained=False)
    anatomy = dissect(module, family)
    if device_map is None:
        if dtype == "auto":
            compute = torch.float32 if where.type == "cpu" else stored
        else:
            compute = DTYPES[dtype]
        module.to(where)
        if next(module.parameters()).dtype != compute:  # else rotary frequencies would lose their float32
            module.to(compute)
    _align(module)
    module.eval().requires_grad_(False)
    merging = None
    if record is not None and any(record.merges):
        merging = install_merges(module, anatomy, record.merges, what=f"{source.folder}/optin.json")
    return OpenModel(source, module, family, anatomy, found_task, stored, merging)


def open_like(spec: str | Path, model: OpenModel) -> OpenModel:
    """Open `spec` as `model` is: on its device, in its dtype, and trusting as much."""
    return open_model(
        str(spec),
        device=str(model.device),
        dtype=model.dtype_name,
        trust_remote_code=model.source.trust_remote_code,
    )


def open_module(
    spec: str,
    task: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    weights: bool = True,
    trust_remote_code: bool = False,
    pruned: PrunedRecord | None = None,
) -> tuple[Source, nn.Module, Task, torch.dtype]:
    """(source, module, task, dtype of the stored weights) of any MODEL that its library can build, in a table or not.

    `dtype` is for a `device_map` alone. Without need of `weights` a model is built from its config where they are not
    on this machine, with random ones (`Source.untrained`). Raises `UsageError` or `InputError`.
    """
    source = resolve(spec, weights, trust_remote_code)
    if pruned is not None:
        source = replace(source, record=pruned)

    def reshape(module: nn.Module) -> None:
        if source.record is not None:
            reshape_as_recorded(module, source.record, _recorded(source))

    if device_map is not None and source.library in LIBRARIES:
        raise UsageError(
            f"{spec} is a {source.library} model, and {param('device_map')} spreads transformers models alone"
        )
    with clear_errors(source), redirect_stdout(sys.stderr):  # torch hub prints there what it downloads
        if source.library in LIBRARIES:
            return source, *open_vision(source, task, reshape)
        opened = open_transformers(source, task, reshape, device_map, dtype)
        if source.record is not None:
            remember(opened[0], source.record)
        return source, *opened


def _recorded(source: Source) -> Family:
    """The family that a pruned directory carries. Raises `ArtefactError` when it is not a family's table."""
    assert source.record is not None
    try:
        return family_from_dict(source.record.family, "its family")
    except UsageError as error:
        raise ArtefactError(
            f"{source.folder}/optin.json is damaged: {error.what}", "run `optin apply` again"
        ) from error


ALIGNMENT = 64
"""Bytes: where torch's allocator begins every tensor on a CPU, and the longest vector that kernels load at once."""


def _align(module: nn.Module) -> None:
    """Copy weights that begin at an odd address, as those mapped from a file may, to other memory.

    Kernels choose their order of summation by alignment too. Aligned, a model read from a file gives bit for bit what
    the same weights gave in memory before they were written.
    """
    copies: dict[tuple[int, torch.Size], Tensor] = {}  # tied weights stay tied
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT:
            key = (tensor.data_ptr(), tensor.shape)
            if key not in copies:
                copies[key] = tensor.data.clone()
            tensor.data = copies[key]


def _check_device_map(device_map: str | dict[str, Any], device: str) -> None:
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise UsageError(f"unknown {param('device_map')} {device_map!r}", f"use {', '.join(DEVICE_MAPS)}")
    if device != "auto":
        raise UsageError(
            f"{param('device', device)} and {param('device_map')} both say where the model goes",
            "leave one out",
        )


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    fuse: bool = False,
) -> nn.Module:
    """Load a pruned directory (or any other MODEL) as a ready module in eval mode.

    With `fuse`, for inference alone, each BatchNorm behind a convolution is folded into it: outputs change by rounding
    (1e-5 of their size), and the weights are no longer those on disk. Models without BatchNorms stay as they are.
    Its library's own functions give the tokenizer: `transformers.AutoTokenizer.from_pretrained("m-60/")`. Raises what
    `open_model` raises.

    Example:
        >>> module = optin.load(folder / "small")
        >>> module(**batches[0]).logits.shape
        torch.Size([8, 2])
    """
    opened = open_model(str(path), device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if fuse:
        fuse_model(opened)
    return opened.module.requires_grad_(True)


def fuse_model(model: OpenModel) -> list[str]:
    """Fold the BatchNorms of a vision model in place: see `fuse_batch_norms`. Returns their paths."""
    if model.family.modality != IMAGE:
        return []
    name = next(iter(inspect.signature(model.module.forward).parameters))
    pixels = torch.zeros(1, 3, *image_size(model.module), device=model.device, dtype=model.dtype)
    return fuse_batch_norms(model.module, {name: pixels, **model.family.arguments})


def save_pruned(folder: Path, model: OpenModel, record: PrunedRecord) -> None:
    """Write config, safetensors, processor files and `optin.json` of a sliced model into an existing folder.

    Raises `UsageError` for a module of none of the libraries that could open it again.
    """
    save_open(folder, model, record)
    write_pruned(folder, record)


def save_open(folder: Path, model: OpenModel, record: PrunedRecord | None) -> None:
    """The same of a model that need not be pruned, without `optin.json`."""
    if not model.source.library:
        raise UsageError(
            f"{model.spec} is of no library that could open it again from a directory",
            "leave the output out and save the module that you get, or register a Writer for it",
        )
    module: Any = copy.deepcopy(model.module).to("cpu", model.stored_dtype)
    if model.source.library in LIBRARIES:
        save_vision(folder, module, model.source)
        # torchvision opens no directories itself
        if record is not None and (not record.is_stock or model.source.library == "torchvision"):
            (folder / CODE_FILE).write_text(code_for(record.library, record.resized))
    else:
        if record is not None:
            remember(module, record)
        save_transformers(folder, module)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors are written for the owner alone; a model is to be served
    save_companions(folder, model)


def save_companions(folder: Path, model: OpenModel) -> None:
    """Write what a directory has beside config and weights: tokenizer, processor and pooling files."""
    own = hasattr(model.given, "save_pretrained")  # those of the folder are another tokenizer's
    for path in model.source.extra_files(tokenizer=not own):
        assert model.source.folder is not None
        target = folder / path.relative_to(model.source.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if own:
        model.given.save_pretrained(folder)


def save_config(folder: Path, model: OpenModel) -> None:
    """Write config.json of the model's stock class: what a directory of exported files is opened by.

    Raises `UsageError` for a module of none of the libraries.
    """
    if not model.source.library:
        raise UsageError(
            f"{model.spec} is of no library that could open a directory of it", "give a name of a file"
        )
    if model.source.library in LIBRARIES:
        save_vision_config(folder, model.module, model.source)
        return
    module: Any = model.module
    stock = getattr(module.config, "dense_class", None)
    config = copy.copy(module.config)
    if stock:
        config = stock.from_dict({k: v for k, v in config.to_dict().items() if k != "auto_map"})
    config.architectures = [type(module).__name__]
    config.save_pretrained(folder)
