"""Find sites: layers each of whose inputs is made of one unit of the layers before, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from optin_cli.structure.anatomy import CHANNELS, HEADS, NEURONS, Producer
from optin_cli.structure.layers import is_grouped, shape_of
from optin_cli.tracing.flow import Flow, Sources, is_layer, outputs_of
from optin_cli.tracing.layouts import is_by_unit, one_for_each_head, part_after_part
from optin_cli.tracing.record import Run

_MOST_PRODUCERS = 6  # a layer made of more reads the residual stream
_LOOKED_AT, _MOST_LOOKED_AT = 4, 24  # input features of a layer


OnProgress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class LeftOut:
    """A place that could be a site, and why it is left out."""

    where: str
    why: str
    layers: tuple[str, ...] = ()
    """All layers it is about."""


@dataclass(frozen=True)
class TracedSite:
    """A site as the flow shows it. All paths are from the model."""

    kind: str
    width: int
    units: int
    """Single ones, or groups of heads that share keys and values."""
    producers: tuple[Producer, ...]
    consumer: str
    carried: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    per_unit: tuple[str, ...] = ()
    """Layers with one output a unit: computed biases, a gate for each head, a convolution over heads."""
    norm: str = ""
    group: int = 1
    """Heads in a unit."""

    @property
    def layers(self) -> tuple[str, ...]:
        return (
            *(p.path for p in self.producers),
            *self.readers,
            *self.carried,
            *self.per_unit,
            self.consumer,
        )

    @property
    def root(self) -> str:
        """The module that holds all of it."""
        return common_parent(self.layers)


def common_parent(paths: Sequence[str]) -> str:
    """The innermost module that holds all of these."""
    common = []
    for names in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


class Unfit(Exception):
    """A reason why a layer can't be a consumer."""


class MixedInputs(Unfit):
    """It reads mixtures of what layers before it give."""


def find_sites(
    module: nn.Module, flow: Flow, run: Run, on_progress: OnProgress
) -> tuple[list[TracedSite], list[LeftOut]]:
    """(sites, what looks like one and is none), in the order their consumers run."""
    read = {path: flow.sources(path)[0] for path in flow.inputs}  # reader -> layer -> features it reads
    found: list[TracedSite] = []
    left: list[LeftOut] = []
    for done, (path, sources) in enumerate(read.items()):
        on_progress(done, len(read), f"looking at {path}")
        own = {p for p in sources if is_layer(module.get_submodule(p))}  # not embeddings, which all may share
        if not own or len(own) > _MOST_PRODUCERS:
            continue
        others = [reader for reader, theirs in read.items() if reader != path and own & set(theirs)]
        layers = (path, *own, *others)
        shared = next((reader for reader in others if not set(read[reader]) < set(sources)), None)
        try:
            if any(is_grouped(module.get_submodule(p)) for p in layers):
                raise Unfit("a convolution in groups can't lose single channels")
            site = _site(module, flow, path, sources)
        except Unfit as reason:
            if shared is None:
                left.append(LeftOut(path, str(reason), layers))
            elif not isinstance(reason, MixedInputs):  # layers that read one residual stream need no reason
                left.append(LeftOut(path, f"what it reads, {shared} reads too", layers))
            continue
        if shared is not None:
            left.append(LeftOut(path, f"what it reads, {shared} reads too", layers))
        else:
            shared_by_all = {p for p in site.per_unit if sum(p in theirs for theirs in read.values()) > 1}
            found.append(
                replace(
                    site,
                    readers=tuple(others),
                    norm=_norm_behind(module, run, path),
                    per_unit=tuple(p for p in site.per_unit if p not in shared_by_all),
                )
            )
    taken = {reader for site in found for reader in site.readers}
    return found, [gone for gone in left if gone.where not in taken]


def _site(module: nn.Module, flow: Flow, path: str, sources: Sources) -> TracedSite:
    layer = module.get_submodule(path)
    features = shape_of(layer, path).inputs
    seen: dict[int, Sources] = {}
    carried: dict[str, None] = {}
    for feature in _spread(features):
        made_of, passed = flow.sources(path, feature)
        if made_of:  # else an activation is at 0 wherever it was looked at
            seen[feature] = made_of
            carried |= dict.fromkeys(passed)
        if len(seen) == _LOOKED_AT:
            break
    if not seen:
        raise Unfit("its inputs depend on no output of the layers before")
    outputs = {p: outputs_of(module.get_submodule(p)) for p in sources}
    order = list(flow.inputs)
    try:
        return _units(module, path, order, seen, outputs, carried, features)
    except Unfit:
        if not (grouped := _grouped(module, seen, outputs, features)):
            raise
        shared, group, seen = grouped
        one = _units(
            module, path, order, seen, {**outputs, **dict.fromkeys(shared, features)}, carried, features
        )
        if one.per_unit or one.units % group:
            raise
        producers = tuple(replace(p, shared=p.path in shared) for p in one.producers)
        return replace(
            one, producers=producers, group=group, width=one.width * group, units=one.units // group
        )


