"""Write a report about a ranking and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from optin_cli.api.models import as_path
from optin_cli.reporting.write import write


def report(
    artefacts: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    png: str | Path | None = None,
    csv: str | Path | None = None,
) -> list[Path]:
    """Write one page about a ranking and what came of it: trade-off, what each budget keeps, costs, errors by site.

    The page is one file that needs no network. Without masks it shows what budgets from 0.9 to 0.2 would keep.

    Args:
        artefacts: the folder of a sweep; or files of a ranking, masks and a latency table, and directories of pruned
            models.
        output: the page (HTML).
        png: a folder for the charts as pictures; needs matplotlib.
        csv: a file with a row for each model of the sweep, or for each budget.

    Returns:
        The files that were written.

    Raises:
        UsageError: for a path that is none of these, for no ranking or several, and where nothing is to be written.
        ArtefactError: for damaged files, and for those that came from another ranking.

    Example:
        >>> [path.name for path in optin.report(folder / "sweep", folder / "report.html")]
        ['report.html']
    """
    paths = [artefacts] if isinstance(artefacts, str | Path) else list(artefacts)
    return write(paths, as_path(output), as_path(png), as_path(csv))
