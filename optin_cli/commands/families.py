"""`optin families`."""

from __future__ import annotations

from optin_cli import console
from optin_cli.commands import options
from optin_cli.models.families import DOCS, Family, family_to_dict, known_families


def families(json: options.Json = False) -> None:
    """List the known architectures and what is prunable in each.

    Examples:

      optin families
    """
    known = known_families()
    if json:
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
    console.note(f"anything else: describe it in about ten lines, see {DOCS}")


def prunable(family: Family) -> list[str]:
    """The kinds of units of a family; tokens are merged rather than removed."""
    kinds = dict.fromkeys(site.kind for site in family.sites)  # a kind may have several tables
    return [*kinds, *(["tokens"] if family.tokens else [])]
