"""Run a model once on small synthetic inputs and record what each module was given and gave."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from optin_cli.architectures.positions import channels, image_size
from optin_cli.errors import InputError, UsageError, first_line, param
from optin_cli.structure.hidden_states import hidden_argument

BATCH, _TOKENS = 3, 10  # more than one of each: attention over a single token has no gradient
_SPECIAL_IDS = 5
_PADDED = 3  # tokens of the last example
_SMALL_SIDE, _MULTIPLE = 64, 32  # pixels of a side: five halvings leave a map
_INTERPOLATE = "interpolate_pos_encoding"
_READS = {"input_ids": "text", "pixel_values": "image"}

RUN_ERRORS = (
    RuntimeError,
    ValueError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    ZeroDivisionError,
)
"""Errors that a forward raises when sizes don't fit."""
_LONGEST = 200  # characters of an error

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """One call of a module, with everything it was given and gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    reads: Key
    """Identity of its first argument when it began; () if that is not a tensor."""
    writes: Key
    """Identity of its output, or of the first in a tuple; () if that is not a tensor."""

    @property
    def given(self) -> Tensor | None:
        """The first argument, where it is a tensor."""
        return _first_argument(self.args, self.kwargs)

    @property
    def gave(self) -> Tensor | None:
        """The output, or the first element of a tuple, where it is a tensor."""
        return _first_output(self.output)

    def is_intact(self) -> bool:
        """Return whether the output is a tensor that nothing has changed in place since."""
        return self.gave is not None and _key(self.gave) == self.writes


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    value = hidden_argument(args, kwargs) if args or kwargs else None
    return value if isinstance(value, Tensor) else None


def _first_output(output: Any) -> Tensor | None:
    value = output[0] if isinstance(output, tuple) and output else output
    return value if isinstance(value, Tensor) else None


@dataclass
class Run:
    """One forward pass. Tensors stay alive, so that two of one storage are the same one."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    """Paths in the order in which their modules were first called: a parent before its children."""
    output: Any = None

    def once(self, path: str) -> Call | None:
        """The call of a module that ran exactly once."""
        calls = self.calls.get(path, [])
        return calls[0] if len(calls) == 1 else None


def _key(tensor: Tensor | None) -> Key:
    """The same for two tensors that are one: views that change nothing are, what was changed in place is not."""
    return (
        () if tensor is None else (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor._version)
    )


def constants(one: Run, other: Run) -> set[str]:
    """Modules that are given the same in two runs on different inputs."""
    return {
        path
        for path, calls in one.calls.items()
        if all(
            a.given is not None and b.given is not None and torch.equal(a.given, b.given)
            for a, b in zip(calls, other.calls.get(path, []), strict=False)
        )
    }


@torch.no_grad()
def record(module: nn.Module, inputs: dict[str, Any]) -> Run:
    """Run `module` and record all calls of all its modules."""
    run = Run()

    begun: list[Key] = []

    def begin(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            begun.append(_key(_first_argument(args, kwargs)))
            if path not in run.calls:
                run.calls[path] = []
                run.order.append(path)

        return hook

    def end(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            run.calls[path].append(Call(args, kwargs, output, begun.pop(), _key(_first_output(output))))

        return hook

    with ExitStack() as stack:
        for path, child in module.named_modules():
            if path:
                stack.callback(child.register_forward_pre_hook(begin(path), with_kwargs=True).remove)
                stack.callback(child.register_forward_hook(end(path), with_kwargs=True).remove)
        run.output = forward(module, inputs)
    return run


@contextmanager
def seeded() -> Iterator[None]:
    """Within the context, what is drawn at random is the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def forward(module: nn.Module, inputs: dict[str, Any]) -> Any:
    """The module's output; what it draws at random is the same at every call."""
    with seeded():
        return module(**inputs)


