"""optin: make a pretrained transformer or CNN smaller and faster without retraining it.

From Python, with your own model and data::

    import optin_cli as optin

    model = optin.open_model("demo:minilm")             # or an nn.Module with its tokenizer
    ranking = optin.score(model, "builtin:prose")        # or a Dataset, a DataLoader, an iterable of batches
    mask = optin.select(ranking, flops=0.6)
    small = optin.apply(model, mask, "builtin:prose")    # small.module is ready to run
    optin.evaluate(small, "builtin:prose", baseline=model)

`optin.prune` does all of it in one call, and `optin.load("m-60/")` gives a pruned directory as a ready module.
docs/api.md lists every name. On the command line: `optin --help`.

Importing this package does not import torch; the first call does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "optin_cli.api.apply": ("apply", "save"),
    "optin_cli.api.export": ("export",),
    "optin_cli.api.measure": ("bench", "bench_generation", "evaluate", "latency_table"),
    "optin_cli.api.models": ("open_model",),
    "optin_cli.api.prune": ("prune",),
    "optin_cli.api.push": ("push",),
    "optin_cli.api.report": ("report",),
    "optin_cli.api.score": ("score",),
    "optin_cli.api.select": ("select",),
    "optin_cli.api.sweep": ("pick", "sweep"),
    "optin_cli.api.vocab": ("vocab",),
    "optin_cli.artefacts.latency": ("LatencyTable", "read_latency_table", "write_latency_table"),
    "optin_cli.artefacts.mask": ("Mask", "read_mask", "write_mask"),
    "optin_cli.artefacts.point": ("Point", "Sweep", "read_sweep"),
    "optin_cli.artefacts.pruned": ("PrunedRecord", "read_pruned"),
    "optin_cli.artefacts.ranking": ("RankedSite", "Ranking", "read_ranking", "read_sketch", "write_ranking"),
    "optin_cli.data.sources": ("DataSpec",),
    "optin_cli.errors": (
        "ArtefactError", "BudgetError", "GateError", "InputError", "OptinError", "UnknownArchitecture", "UsageError",
    ),
    "optin_cli.pruning.writers": ("Comparison", "Runnable", "Writer", "compare_outputs", "register_writer"),
    "optin_cli.measure.evaluate": ("Evaluation",),
    "optin_cli.measure.generation": ("Generation",),
    "optin_cli.measure.latency": ("Timing", "speedup", "speedup_interval"),
    "optin_cli.structure.anatomy": (
        "Anatomy", "Bypass", "Producer", "RelativePositions", "Site", "Stream", "UnitInput",
    ),
    "optin_cli.loading.checkpoint": ("OpenModel", "load"),
    "optin_cli.architectures.families": (
        "Family", "SiteTable", "StreamTable", "TokenTable", "known_families", "read_family", "register_family",
    ),
    "optin_cli.runtimes.export": ("Exported",),
    "optin_cli.scoring.methods.base": ("ScoringMethod",),
    "optin_cli.scoring.methods.registry": ("register_method",),
    "optin_cli.selection.budget": ("Budget",),
    "optin_cli.selection.budgets": ("Latency", "Macs", "Memory", "Params", "register_budget"),
    "optin_cli.pruning.apply": ("Applied", "PrunedModel"),
    "optin_cli.pruning.push": ("Pushed",),
    "optin_cli.vocabulary.reduce": ("Reduced", "ReducedModel"),
    "optin_cli.compensation.settings": ("SiteFit",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of a run
    "__version__",
    # the stages
    "open_model", "score", "select", "apply", "prune", "evaluate", "bench", "bench_generation", "save", "load",
    "speedup", "speedup_interval", "latency_table", "sweep", "pick", "report", "export", "push", "vocab",
    # what they take and give
    "DataSpec", "OpenModel", "Ranking", "RankedSite", "Mask", "PrunedModel", "Applied", "SiteFit", "PrunedRecord",
    "Exported", "Evaluation", "Timing", "Generation", "LatencyTable", "Sweep", "Point", "Pushed",
    "ReducedModel", "Reduced",
    # files
    "read_ranking", "write_ranking", "read_sketch", "read_mask", "write_mask", "read_latency_table",
    "write_latency_table", "read_pruned", "read_sweep",
    # architectures
    "register_family", "known_families", "read_family", "Family", "SiteTable", "Producer", "UnitInput", "Bypass",
    "RelativePositions", "StreamTable", "TokenTable", "Anatomy", "Site", "Stream",
    # scoring methods
    "register_method", "ScoringMethod",
    # budgets
    "register_budget", "Budget", "Macs", "Params", "Memory", "Latency",
    # formats
    "register_writer", "Writer", "Runnable", "Comparison", "compare_outputs",
    # errors
    "OptinError", "UsageError", "InputError", "UnknownArchitecture", "ArtefactError", "BudgetError", "GateError",
]  # fmt: skip

if TYPE_CHECKING:
    from optin_cli.api.apply import apply, save
    from optin_cli.api.export import export
    from optin_cli.api.measure import bench, bench_generation, evaluate, latency_table
    from optin_cli.api.models import open_model
    from optin_cli.api.prune import prune
    from optin_cli.api.push import push
    from optin_cli.api.report import report
    from optin_cli.api.score import score
    from optin_cli.api.select import select
    from optin_cli.api.sweep import pick, sweep
    from optin_cli.api.vocab import vocab
    from optin_cli.architectures.families import (
        Family,
        SiteTable,
        StreamTable,
        TokenTable,
        known_families,
        read_family,
        register_family,
    )
    from optin_cli.artefacts.latency import LatencyTable, read_latency_table, write_latency_table
    from optin_cli.artefacts.mask import Mask, read_mask, write_mask
    from optin_cli.artefacts.point import Point, Sweep, read_sweep
    from optin_cli.artefacts.pruned import PrunedRecord, read_pruned
    from optin_cli.artefacts.ranking import RankedSite, Ranking, read_ranking, read_sketch, write_ranking
    from optin_cli.compensation.settings import SiteFit
    from optin_cli.data.sources import DataSpec
    from optin_cli.errors import (
        ArtefactError,
        BudgetError,
        GateError,
        InputError,
        OptinError,
        UnknownArchitecture,
        UsageError,
    )
    from optin_cli.loading.checkpoint import OpenModel, load
    from optin_cli.measure.evaluate import Evaluation
    from optin_cli.measure.generation import Generation
    from optin_cli.measure.latency import Timing, speedup, speedup_interval
    from optin_cli.pruning.apply import Applied, PrunedModel
    from optin_cli.pruning.push import Pushed
    from optin_cli.pruning.writers import Comparison, Runnable, Writer, compare_outputs, register_writer
    from optin_cli.runtimes.export import Exported
    from optin_cli.scoring.methods.base import ScoringMethod
    from optin_cli.scoring.methods.registry import register_method
    from optin_cli.selection.budget import Budget
    from optin_cli.selection.budgets import Latency, Macs, Memory, Params, register_budget
    from optin_cli.structure.anatomy import (
        Anatomy,
        Bypass,
        Producer,
        RelativePositions,
        Site,
        Stream,
        UnitInput,
    )
    from optin_cli.vocabulary.reduce import Reduced, ReducedModel


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'optin_cli' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
