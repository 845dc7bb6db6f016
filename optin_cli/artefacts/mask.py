"""A mask: which units of each site are kept, for which budget, of which ranking and model. JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from optin_cli.artefacts.facts import Asked, DataFacts, Objective, Reached
from optin_cli.artefacts.files import atomic_file, digest_json, read_record, to_json
from optin_cli.errors import ArtefactError

FORMAT = "optin-mask"
SCHEMA_VERSION = 4
"""1 knew the MACs budget alone, and counted the parameters of the sites alone; 2 merged no tokens; 3 kept heads
whole."""


@dataclass(repr=False)
class Mask:
    """See the module's docstring. The digest covers everything."""

    model_digest: str
    """SHA-256 of the weights the ranking was made on: `apply` refuses any other model."""
    ranking_digest: str
    family: str
    budget: Asked
    reached: Reached
    objective: Objective
    calibration: DataFacts
    """The source of the ranking's data, so that `apply` can check the model on the same rows."""
    units: dict[str, int]
    """Site name -> units before pruning."""
    keep: dict[str, list[int]]
    """Site name -> kept unit indices, ascending."""
    summary: dict[str, str] = field(default_factory=dict)
    """Site name -> `kept/units`, for readers."""
    merges: list[int] = field(default_factory=list)
    """Tokens merged behind each block, from the first one on; empty: none."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Site of heads -> dimensions that each of its kept heads keeps, where that is not all."""

    def __repr__(self) -> str:
        """A line for a notebook: the indices would fill pages."""
        kept, units = sum(map(len, self.keep.values())), sum(self.units.values())
        return f"<Mask of {kept} of {units} units, {100 * self.reached['flops']:.2f} % of the MACs>"

    @property
    def digest(self) -> str:
        content = asdict(self)
        for later in ("merges", "ranks"):  # as before masks had them
            if not content[later]:
                del content[later]
        return digest_json(content)


def mask_to_json(mask: Mask) -> str:
    """The file's text: the same mask always gives the same bytes."""
    return to_json({"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(mask)}) + "\n"


def write_mask(path: str | Path, mask: Mask) -> None:
    """Write a mask as JSON: the whole file or nothing.

    Example:
        >>> optin.write_mask(folder / "m.json", mask)
    """
    with atomic_file(Path(path)) as temporary:
        temporary.write_text(mask_to_json(mask))


def read_mask(path: str | Path) -> Mask:
    """Read and check a mask.

    Raises `UsageError` for a path that can't be read, `ArtefactError` for anything that is not a valid mask:
    it lists every site with indices out of range, repeated or out of order.

    Example:
        >>> optin.read_mask(folder / "m.json") == mask
        True
    """
    path = Path(path)
    mask = read_record(
        path, Mask, "a mask", FORMAT, SCHEMA_VERSION, maker="optin select", optional=("summary", "merges", "ranks"),
        shallow=("keep", "units", "merges", "ranks"),
    )  # fmt: skip
    problems = _problems(mask)
    if problems:
        raise ArtefactError(f"{path} is a damaged mask: {'; '.join(problems)}", "run `optin select` again")
    return mask


def _problems(mask: Mask) -> list[str]:
    problems = [
        f"{name}: {units!r} is not a number of units"
        for name, units in mask.units.items()
        if type(units) is not int or units < 0
    ]
    problems += [
        f"{count!r} is not a number of tokens to merge"
        for count in mask.merges
        if type(count) is not int or count < 0
    ]
    problems += [
        f"{rank!r} is not a rank of {name}, a site of the mask"
        for name, rank in mask.ranks.items()
        if type(rank) is not int or rank < 0 or name not in mask.units
    ]
    if "row_ids" not in mask.calibration:
        problems.append("calibration.row_ids is missing")
    if mask.budget.get("latency_table"):
        times = ("latency_ms", "table_latency_ms")
        problems += [f"reached.{name} is missing" for name in times if name not in mask.reached]
    if problems:
        return problems
    if set(mask.keep) != set(mask.units):
        odd = sorted(set(mask.keep) ^ set(mask.units))
        problems.append(f"`keep` and `units` name different sites ({', '.join(odd)})")
    for name, indices in mask.keep.items():
        if not isinstance(indices, list) or not all(type(i) is int for i in indices):
            problems.append(f"{name}: indices must be whole numbers")
            continue
        units = mask.units.get(name, 0)
        outside = [i for i in indices if not 0 <= i < units]
        if outside:
            problems.append(f"{name}: index {outside[0]} out of range (0..{units - 1})")
        elif len(set(indices)) < len(indices):
            twice = next(index for index, count in Counter(indices).items() if count > 1)
            problems.append(f"{name}: index {twice} twice")
        elif indices != sorted(indices):
            problems.append(f"{name}: indices are not ascending")
    return problems
