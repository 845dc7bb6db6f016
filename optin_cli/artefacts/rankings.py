"""Where rankings are kept, and what is there: a ranking is paid once, so that one that fits is looked for first."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from optin_cli.artefacts.kinds import stated_kind
from optin_cli.artefacts.ranking import Ranking, read_ranking, read_sketch
from optin_cli.errors import OptinError, UsageError

VARIABLE = "OPTIN_RANKINGS"
"""Further folders, as PATH lists them."""
_SUFFIX = "*.h5"


@dataclass(frozen=True)
class Found:
    """A ranking's file, read."""

    path: Path
    place: str
    """Why it was looked at: `here`, `OPTIN_RANKINGS`, `user cache`, `repository`, or `given`."""
    ranking: Ranking | None
    """None where it can't be read."""
    problem: str = ""


def places(given: Iterable[Path] = ()) -> list[tuple[str, Path]]:
    """(name, folder or file) of every place, those that are given first; absent ones are left out.

    They are `./rankings`, where `optin prune` keeps its own, the folders of `OPTIN_RANKINGS`, the user's cache, and the
    rankings of a clone of the repository. Raises `UsageError` for a given one that is absent.
    """
    given = list(given)
    for path in given:
        if not path.exists():
            raise UsageError(f"no ranking and no folder at {path}")
    listed = [Path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    usual = [
        ("here", Path("rankings")),
        *((VARIABLE, folder) for folder in listed),
        ("user cache", cache / "optin" / "rankings"),
        ("repository", Path(__file__).resolve().parents[2] / "rankings"),
    ]
    found = [("given", path) for path in given] + [one for one in usual if one[1].is_dir()]
    seen: set[Path] = set()
    return [one for one in found if not (one[1].resolve() in seen or seen.add(one[1].resolve()))]  # type: ignore[func-returns-value]


def rankings(where: Iterable[tuple[str, Path]], *, whole: bool = False, naming: str = "") -> Iterator[Found]:
    """Every ranking in the places, in order; `whole` also reads the sketches.

    Passed by in a folder is a file of another kind, and one that does not hold the text `naming`, such as the digest of
    a model: attributes lie in a file as they are, and a search takes a hundredth of the time of reading it.
    """
    for place, path in where:
        files = [path] if path.is_file() else sorted(path.glob(_SUFFIX))
        for file in files:
            if path.is_file() or (stated_kind(file) == "ranking" and _holds(file, naming)):
                yield _read(file, place, whole)


def _holds(path: Path, text: str) -> bool:
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(text.encode()) >= 0
    except (OSError, ValueError):  # reading it says what is wrong
        return True


def _read(path: Path, place: str, whole: bool) -> Found:
    try:
        ranking = read_ranking(path)
        if whole:
            read_sketch(path)
    except OptinError as error:
        return Found(path, place, None, error.what)
    return Found(path, place, ranking)
