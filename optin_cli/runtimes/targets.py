"""The seam for runtimes: a `Target` writes a traced program to a file and loads it again."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from torch import Tensor

from optin_cli.errors import UsageError
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.runtimes.checks import Checks
from optin_cli.runtimes.program import SINGLE, Traced
from optin_cli.runtimes.prompt import IDS, with_empty_cache

Session = Callable[[Mapping[str, Tensor]], list[Tensor]]
"""Runs a file: inputs by name -> the outputs in order, float32."""


class Target(Protocol):
    """A runtime that models are exported to."""

    name: str
    """What `--to` takes."""
    suffix: str
    """Of its files."""
    extra: str
    """The extra of optin that installs its packages; empty where torch does it."""
    packages: Sequence[str]
    """The last one runs the files."""
    int8_packages: Sequence[str] = ()
    """Further ones that writing int8 needs."""
    files: Mapping[str, str]
    """Precision -> the path of its file in a directory, where libraries look for it."""

    def write(self, traced: Traced, path: Path, opset: int | None) -> dict[str, Any]:
        """Write a program in float32 or float16; returns further facts of the file for its record.

        Raises `InputError` for what the runtime has no operator for.
        """
        ...

    def write_int8(
        self,
        model: OpenModel,
        traced: Traced,
        path: Path,
        checks: Checks,
        max_error: float,
        opset: int | None,
    ) -> dict[str, Any]:
        """The same in int8, with layers in float32 as far as `max_error` asks for it. Only where `files` has a name."""
        raise UsageError(f"{self.name} has no int8")

    def load(self, path: Path, outputs: Sequence[str]) -> Session:
        """Open a file, to run on the CPU with as many threads as torch."""
        ...


@dataclass(frozen=True)
class Runtime:
    """An exported file that is open: called as its model is."""

    name: str
    """The runtime with its version."""
    path: Path
    precision: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    session: Session
    cache: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Of a decoder with its cache: input of past keys or values -> (heads, width)."""

    def __call__(self, **given: Any) -> Any:
        """What the model's task reads of its output: a tensor, or attributes. Other arguments are in the file. A cache
        is empty."""
        if self.cache and IDS in given:
            given = with_empty_cache(given, self.cache)
        missing = [name for name in self.inputs if name not in given]
        if missing:
            raise UsageError(
                f"{self.path} reads {', '.join(self.inputs)}, and the data has no {missing[0]}",
                "give it the data of the model that it was exported from",
            )
        found = dict(
            zip(self.outputs, self.session({name: given[name] for name in self.inputs}), strict=True)
        )
        return found[SINGLE] if self.outputs == (SINGLE,) else SimpleNamespace(**found)

    @property
    def bytes(self) -> int:
        """Size on disk: of the file, and of the weights beside it."""
        return sum(part.stat().st_size for part in parts_of(self.path))


def parts_of(path: Path) -> list[Path]:
    """A file and those that hold its weights."""
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else [path.with_name(f"{path.name}.data")]
    return [path, *(part for part in beside if part.is_file())]


def packages_of(target: Target, *, int8: bool) -> tuple[str, ...]:
    """The packages that write a file."""
    return (*target.packages, *(target.int8_packages if int8 else ()))


def check_installed(target: Target, *, int8: bool = False) -> None:
    """Raise `UsageError` where a package of a runtime is missing, naming the extra; `int8`: to write it."""
    for package in packages_of(target, int8=int8):
        need(package, target.extra)


def runtime_name(target: Target) -> str:
    """`onnxruntime 1.32.0`."""
    package = (target.packages or ("torch",))[-1]
    return f"{'torch.export' if package == 'torch' else package} {version(package)}"


def need(package: str, extra: str) -> Any:
    """Import an optional package. Raises `UsageError` where it is missing."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise UsageError(f"{error.name} is not installed", f"pip install 'optin[{extra}]'") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' own reports and warnings off the terminal; optin says what matters itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
