"""`prune`: score, select and apply in one, with the ranking cached by what went into it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from optin_cli.artefacts.mask import Mask
from optin_cli.artefacts.ranking import Ranking, read_ranking
from optin_cli.errors import ArtefactError
from optin_cli.scoring import score as scoring
from optin_cli.scoring.plan import ENGINES, Plan, Progress
from optin_cli.selection.select import Guards, check_request, select
from optin_cli.surgery import apply as surgery


@dataclass(frozen=True)
class Budget:
    """What `select` is asked for."""

    flops: float
    guards: Guards
    relative_to: str = "dense"


@dataclass(frozen=True)
class Pruned:
    """The three results of one call."""

    ranking: Ranking
    ranking_path: Path
    ranking_reused: bool
    mask: Mask
    applied: surgery.Applied


def ranking_path(plan: Plan, folder: Path) -> Path:
    """`<folder>/<model>-<data>-<digest of the inputs>.h5`: other inputs never meet the same name."""
    from optin_cli.artefacts.files import digest_json

    names = [_slug(plan.model.spec), _slug(plan.examples.data.spec), digest_json(plan.identity())[:8]]
    return folder / f"{'-'.join(names)}.h5"


def prune(
    plan: Plan,
    budget: Budget,
    output: Path,
    ranking: Path,
    *,
    force: bool = False,
    on_progress: Progress = lambda *_: None,
) -> Pruned:
    """Write the pruned model to `output`, scoring only if `ranking` is not the plan's ranking already.

    Raises what the three stages raise, before anything is scored where that can be known.
    """
    check_request(budget.flops, budget.relative_to, None, budget.guards)
    surgery.check_output(output, plan.model)
    if ranking.exists():
        _check_belongs(ranking, plan)
    found = scoring.existing(ranking, plan, any_lambda=True)
    scored = found or scoring.score(plan, ranking, on_progress)
    mask = select(
        scored,
        budget.flops,
        guards=budget.guards,
        output_weight=plan.settings.output_weight if plan.settings.method in ENGINES else None,
        relative_to=budget.relative_to,
    )
    applied = None if force else surgery.existing(output, plan.model, mask)
    applied = applied or surgery.apply(plan.model, mask, output)
    return Pruned(scored, ranking, found is not None, mask, applied)


def _check_belongs(path: Path, plan: Plan) -> None:
    """Raise `ArtefactError` for a ranking of another model: here it is an input, not an output in the way."""
    ranking = read_ranking(path)
    if ranking.model["digest"] != plan.model.digest:
        raise ArtefactError(
            f"{path} ranks other weights ({ranking.model['id']}, {ranking.model['digest'][:12]}) than "
            f"{plan.model.spec} ({plan.model.digest[:12]})",
            "leave --ranking out, or name a file to be written",
        )


def _slug(spec: str) -> str:
    name = (
        spec.rstrip("/").rpartition("/")[2] if not spec.startswith(("demo:", "timm:", "builtin:")) else spec
    )
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name.partition("?")[0]).strip("-.") or "model"
