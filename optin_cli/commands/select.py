"""`optin select`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from optin_cli import console
from optin_cli.artefacts import changes
from optin_cli.artefacts.files import check_no_folder, renew
from optin_cli.artefacts.kinds import stated_kind
from optin_cli.artefacts.mask import Mask, mask_to_json, read_mask, write_mask
from optin_cli.artefacts.ranking import read_ranking, read_sketch
from optin_cli.commands import options
from optin_cli.commands.budgets import BudgetGroup
from optin_cli.commands.groups import everyday
from optin_cli.commands.present import mask_facts, show_mask
from optin_cli.errors import UsageError
from optin_cli.selection.select import select as solve_mask
from optin_cli.selection.settings import Request


@everyday("output", "flops", "params", "memory", "latency", "latency_table")
def select(
    ranking: Annotated[Path, typer.Argument(metavar="RANKING", help="Written by `optin score`.")],
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="Mask to write (JSON); {} stands for the budget of a list."),
    ],
    requests: Annotated[dict[str, Request], BudgetGroup()],
    writing: options.Updated,
) -> None:
    """Find the best mask within one or several budgets. Milliseconds, without the model.

    Examples:

      optin select rankings/minilm.h5 --flops 0.6 -o m-60.mask.json

      optin select rankings/minilm.h5 --flops 0.9,0.8,0.7 -o 'm-{}.mask.json'

      optin select rankings/vit.h5 --flops 0.6 --tokens joint -o m.mask.json

      optin select r.h5 --latency 0.6 --latency-table cpu.json -o m.mask.json
    """
    if len(requests) > 1 and "{}" not in output:
        raise UsageError(
            f"{len(requests)} budgets make {len(requests)} masks, and {output} is one name",
            "put {} where the budget goes: -o 'm-{}.mask.json'",
        )
    check_no_folder(output, "mask")
    scored = read_ranking(ranking)
    exchanged = any(request.interactions != "none" for request in requests.values())
    sketch = read_sketch(ranking) if exchanged else None
    masks = {
        Path(output.replace("{}", name)): solve_mask(scored, request, sketch)
        for name, request in requests.items()
    }
    reused = {path: _is_there(path, mask, writing) for path, mask in masks.items()}
    for path, mask in masks.items():
        if not reused[path]:
            write_mask(path, mask)
        if not writing.quiet:
            show_mask(mask)
            if reused[path]:
                console.note(f"{path} is already this mask")
    facts = [{"mask": str(path), "reused": reused[path], **mask_facts(mask)} for path, mask in masks.items()]
    if writing.json:
        console.emit_json(facts[0] if len(facts) == 1 else {"masks": facts})
    else:
        console.data("\n".join(map(str, masks)))


def _is_there(path: Path, mask: Mask, writing: options.Writing) -> bool:
    """Whether `path` is this mask already; raises `UsageError` when it holds something else that is to stay."""
    check_no_folder(path, "mask")
    same = path.is_file() and path.read_bytes() == mask_to_json(mask).encode()
    _explain(path, mask, same)
    if same:
        renew(path)
        return True
    replaced = writing.force or (writing.update and stated_kind(path) == "mask")
    if path.exists() and not replaced:
        raise UsageError(
            f"{path} exists and holds something else", "choose another name, or --force to replace it"
        )
    return False


def _explain(path: Path, mask: Mask, same: bool) -> None:
    """Say what a mask that is there was made from, where that differs."""
    if not path.is_file():
        changes.explain_new(path)
        return
    differs = []
    if not same and stated_kind(path) == "mask":
        there = read_mask(path)
        was, now = ({"ranking": one.ranking_digest, **one.budget} for one in (there, mask))
        differs = changes.changes(was, now) or [changes.Change("mask", there.digest, mask.digest)]
    elif not same:
        differs = [changes.Change("kind", stated_kind(path) or "another file", "mask")]
    changes.explain(path, differs, ("ranking", "budget"))
