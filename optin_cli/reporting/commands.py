"""The commands that make the artefacts of a report again, from what those record."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from optin_cli.artefacts.facts import DataFacts
from optin_cli.artefacts.ranking import Ranking
from optin_cli.reporting.collect import Budget, Report
from optin_cli.scoring.settings import ScoreSettings
from optin_cli.selection.budgets import budget_kinds

_SCORED = {
    "method": "--method", "samples": "--samples", "batch_size": "--batch-size", "max_length": "--max-length",
    "probes": "--probes", "rows": "--rows", "seed": "--seed",
}  # fmt: skip
_SELECTED = {
    "min_heads": "--min-heads", "min_neurons": "--min-neurons", "min_channels": "--min-channels",
    "max_prune": "--max-prune-per-layer", "only": "--only", "round_to": "--round-to", "interactions": "--interactions",
    "relative_to": "--relative-to",
}  # fmt: skip
_UNASKED = {
    "min_heads": 0, "min_neurons": 0, "min_channels": 0, "max_prune": 1.0, "only": None, "round_to": 1,
    "interactions": "none", "relative_to": "dense",
}  # fmt: skip


def commands(report: Report) -> list[str]:
    """One command a line: score, then select and apply for each budget that was given, then measure."""
    found = [score_command(report.ranking, str(report.path))]
    for budget in report.pruned:
        found.append(select_command(budget, str(report.path)))
        if budget.record is not None:
            found.append(apply_command(budget, report.ranking.model["id"]))
    return [line for line in found if line]


def score_command(ranking: Ranking, path: str) -> str:
    """`optin score MODEL --data DATA ... -o RANKING`, without the options that are at their defaults."""
    settings = {
        **ranking.settings.get("identity", {}),
        "method": ranking.method,
        "samples": len(ranking.row_ids),
    }
    defaults = {one.name: one.default for one in fields(ScoreSettings)}
    words = ["optin", "score", ranking.model["id"], *data_words(ranking.data)]
    words += _options(settings, _SCORED, defaults)
    return shlex.join([*words, "-o", path])


def data_words(data: DataFacts | Mapping[str, Any]) -> list[str]:
    """`--data glue/sst2 --split validation`"""
    words = ["--data", data["spec"]]
    words += ["--split", data["split"]] if data["split"] != "train" else []
    words += ["--config", str(data["config"])] if data.get("config") else []
    return words


def select_command(budget: Budget, path: str) -> str:
    """`optin select RANKING --flops 0.6 -o NAME.mask.json`; '' for a mask that says nothing of its budget."""
    asked: Mapping[str, Any] = budget.asked or {}
    if not asked:
        return ""
    words = ["optin", "select", path]
    for option, kind in budget_kinds().items():
        for one in kind.recorded(asked):
            words += [option, f"{one.amount:g}{'ms' if one.key.endswith('_ms') else ''}"]
    return shlex.join([*words, *_options(asked, _SELECTED, _UNASKED), "-o", f"{budget.label}.mask.json"])


def apply_command(budget: Budget, model: str) -> str:
    """`optin apply MODEL NAME.mask.json -o NAME/`"""
    assert budget.record is not None
    done = budget.record.history[-1].get("compensation", {})
    words = ["optin", "apply", model, f"{budget.label}.mask.json"]
    if done.get("method", "none") != "auto":
        words += ["--compensate", done.get("method", "none")]
    return shlex.join([*words, "-o", f"{budget.label}/"])


def _options(settings: Mapping[str, Any], names: Mapping[str, str], defaults: Mapping[str, Any]) -> list[str]:
    words = []
    for name, option in names.items():
        value = settings.get(name, defaults[name])
        if value is not None and value != defaults[name]:
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return words
