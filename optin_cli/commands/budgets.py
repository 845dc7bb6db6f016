"""Options that say what a mask must meet, and the requests they make: the same in `select` and `prune`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from optin_cli.artefacts.latency import read_latency_table
from optin_cli.commands.groups import Group, Text, flag_of, option
from optin_cli.errors import UsageError, param, spelled
from optin_cli.selection.budgets import budget_kinds
from optin_cli.selection.settings import Request, token_fields


class BudgetGroup(Group):
    """An option for each kind of budget, and those of a request.

    Makes a request for each budget of the one option that may hold a list (`0.9,0.8`), by the budget as written; with
    `single`, the one request. With `optional`, none may be given: the request is not checked then.
    """

    def __init__(self, *, without: str = "", single: bool = False, optional: bool = False) -> None:
        texts = {
            "table": Text(lambda path, name: read_latency_table(path), type=Path),
            "round_to": Text(_round_to, default="auto"),
            "feature_weights": Text(_feature_weights),
            "tokens": Text(token_fields),
        }
        super().__init__(Request, without=without, shared="force", panel="Budget", texts=texts)
        self.single, self.optional = single, optional

    def parameters(self) -> list[inspect.Parameter]:
        made = []
        for flag, kind in budget_kinds().items():
            told = kind.help or (kind.__doc__ or f"Budget on {kind.name}.").split("\n")[0]
            info = typer.Option(
                flag, help=spelled(told, flag_of), metavar=kind.metavar, rich_help_panel=self.panel
            )
            made.append(option(_name(flag), str | None, info, None))
        return made + super().parameters()

    def build(self, given: Mapping[str, Any]) -> Any:
        """Raises `UsageError` for what is no number or no budget, `ArtefactError` for a table that can't be read."""
        values = self.values(given)
        merging = values.pop("tokens") or {}
        texts = {flag: given.get(_name(flag)) for flag in budget_kinds()}
        request = Request(**values, **merging)
        given_budgets = {flag: text for flag, text in texts.items() if text is not None}
        if self.optional and not given_budgets:
            return request
        found = with_budgets(request, given_budgets)
        return single(found) if self.single else found


def _name(flag: str) -> str:
    """`--latency-table` -> latency_table"""
    return flag.removeprefix("--").replace("-", "_")


def with_budgets(request: Request, texts: Mapping[str, str]) -> dict[str, Request]:
    """The request with the budgets that options hold as text, option -> text: one for each entry of the one list.

    Raises `UsageError` for two lists, and for what is no number or no budget.
    """
    lists = {option: _parts(option, text) for option, text in texts.items()}
    several = [option for option, parts in lists.items() if len(parts) > 1]
    if len(several) > 1:
        raise UsageError(
            f"{' and '.join(several)} are both lists", "give one list, the others one value each"
        )
    found, kinds = {}, budget_kinds()
    for part in lists[several[0]] if several else [next(iter(lists.values()), [""])[0]]:
        chosen = {option: part if option in several else parts[0] for option, parts in lists.items()}
        found[part] = request.with_budgets(kinds[option].parse(text) for option, text in chosen.items())
        found[part].check()
    return found


def single(found: dict[str, Request]) -> Request:
    """The one request; raises `UsageError` for a list."""
    if len(found) > 1:
        raise UsageError(
            f"one model has one budget, not {', '.join(found)}",
            "`optin select` writes a mask for each budget of a list in one call",
        )
    return next(iter(found.values()))


def _parts(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    twice = [part for index, part in enumerate(parts) if part in parts[:index]]
    if twice:
        raise UsageError(f"{option} {text} holds {twice[0]} twice")
    return parts


def _feature_weights(text: str, name: str) -> str | tuple[float, ...]:
    """A name, or numbers; `Request.check` knows the names."""
    if not any(letter.isdigit() for letter in text):
        return text
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"{param(name, meta=repr(text))} is not a list of numbers",
            "write a weight for each block as 0,0.5,1",
        ) from error


def _round_to(text: str, name: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text
