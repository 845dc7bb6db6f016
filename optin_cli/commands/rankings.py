"""`optin rankings`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from optin_cli import console
from optin_cli.artefacts.rankings import Found, places
from optin_cli.artefacts.rankings import rankings as stored
from optin_cli.commands import options
from optin_cli.commands.groups import everyday
from optin_cli.errors import ArtefactError

VERIFY = "verify"


@everyday("model")
def rankings(
    writing: options.Shown,
    opening: options.PlainOpening,
    what: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[verify] [FILE_OR_DIR...]",
            help="Where to look besides the usual places; `verify` first reads and checks all of each file.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="List those of this model's weights alone."),
    ] = None,
) -> None:
    """List the rankings there are: of ./rankings, OPTIN_RANKINGS, the user's cache, a clone's, and of paths.

    `optin score` takes one of them where model, data and every setting are the same. `optin rankings verify` checks
    digests and schemas, also of sketches, and ends with 3 where one is damaged.

    Examples:

      optin rankings

      optin rankings --model ./my-bert

      optin rankings verify rankings/ old.h5
    """
    given = list(what or [])
    verify = given[:1] == [Path(VERIFY)]
    given = given[verify:]
    # what is named is verified alone, what is listed comes on top of the usual places
    where = [one for one in places(given) if not (verify and given) or one[0] == "given"]
    digest = opening.open(model).digest if model else None
    found = [
        one
        for one in stored(where, whole=verify)
        if digest is None or (one.ranking is not None and one.ranking.model["digest"] == digest)
    ]
    if writing.json:
        console.emit_json(
            {"places": [_place(*one) for one in where], "rankings": [_facts(one) for one in found]}
        )
    else:
        _show(found, verify)
    broken = [one for one in found if one.ranking is None]
    if verify and broken:
        names = ", ".join(str(one.path) for one in broken)
        raise ArtefactError(
            f"{len(broken)} of {console.plural(len(found), 'ranking')} can't be used: {names}",
            "score again to replace them",
        )


def _place(name: str, path: Path) -> dict[str, str]:
    return {"name": name, "path": str(path)}


def _facts(one: Found) -> dict[str, Any]:
    facts: dict[str, Any] = {"path": str(one.path), "place": one.place, "problem": one.problem or None}
    ranking = one.ranking
    if ranking is not None:
        facts |= {
            "digest": ranking.digest,
            "model": ranking.model["id"],
            "model_digest": ranking.model["digest"],
            "data": ranking.data["spec"],
            "rows": len(ranking.row_ids),
            "method": ranking.method,
            "created": ranking.created,
        }
    return facts


def _show(found: list[Found], verify: bool) -> None:
    if not found:
        console.note("no rankings")
        return
    rows = []
    for one in found:
        facts = _facts(one)
        state = one.problem or ("whole" if verify else "")
        cells = [facts.get(key, "") for key in ("model", "data", "rows", "method", "created")]
        rows.append([str(one.path), *map(str, cells), one.place, state])
    columns = ["ranking", "model", "data", "rows", "method", "made", "place", ""]
    console.table("", columns, rows, numbers=False, stdout=True)
