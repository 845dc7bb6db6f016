"""Weights that several modules share: slicing a site would leave the others with what no longer fits, or untie them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from optin_cli.errors import InputError
from optin_cli.structure.anatomy import Site

if TYPE_CHECKING:
    from torch import nn

_BY_OUTPUT = ("weight", "bias")


def refuse_ties(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise `InputError` naming both places where one weight has two names that are not sliced alike, or two sites."""
    slices = _slices(sites)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = [several for several in names.values() if len(several) > 1]
    if not tied:
        return
    for several in tied:
        first = next((name for name in several if name in slices), None)
        if first is None:
            continue
        owners = {id(model.get_submodule(name.rpartition(".")[0])) for name in several}
        other = next((n for n in several if slices.get(n) != slices[first]), "")
        if not other and len(owners) < len(several):  # one module under two names would be sliced twice
            other = next(name for name in several if name != first)
        if other:
            raise InputError(
                f"{first} and {other} are one weight: {_slicers(slices[first])} would slice the first, "
                f"{_slicers(slices.get(other, set()))} the second",
                "give each a separate copy, or leave the site out of the anatomy",
            )


def _slices(sites: Sequence[Site]) -> dict[str, set[tuple[str, int]]]:
    """Name of a weight -> (site, axis) that slice it. Raises `InputError` for two sites along one axis."""
    slices: dict[str, set[tuple[str, int]]] = {}
    for site in sites:
        for name, axis in _sliced(site):
            others = slices.setdefault(name, set())
            if both := [other for other, along in others if along == axis and other != site.name]:
                raise InputError(
                    f"{both[0]} and {site.name} both slice {name} along axis {axis}",
                    "leave one of the two sites out of the anatomy, or write `requires` so that a block takes one",
                )
            others.add((site.name, axis))
    return slices


def _slicers(slices: set[tuple[str, int]]) -> str:
    return " and ".join(sorted(f"{site} along axis {axis}" for site, axis in slices)) or "no site"


def _sliced(site: Site) -> Iterator[tuple[str, int]]:
    """(name of a parameter, axis along which slicing the site selects from it)."""
    for path in (*(producer.path for producer in site.producers), *site.carried):
        for name in _BY_OUTPUT:
            yield f"{path}.{name}", 0
    for path in (site.consumer, *site.readers):
        yield f"{path}.weight", 1
    yield from site.tensors.items()