def _grouped(
    module: nn.Module, seen: Mapping[int, Sources], outputs: Mapping[str, int], features: int
) -> tuple[list[str], int, dict[int, Sources]] | None:
    """(layers that hold something once for a group of heads, heads in a group, `seen` with their outputs numbered as if
    each head had one); None where that is not so."""
    shared = [p for p, n in outputs.items() if n < features and is_layer(module.get_submodule(p))]
    groups = {features / outputs[p] for p in shared}
    if len(groups) != 1 or not (group := groups.pop()).is_integer():
        return None
    renumbered = dict(seen)
    for path in shared:
        reached = {feature: sources.get(path, frozenset()) for feature, sources in seen.items()}
        own = one_for_each_head(reached, int(group), outputs[path])
        if own is None:
            return None
        renumbered = {feature: {**sources, path: own[feature]} for feature, sources in renumbered.items()}
    return shared, int(group), renumbered


def _units(
    module: nn.Module,
    path: str,
    order: Sequence[str],
    seen: dict[int, Sources],
    outputs: Mapping[str, int],
    carried: Mapping[str, None],
    features: int,
) -> TracedSite:
    """The site of a consumer whose input features are made of what was `seen`. `outputs`: of each layer among that."""
    seen, sources, layer = dict(seen), list(outputs), module.get_submodule(path)
    whole = [p for p in sources if outputs[p] % features == 0 and is_layer(module.get_submodule(p))]
    misfit = next((p for p in sources if p not in whole and is_layer(module.get_submodule(p))), "")
    share = "several units share them" if outputs.get(misfit, 0) < features else "they are not all units"
    why = f"{misfit} gives {outputs.get(misfit)} features where {features} are read: {share}"
    if not whole:
        raise Unfit(why)
    by_unit = _rearranged(seen, {p: outputs[p] // features for p in whole}, features)
    try:
        width = _width(seen, {p: outputs[p] for p in whole}, features)
    except MixedInputs as reason:
        raise Unfit(why) if misfit else reason from reason
    units = features // width
    small = [p for p in sources if p not in whole and outputs[p] == units]
    of_units = all(made_of.get(p, frozenset()) <= {f // width} for f, made_of in seen.items() for p in small)
    if (misfit and misfit not in small) or not of_units:
        raise Unfit(why)
    if width == features:
        raise MixedInputs(
            f"all its {features} inputs depend on each other: a norm or a gate over all of them, or one head alone"
        )
    sizes = {p: outputs_of(module.get_submodule(p)) for p in carried}
    if odd := [p for p in carried if sizes[p] not in (features, units)]:
        raise Unfit(f"{odd[0].rpartition('.')[2]} is between, with {sizes[odd[0]]} channels for {features}")
    small += [p for p in carried if sizes[p] != features]
    kind = HEADS if width > 1 else CHANNELS if isinstance(layer, nn.Conv2d) else NEURONS
    producers = tuple(
        Producer(p, outputs[p] // features, p in by_unit) for p in sorted(whole, key=order.index)
    )
    return TracedSite(
        kind,
        width,
        units,
        producers,
        path,
        tuple(p for p in carried if sizes[p] == features),
        per_unit=tuple(small),
    )


def _spread(features: int) -> list[int]:
    """Some of the input features: both ends first, then all over."""
    step = max(1, features // _MOST_LOOKED_AT)
    first = [0, features - 1, features // 2, features // 3]
    return list(dict.fromkeys([*first, *range(0, features, step)]))


def _rearranged(seen: dict[int, Sources], parts: Mapping[str, int], features: int) -> list[str]:
    """Fused projections that hold their parts unit by unit; in `seen` their outputs are renumbered part after part."""
    found = []
    for path, several in parts.items():
        reached = {feature: sources.get(path, frozenset()) for feature, sources in seen.items()}
        if any(is_by_unit(outputs, several, features) for outputs in reached.values()):
            renumbered = part_after_part(reached, several, features)
            if renumbered is None:
                raise Unfit(
                    f"{path.rpartition('.')[2]} holds its {several} parts in no order that a table describes"
                )
            for feature, outputs in renumbered.items():
                seen[feature] = {**seen[feature], path: outputs}
            found.append(path)
    return found


def _width(seen: Mapping[int, Sources], outputs: Mapping[str, int], features: int) -> int:
    """Features of one unit: how many outputs of each part of a producer reach one input.

    One part at least, the values of attention, reaches it by one output alone.
    """
    width = 1
    alone: set[tuple[str, int]] = {(p, part) for p in outputs for part in range(outputs[p] // features)}
    spans = []
    for feature, sources in seen.items():
        for path in outputs:
            reached = sources.get(path, frozenset())
            parts = outputs[path] // features
            for part in range(parts):
                own = {f - part * features for f in reached if part * features <= f < (part + 1) * features}
                if own - {feature}:
                    alone.discard((path, part))
                if own:
                    spans.append((feature, min(own), max(own)))
                    width = max(width, max(own) - min(own) + 1)
    if not spans:
        raise MixedInputs("its inputs are made of other layers than those it could lose units with")
    if width > 1 and not alone:
        raise MixedInputs("its inputs are mixtures: no layer before gives each of them alone")
    if features % width or any(
        low // width != f // width or high // width != f // width for f, low, high in spans
    ):
        raise Unfit("its inputs are made of outputs at other places: shuffled, shifted or put side by side")
    return width


def _norm_behind(module: nn.Module, run: Run, path: str) -> str:
    """The BatchNorm that reads a layer's output, or ''."""
    call = run.once(path)
    if call is None or not call.writes:
        return ""
    for other in run.order:
        theirs = run.once(other)
        if theirs and theirs.reads == call.writes and isinstance(module.get_submodule(other), nn.BatchNorm2d):
            return other
    return ""
