"""Run one block of a model and look at tensors inside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from optin_cli.structure.hidden_states import Arguments, hidden_of


@dataclass(frozen=True)
class Place:
    """A tensor inside a block: an argument that a module gets at its `call`-th call, or (argument None) its output."""

    module: str
    """Path within the block; '' is the block itself."""
    call: int
    argument: int | str | None


OUTPUT = Place("", 0, None)
"""The block's own output."""


class _Reached(Exception):
    """Everything asked for was seen: the rest of the block need not run."""


def run_block(
    block: nn.Module, arguments: Arguments, places: Collection[Place] = (OUTPUT,), *, stop: bool = False
) -> dict[Place, Tensor]:
    """Run a block and collect the tensors at `places`. With `stop`, run it only as far as the last of them."""
    args, kwargs = arguments
    return run_to(lambda: block(*args, **kwargs), block, places, stop=stop)


def run_to(
    run: Callable[[], Any], block: nn.Module, places: Collection[Place] = (OUTPUT,), *, stop: bool = False
) -> dict[Place, Tensor]:
    """Collect the tensors at `places` of a block while `run`, the block or what it is in, runs."""
    found: dict[Place, Tensor] = {}

    def see(place: Place, tensor: Tensor) -> None:
        found[place] = tensor
        if stop and len(found) == len(places):
            raise _Reached

    with ExitStack() as stack:
        for place in places:
            stack.enter_context(_watched(block, place, see))
        with suppress(_Reached):
            run()
    return found


def arguments_of(run: Callable[[], Any], block: nn.Module) -> Arguments:
    """Return the arguments that `run` calls a block with."""
    found: list[Arguments] = []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Reached

    handle = block.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with suppress(_Reached):
            run()
    finally:
        handle.remove()
    return found[0]


@contextmanager
def _watched(block: nn.Module, place: Place, see: Callable[[Place, Tensor], None]) -> Iterator[None]:
    module = block.get_submodule(place.module)
    calls = 0

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls == place.call + 1:
            see(
                place, arguments_by_name(args, kwargs)[place.argument].clone()
            )  # what comes may work in place

    def after(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == place.call + 1:
            hidden = hidden_of(output)
            see(place, hidden if place == OUTPUT else hidden.clone())

    if place.argument is None:
        handle = module.register_forward_hook(after)
    else:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def arguments_by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str | None, Any]:
    """Arguments by position or name."""
    named: dict[int | str | None, Any] = dict(enumerate(args))
    return named | dict(kwargs)


def order_of(block: nn.Module, paths: Sequence[str], arguments: Arguments) -> list[str]:
    """`paths` of modules within a block in the order they run; one that runs twice is there twice."""
    order: list[str] = []
    with ExitStack() as stack:
        for path in paths:

            def note(_: nn.Module, __: Any, ___: Any, path: str = path) -> None:
                order.append(path)

            stack.callback(block.get_submodule(path).register_forward_hook(note).remove)
        run_block(block, arguments)
    return order
