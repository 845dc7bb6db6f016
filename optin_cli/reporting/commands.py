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
from optin_cli.selection.recorded import other_options, select_options

_SCORED = {
    "method": "method", "samples": "samples", "batch_size": "batch-size", "max_length": "max-length",
    "probes": "probes", "strata": "strata", "rows": "rows", "seed": "seed",
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
    words += other_options(settings, _SCORED, defaults)
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
    words = ["optin", "select", path, *select_options(asked)]
    return shlex.join([*words, "-o", f"{budget.label}.mask.json"])


def apply_command(budget: Budget, model: str) -> str:
    """`optin apply MODEL NAME.mask.json -o NAME/`"""
    assert budget.record is not None
    done = budget.record.history[-1].get("compensation", {})
    words = ["optin", "apply", model, f"{budget.label}.mask.json"]
    if done.get("method", "none") != "auto":
        words += ["--compensate", done.get("method", "none")]
    return shlex.join([*words, "-o", f"{budget.label}/"])
