"""A plan's work: its items, and who runs them."""

from __future__ import annotations

from optin_cli.artefacts.token_ranking import RankedTokens
from optin_cli.scoring.methods.base import Arrays, Item, OnWork
from optin_cli.scoring.plan import Plan
from optin_cli.scoring.token_merging import TokenMerging
from optin_cli.scoring.totals import Totals


class Worker:
    """Runs the items of a plan's method and of merging tokens, and adds up what they find."""

    def __init__(self, plan: Plan) -> None:
        self.method = plan.method(plan.calibration, plan.settings, plan.labels)
        self.totals = Totals(self.method)
        self.merging = TokenMerging(plan.calibration) if plan.settings.tokens else None

    def items(self) -> list[Item]:
        """The work that is known from the start."""
        return self.method.items() + (self.merging.items() if self.merging else [])

    def more_items(self) -> list[Item]:
        """The work that follows from what was added so far."""
        return self.method.more_items(self.totals)

    def run(self, item: Item, on_work: OnWork = lambda _: None) -> Arrays:
        """The result of an item; nothing is added."""
        if self.merging is None or item.engine != self.merging.engine:
            return self.method.run(item, on_work)
        self.method.release()
        return self.merging.run(item)

    def add(self, item: Item, arrays: Arrays) -> None:
        """Add the result of an item, whoever ran it."""
        if self.merging is not None and item.engine == self.merging.engine:
            self.merging.add(item, arrays)
        else:
            self.totals.add(item, arrays)

    def token_sites(self) -> list[RankedTokens]:
        """Return the cost of merging tokens behind each block; empty if it was not asked for."""
        return self.merging.sites() if self.merging else []
