"""All scoring methods by name. A new one is a class in a file of this folder and its entry here, or a plugin's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from importlib.metadata import entry_points

from optin_cli.errors import InputError, UsageError, first_line, param
from optin_cli.loading.checkpoint import OpenModel
from optin_cli.scoring.methods.ablation import AblationMethod
from optin_cli.scoring.methods.base import ScoringMethod
from optin_cli.scoring.methods.curvature import CurvatureMethod
from optin_cli.scoring.methods.depth import DepthMethod
from optin_cli.scoring.methods.fisher import FisherMethod
from optin_cli.scoring.methods.flap import FlapMethod
from optin_cli.scoring.methods.knowledge import KnowledgeMethod
from optin_cli.scoring.methods.magnitude import MagnitudeMethod
from optin_cli.scoring.methods.mixed import MixedMethod
from optin_cli.scoring.methods.random import RandomMethod
from optin_cli.scoring.methods.reference import ReferenceMethod
from optin_cli.scoring.methods.wanda_sp import WandaSpMethod
from optin_cli.scoring.settings import ScoreSettings

ENTRY_POINTS = "optin.methods"
"""The group of entry points under which a package offers methods: `name = "module:Class"`."""

BUILT_IN: tuple[type[ScoringMethod], ...] = (
    CurvatureMethod,
    AblationMethod,
    MixedMethod,
    FisherMethod,
    KnowledgeMethod,
    ReferenceMethod,
    FlapMethod,
    WandaSpMethod,
    DepthMethod,
    MagnitudeMethod,
    RandomMethod,
)
METHODS = {method.name: method for method in BUILT_IN}


def register_method(method: type[ScoringMethod]) -> type[ScoringMethod]:
    """Add a scoring method, or replace one of the same name; returns it, so that it serves as a decorator.

    Raises `UsageError` for a name that is a built-in method's, or that can't be part of a file name.

    Example:
        >>> @optin.register_method
        ... class InOrder(optin.ScoringMethod):
        ...     name, needs_data = "in_order", False
        ...
        ...     def items(self):
        ...         return []
        ...
        ...     def combine(self, sites):
        ...         return {site.name: torch.arange(1.0, site.units + 1).double().numpy() for site in sites}
        >>> optin.score(model, batches, samples=8, method="in_order").sites[0].score
        array([1., 2., 3., 4.])
    """
    name = getattr(method, "name", "")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(
            f"{method.__name__} has the name {name!r}", "use lower-case letters, digits and underscores"
        )
    if any(name == other.name for other in BUILT_IN):
        raise UsageError(f"{name} is a built-in scoring method", "choose another name")
    METHODS[name] = method
    return method


def method_named(name: str) -> type[ScoringMethod]:
    """The method `name`, which an installed package may offer.

    Raises `UsageError` for an unknown name and `InputError` for what can't be imported or is not a method.
    """
    if name in METHODS:
        return METHODS[name]
    offered = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in offered:
        known = dict.fromkeys([*METHODS, *offered])
        raise UsageError(f"unknown method {name!r}", f"choose one of {', '.join(known)}")
    try:
        method = offered[name].load()
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"can't load {offered[name].value} for {param('method', name)}: {first_line(error)}"
        ) from error
    if not (isinstance(method, type) and issubclass(method, ScoringMethod) and method.name == name):
        raise InputError(f"{offered[name].value} is not a ScoringMethod with the name {name!r}")
    return register_method(method)


def configured(settings: ScoreSettings) -> ScoreSettings:
    """The settings with the defaults of their method.

    Raises what `method_named` raises, and `UsageError` for settings that the method can't serve.
    """
    method, name = method_named(settings.method), settings.method
    if settings.per_batch and not method.takes_per_batch:
        owners = names_where(lambda other: other.takes_per_batch)
        raise UsageError(
            f"{param('per_batch')} is about {owners}'s gradients; {param('method', name)} has none"
        )
    if settings.tokens and not method.recombines:
        raise UsageError(
            f"{param('tokens')} measures trajectories, and {param('method', name)} scores units by something else",
            f"use {names_where(lambda other: other.recombines)}",
        )
    if settings.ranks and not method.takes_ranks:
        raise UsageError(
            f"{param('ranks')} needs the curvature of ranks, and {param('method', name)} has none",
            f"use {names_where(lambda other: other.takes_ranks)}",
        )
    if settings.strata is not None and not method.takes_strata:
        raise UsageError(
            f"{param('strata')} joins backward passes of curvature, and {param('method', name)} has none",
            f"use {names_where(lambda other: other.takes_strata)}",
        )
    if settings.exact_band is not None and not method.takes_band:
        raise UsageError(
            f"{param('exact_band')} re-scores what curvature scored; {param('method', name)} has nothing of it"
        )
    weight = settings.output_weight
    return dataclasses.replace(
        settings,
        temperature=method.temperature if settings.temperature is None else settings.temperature,
        output_weight=method.output_weight if weight is None or method.output_weight == 0 else weight,
    )


def check_scores(method: type[ScoringMethod], model: OpenModel) -> None:
    """Raise `UsageError` naming the methods that can, unless `method` can score `model`."""
    if reason := method.misfit(model):
        others = names_where(lambda other: not other.misfit(model))
        raise UsageError(f"{param('method', method.name)} {reason}", f"use {others}" if others else None)


def names_where(holds: Callable[[type[ScoringMethod]], bool]) -> str:
    """The names of the methods for which `holds` is true: `a, b or c`."""
    names = [name for name, method in METHODS.items() if holds(method)]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
