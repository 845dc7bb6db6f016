"""Where the time of a forward goes: the layers of each site, dense against pruned, and elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from optin_cli.errors import UsageError, param
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.measure.inputs import check_setting, default_size, draw
from optin_cli.measure.latency import Progress
from optin_cli.structure.anatomy import HEADS, Anatomy, Site

_WARMUP = 3


@dataclass(frozen=True)
class ProfiledSite:
    """The layers of one site: what makes its units, what they pass, and what reads them. Of heads all of attention."""

    site: str
    kind: str
    units: tuple[int, ...]
    """Of each model, as `ms`."""
    ms: tuple[float, ...]
    """Median of a forward. A layer that makes the units of one site and reads those of another is the former's."""


@dataclass(frozen=True)
class Profile:
    """The time of a forward of each model, by site."""

    models: tuple[str, ...]
    batch_size: int
    size: int
    device: str
    sites: tuple[ProfiledSite, ...]
    elsewhere_ms: tuple[float, ...]
    """Of each model: embeddings, norms, activations, the head, and calls."""
    total_ms: tuple[float, ...]
    """Of forwards without clocks in them."""
    rounds: int


def profile(
    models: Sequence[OpenModel],
    batch_size: int,
    size: int | None = None,
    *,
    repeats: int = 10,
    seconds: float = 5.0,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Profile:
    """Time the layers of each site while whole forwards run, models in turn, by clocks around modules.

    At least `repeats` rounds and until `seconds` are spent. The clocks cost a few microseconds each, so the parts are
    scaled to the time of forwards without them. Raises `UsageError` for a setting that a model can't run, and for an
    exported file.
    """
    size = size or default_size(models[0])
    for model in models:
        if model.runtime is not None:
            raise UsageError(
                f"{model.spec} is an exported file, which can't be looked into",
                f"leave {param('profile')} out",
            )
        check_setting(model, batch_size, size)
    inputs = [draw(model, batch_size, size, seed) for model in models]
    calls = [lambda m=model, given=given: m.run(given) for model, given in zip(models, inputs, strict=True)]
    plain: list[list[float]] = [[] for _ in models]
    parts: list[list[dict[str, float]]] = [[] for _ in models]
    if on_progress:
        on_progress(0, 1, f"profiling batches of {batch_size} at size {size}")
    with torch.inference_mode():
        for call in calls * _WARMUP:
            call()
        end, done = time.perf_counter() + seconds, 0
        while done < max(repeats, 1) or time.perf_counter() < end:
            for step in range(len(models)):
                index = (step + done) % len(models)
                plain[index].append(_whole_ms(calls[index], models[index].device))
                parts[index].append(_by_site(calls[index], models[index]))
            done += 1
    if on_progress:
        on_progress(1, 1, "profiling")
    totals = tuple(float(np.median(times)) for times in plain)
    names = [site.name for site in models[0].anatomy]
    scaled = [
        _scaled({key: [one[key] for one in rounds] for key in rounds[0]}, total)
        for rounds, total in zip(parts, totals, strict=True)
    ]
    sites = tuple(
        ProfiledSite(
            name,
            models[0].anatomy[name].kind,
            tuple(_units(model.anatomy, name) for model in models),
            tuple(times.get(name, 0.0) for times in scaled),
        )
        for name in names
    )
    elsewhere = tuple(
        total - sum(times.get(name, 0.0) for name in names)
        for total, times in zip(totals, scaled, strict=True)
    )
    return Profile(
        tuple(model.spec for model in models),
        batch_size,
        size,
        str(models[0].device.type),
        sites,
        elsewhere,
        totals,
        done,
    )


def _units(anatomy: Anatomy, name: str) -> int:
    return next((site.units for site in anatomy if site.name == name), 0)


_WHOLE = ""


def _scaled(times: dict[str, list[float]], total: float) -> dict[str, float]:
    """The median of each part, scaled as the whole forward with clocks is to the one without."""
    medians = {name: float(np.median(values)) for name, values in times.items()}
    factor = total / medians[_WHOLE] if medians[_WHOLE] else 1.0
    return {name: value * factor for name, value in medians.items()}


def _whole_ms(call: Callable[[], object], device: torch.device) -> float:
    clock = _Clock(device)
    begin = clock.now()
    call()
    return clock.ms(begin, clock.now())


def _by_site(call: Callable[[], object], model: OpenModel) -> dict[str, float]:
    """Milliseconds of one forward by site, and of all of it under ''."""
    clock = _Clock(model.device)
    spans: dict[str, list[tuple[Any, Any]]] = {site.name: [] for site in model.anatomy}
    with _clocked(model.module, regions(model), spans, clock):
        begin = clock.now()
        call()
        whole = begin, clock.now()
    found = {name: sum(clock.ms(*span) for span in some) for name, some in spans.items()}
    return found | {_WHOLE: clock.ms(*whole)}


class _Clock:
    """Times of a device: of a GPU by events, that do not wait for it until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        with torch.cuda.device(self.device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

    def ms(self, begin: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return (end - begin) * 1000
        end.synchronize()
        return begin.elapsed_time(end)


def regions(model: OpenModel) -> dict[str, str]:
    """Path of a module -> the site that its time belongs to. No module is inside another."""
    found: dict[str, str] = {}
    for site in model.anatomy:
        around = _around(site)
        inside = {name for name in found if name.startswith(f"{around}.")} if around else set()
        if site.kind == HEADS and around and not inside and not _others_inside(model.anatomy, site, around):
            found.setdefault(around, site.name)
        else:
            for producer in site.producers:
                found.setdefault(producer.path, site.name)
    for site in model.anatomy:
        for path in (*site.carried, *site.readers, site.consumer):
            found.setdefault(path, site.name)
    paths = set(found)
    return {
        path: name
        for path, name in found.items()
        if not any(path != other and path.startswith(f"{other}.") for other in paths)
    }


def _around(site: Site) -> str:
    """The innermost module with the site's consumer and all its producers inside; '' for the model itself."""
    paths = [path.split(".")[:-1] for path in (site.consumer, *(one.path for one in site.producers))]
    shared = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _others_inside(anatomy: Anatomy, site: Site, around: str) -> bool:
    paths = [
        path
        for other in anatomy
        if other.name != site.name
        for path in (other.consumer, *(one.path for one in other.producers))
    ]
    return any(path.startswith(f"{around}.") for path in paths)


@contextmanager
def _clocked(
    module: nn.Module, of: dict[str, str], spans: dict[str, list[tuple[Any, Any]]], clock: _Clock
) -> Iterator[None]:
    """Within the context, each module of a region notes when it began and ended."""
    with ExitStack() as stack:
        for path, name in of.items():
            begun: list[Any] = []

            def before(*_: Any, begun: list[Any] = begun) -> None:
                begun.append(clock.now())

            def after(*_: Any, begun: list[Any] = begun, into: list[Any] = spans[name]) -> None:
                into.append((begun.pop(), clock.now()))

            layer = module.get_submodule(path)
            stack.callback(layer.register_forward_pre_hook(before).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        yield