def cacheless(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The argument that keeps a model from filling a cache; none where it fills none."""

    def fills(**arguments: Any) -> bool:
        return getattr(forward(module, {**inputs, **arguments}), "past_key_values", None) is not None

    return {"use_cache": False} if fills() and not fills(use_cache=False) else {}


def brief(error: BaseException) -> str:
    """The beginning of what an error says."""
    return first_line(error, _LONGEST)


def tensors_of(value: Any) -> list[Tensor]:
    """All floating point tensors in what a module gave."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_of(item)] if isinstance(value, list | tuple) else []


def modality_of(module: Any, library: str, modality: str | None) -> str:
    """`text` or `image`: as asked, or what the model says it reads. Raises `InputError` for anything else, and both."""
    config = getattr(module, "config", None)
    towers = {"text_config", "vision_config"} <= set(getattr(config, "sub_configs", ()))
    if towers and not hasattr(config, "vocab_size"):
        raise InputError(
            f"a {type(module).__name__} reads texts and images together, and one stack of blocks is traced at a time",
            "open its text or its vision model alone, save that and trace it",
        )
    if modality is not None:
        if modality not in _READS.values():
            raise UsageError(f"unknown {param('modality')} {modality!r}", "choose text or image")
        return modality
    if library != "transformers":
        return "image"
    reads = getattr(module, "main_input_name", "input_ids")
    if reads not in _READS:
        raise InputError(
            f"a {type(module).__name__} reads {reads}; only models of texts and images are traced"
        )
    return _READS[reads]


def synthetic_inputs(module: Any, library: str, modality: str) -> dict[str, Tensor]:
    """A few random tokens, some of them padding, or images of the size the model was made for."""
    generator = torch.Generator().manual_seed(0)
    if modality == "image":
        pixels = torch.randn(BATCH, channels(module), *image_size(module), generator=generator)
        return {"pixel_values" if library == "transformers" else "x": pixels}
    config = getattr(module, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise InputError(
            f"{type(module).__name__} has no config.vocab_size, so no text can be made up for it",
            f"if it reads images, say {param('modality', 'image')}",
        )
    first = _SPECIAL_IDS if vocabulary > 2 * _SPECIAL_IDS else 0  # texts that are all alike show little
    ids = torch.randint(first, vocabulary, (BATCH, _TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -_PADDED:] = 0  # without padding many models leave their masks out
    return {"input_ids": ids, "attention_mask": mask}


def smaller_images(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Corners of images for a model that takes them, convolutional or with positions that it can interpolate: sites
    show in them as well, and sooner."""
    images = next(iter(inputs.values()))
    convolutions = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))
    weights = sum(p.numel() for p in module.parameters())
    small = images.shape[-1] < 2 * _SMALL_SIDE or any(side % _MULTIPLE for side in images.shape[-2:])
    arguments = {} if convolutions >= weights / 2 else _interpolating(module)
    if len(inputs) > 1 or images.dim() != 4 or small or arguments is None:
        return inputs
    corners = {name: image[..., :_SMALL_SIDE, :_SMALL_SIDE].contiguous() for name, image in inputs.items()}
    try:
        with torch.no_grad():
            forward(module, {**corners, **arguments})
    except RUN_ERRORS:
        return inputs
    return {**corners, **arguments}


def _interpolating(module: nn.Module) -> dict[str, Any] | None:
    """The argument with which a model takes images of other sizes than its own; None if it has none."""
    return {_INTERPOLATE: True} if _INTERPOLATE in inspect.signature(module.forward).parameters else None


def rolled(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs, in another order of the examples."""
    return {name: value.roll(1, 0) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def unsettle(module: nn.Module, inputs: dict[str, Any]) -> None:
    """Move all weights a little, in place, and make small ones larger: no gain of 0, no units that start out equal, no
    activations that the biases keep at 0."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)

    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise(parameter))
                continue
            fan_in = max(1, parameter[0].numel())
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(noise(parameter) / fan_in**0.5)
            size = float(parameter.square().mean()) * fan_in  # what it makes of inputs of variance 1
            if 0 < size < 1:
                parameter.div_(size**0.5)
        _adapt_norms(module, inputs)


def _adapt_norms(module: nn.Module, inputs: dict[str, Any]) -> None:
    """Give BatchNorms the statistics of `inputs`: with others, what follows them may saturate."""
    norms = [n for n in module.modules() if isinstance(n, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    try:
        if norms:
            forward(module, inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
