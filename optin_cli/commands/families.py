"""`optin families`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optin_cli import console
from optin_cli.architectures.families import DOCS, Family, family_to_dict, family_to_yaml, known_families
from optin_cli.artefacts.files import atomic_file, check_writable
from optin_cli.commands import options
from optin_cli.commands.groups import spelling_of
from optin_cli.errors import UsageError, spelled

if TYPE_CHECKING:
    from optin_cli.tracing.propose import Proposal, Row


def families(
    task: options.Task,
    trust_remote_code: options.TrustRemoteCode,
    writing: options.Output,
    trace: Annotated[
        str | None,
        typer.Option("--trace", metavar="MODEL", help="Propose a table for a model, listed or not."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.yaml", help="Table to write, for --anatomy."),
    ] = None,
    modality: Annotated[
        str | None,
        typer.Option(
            "--modality",
            rich_help_panel="Model",
            help="text or image, if the model does not say what it reads.",
        ),
    ] = None,
) -> None:
    """List the known architectures and what is prunable in each, or propose a table for another one.

    Examples:

      optin families

      optin families --trace ./my-ernie -o ernie.yaml
    """
    if trace is not None:
        _trace(trace, output, task, modality, trust_remote_code, writing)
        return
    given = {
        "-o": output,
        "--task": task,
        "--modality": modality,
        "--trust-remote-code": trust_remote_code,
        "--force": writing.force,
        "--quiet": writing.quiet,
    }
    if names := [name for name, value in given.items() if value]:
        raise UsageError(f"{names[0]} is for a table to be proposed", "say which model's: --trace MODEL")
    known = known_families()
    if writing.json:
        console.emit_json({"families": [family_to_dict(family) for family in known]})
        return
    rows = [
        [
            family.name,
            ", ".join(family.matches),
            family.modality,
            ", ".join(prunable(family)),
            family.note,
        ]
        for family in known
    ]
    console.table("", ["family", "fits", "reads", "prunable", "note"], rows, numbers=False, stdout=True)
    console.note(f"anything else: optin families --trace MODEL proposes a table, see {DOCS}")


def prunable(family: Family) -> list[str]:
    """The kinds of units of a family, and ranks where heads can be cut to lower ones; tokens are merged rather than
    removed."""
    kinds = dict.fromkeys(site.kind for site in family.sites)  # a kind may have several tables
    ranks = any(site.ranks for site in family.sites)
    return [*kinds, *(["ranks"] if ranks else []), *(["tokens"] if family.tokens else [])]


def _trace(
    model: str,
    output: Path | None,
    task: str | None,
    modality: str | None,
    trust_remote_code: bool,
    writing: options.Writing,
) -> None:
    """Propose a table for `model`: to a file, or on stdout."""
    from optin_cli.tracing.propose import propose

    if output is not None:
        check_writable(output, "table")
    with console.progress(not writing.quiet) as on_progress:
        proposal = propose(model, task, modality, on_progress, trust_remote_code)
    text = family_to_yaml(proposal.family, _comments(proposal))
    if output is not None:
        _write(output, text, writing.force)
    if not writing.quiet:
        _report(proposal)
    if writing.json:
        console.emit_json({"model": model, "anatomy": output and str(output), **_described(proposal)})
    elif output is None:
        console.data(text)
    else:
        console.data(str(output))


def _write(path: Path, text: str, force: bool) -> None:
    same = path.is_file() and path.read_bytes() == text.encode()
    if path.exists() and not same and not force:
        raise UsageError(
            f"{path} exists and holds something else", "choose another name, or --force to replace it"
        )
    if not same:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _comments(proposal: Proposal) -> list[str]:
    """What the table itself can't say."""
    notes = [f"{row.table.label}: {_said(note)}" for row in proposal.rows for note in row.notes]
    return [
        "proposed by `optin families --trace`; in every site the sliced model computed what the masked one did",
        *notes,
        *(f"left out: {gone.where}: {gone.why}" for gone in proposal.left),
    ]


def _report(proposal: Proposal) -> None:
    """The sites that held and those that did not, on stderr."""
    family = proposal.family
    if proposal.untrained:
        console.note(f"{proposal.model}: traced with random weights, since none are on this machine")
    if proposal.listed:
        console.note(f"{proposal.model} is listed already, as {proposal.listed!r}: it needs no --anatomy")
    rows = [
        [
            row.table.label,
            f"{_producers(row)} -> {row.table.consumer}",
            str(len(row.blocks)),
            _units(row),
            console.count(row.params),
            console.count(row.macs),
            "; ".join(["verified", *map(_said, row.notes)]),
        ]
        for row in proposal.rows
    ]
    rows += [["-", gone.where, "", "", "", "", f"left out: {gone.why}"] for gone in proposal.left]
    blocks = family.blocks if isinstance(family.blocks, str) else ", ".join(family.blocks)
    title = f"{len(proposal.anatomy.blocks)} blocks in {blocks}, MACs at {proposal.positions} positions"
    columns = ["site", "in a block", "blocks", "units", "params", "MACs", "verdict"]
    console.table(title, columns, rows, numbers=False)


def _said(text: str) -> str:
    """A note of the library, with its parameters written as flags."""
    return spelled(text, spelling_of(families, ()))


def _producers(row: Row) -> str:
    return ", ".join(p.path if p.parts == 1 else f"{p.path} ({p.parts} parts)" for p in row.table.producers)


def _units(row: Row) -> str:
    return ", ".join(str(units) if width == 1 else f"{units} x {width}" for units, width in row.units)


def _described(proposal: Proposal) -> dict[str, Any]:
    return {
        "listed": proposal.listed or None,
        "random_weights": proposal.untrained,
        "family": family_to_dict(proposal.family),
        "blocks": list(proposal.anatomy.blocks),
        "positions": proposal.positions,
        "sites": [
            {
                "name": row.table.label,
                "blocks": list(row.blocks),
                "units": [list(pair) for pair in row.units],
                "params": row.params,
                "macs": row.macs,
                "notes": [*map(_said, row.notes)],
            }
            for row in proposal.rows
        ],
        "left_out": [{"where": gone.where, "why": gone.why} for gone in proposal.left],
    }
