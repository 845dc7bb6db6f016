"""A ranking: the score of every unit of a model on a data set, with everything needed to trust and reuse it.

An HDF5 file behind a line with its digest (artefacts/sealed.py). Layout: root attributes (below), `/row_ids`,
`/sites/<name>` with attributes and the datasets `score` [units], `trajectory` [units, columns], `output` [units] and
`by_batch` [batches, units, 2], and optionally `/sketch` (artefacts/sketch.py), `/tokens`
(artefacts/token_ranking.py), `/ranks` and `/sublayers` (artefacts/site_losses.py).
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import h5py
import numpy as np
from numpy.typing import NDArray

from optin_cli.artefacts import typed
from optin_cli.artefacts.facts import DataFacts, DenseFacts, ModelFacts
from optin_cli.artefacts.files import NEEDS, atomic_file, digest_bytes, digest_json, update_hint
from optin_cli.artefacts.headers import Headers
from optin_cli.artefacts.kinds import check_kind, description
from optin_cli.artefacts.sealed import ROOM, is_whole, seal
from optin_cli.artefacts.site_losses import SiteLosses, fill_losses, load_losses
from optin_cli.artefacts.sketch import Sketch, fill_sketch, load_sketch
from optin_cli.artefacts.token_ranking import RankedTokens, fill_tokens, load_tokens
from optin_cli.errors import ArtefactError, OptinError, UsageError, first_line
from optin_cli.structure.coupled_layers import CoupledLayer
from optin_cli.structure.merge_schedule import tokens_by_block
from optin_cli.structure.unit_costs import UnitCosts

FORMAT = "optin-ranking"
SCHEMA_VERSION = 2
Array = NDArray[np.float64]
_PROBLEMS_SHOWN = 3


@dataclass
class RankedSite(UnitCosts):
    """The scores of one site. Higher means more important."""

    name: str
    kind: str
    block: int
    units: int
    width: int
    macs_per_token: float
    macs_per_pair: float
    params_per_unit: float
    score: Array
    """[units]"""
    trajectory: Array
    """[units, columns]: relational change of the deeper features, one column for each of `columns`."""
    output: Array
    """[units]: change of the model's output, unscaled."""
    columns: list[int]
    """The block whose feature each trajectory column measures."""
    by_batch: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0, 2), np.float32))
    """[batches, units, 2]: sum of the trajectory columns, and output, on each calibration batch alone; no batches
    for methods that need no data."""
    base_macs_per_token: float = 0
    """MACs for each token that stay until the last unit goes."""
    base_params: float = 0
    """Parameters that stay until then."""

    def __post_init__(self) -> None:
        if not len(self.by_batch):
            self.by_batch = np.zeros((0, self.units, 2), np.float32)

    def is_finite(self) -> bool:
        """Return whether the score of every unit, and its parts, are numbers."""
        return all(np.isfinite(getattr(self, part)).all() for part in _ARRAYS)


@dataclass(repr=False)
class Ranking:
    """See the module's docstring; the field names are the root attributes."""

    model: ModelFacts
    data: DataFacts
    row_ids: list[int]
    """The sampled rows of the split, ascending."""
    method: str
    settings: dict[str, Any]
    """Every setting that changes the scores."""
    tokens: float
    """Mean number of tokens of a calibration example, padding out."""
    dense: DenseFacts
    sites: list[RankedSite]
    token_sites: list[RankedTokens] = field(default_factory=list)
    """The cost of merging tokens, if that was measured."""
    rank_sites: list[SiteLosses] = field(default_factory=list)
    """The cost of lower ranks of heads, if that was measured."""
    sublayers: list[SiteLosses] = field(default_factory=list)
    """The cost of all heads of a block at once, if that was measured."""
    batch_weights: list[float] = field(default_factory=list)
    """Share of the calibration examples in each batch: what `by_batch` is averaged with."""
    device: str = "cpu"
    dtype: str = "float32"
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    seconds: float = 0.0
    sketch: Sketch | None = field(default=None, compare=False, repr=False)
    """The sketch of a ranking in memory, for interactions; that of a file is read by `read_sketch`."""

    def __repr__(self) -> str:
        """A line for a notebook: the scores would fill pages."""
        units, rows = sum(site.units for site in self.sites), len(self.row_ids)
        return f"<Ranking of {self.model['id']}: {units} units by {self.method} on {rows} rows of {self.data['spec']}>"

    @property
    def digest(self) -> str:
        """SHA-256 of what the scores are and came from; not of when and how fast."""
        facts = {
            "model": self.model["digest"],
            "data": self.data["fingerprint"],
            "rows": self.row_ids,
            "method": self.method,
            "settings": self.settings,
            "tokens": self.tokens,
        }
        parts = [a for s in self.sites for a in (s.score, s.trajectory, s.output)]
        parts += [a for t in self.token_sites for a in (np.array(t.counts), t.trajectory, t.output)]
        parts += [a for r in (*self.rank_sites, *self.sublayers) for a in (r.trajectory, r.output)]
        arrays = [a.tobytes() for a in parts]
        return digest_bytes(digest_json(facts).encode(), *arrays)

    @property
    def merges(self) -> list[int]:
        """Tokens that the ranked model merges behind each block; empty: none."""
        return list(self.model.get("merges", ()))

    @property
    def coupled(self) -> list[CoupledLayer]:
        """Layers between two sites."""
        return [CoupledLayer(**layer) for layer in self.model.get("shared", ())]

    def tokens_by_block(self, tokens: float, merges: Sequence[int]) -> list[float]:
        """Return how many tokens each block sees, with a schedule of merges."""
        depth = max((site.block for site in self.sites), default=0) + 1
        return tokens_by_block(tokens, depth, merges, self.model.get("prefix", 0))

    @property
    def kinds(self) -> set[str]:
        """Of the units: heads, neurons, channels."""
        return {site.kind for site in self.sites}

    def macs(self, tokens: float) -> float:
        """MACs of all sites of the ranked model, merging as it does."""
        seen = self.tokens_by_block(tokens, self.merges)
        return sum(site.macs(seen[site.block], site.units) for site in self.sites)

    def dense_macs(self, tokens: float) -> float:
        """MACs of all sites of the original dense model."""
        return self.dense["macs_per_token"] * tokens + self.dense["macs_per_pair"] * tokens * tokens


_JSON_ATTRIBUTES = ("model", "data", "settings", "dense", "versions", "batch_weights")
_ARRAYS = ("score", "trajectory", "output", "by_batch")
_PLAIN_ATTRIBUTES = ("method", "tokens", "device", "dtype", "created", "seconds")
_SITE_ATTRIBUTES = ("kind", "block", "units", "width", "macs_per_token", "macs_per_pair", "params_per_unit")
_BASE_ATTRIBUTES = ("base_macs_per_token", "base_params")
"""Of sites with such costs alone."""


def write_ranking(path: str | Path, ranking: Ranking, sketch: Sketch | None = None) -> None:
    """Write a ranking, with its sketch, as HDF5: the whole file or nothing.

    `sketch` is by default the ranking's own. Raises `InputError` where the disk is full.

    Example:
        >>> optin.write_ranking(folder / "r.h5", ranking)
    """
    # on a full disk HDF5 fails late and noisily, plain bytes don't
    sketch = ranking.sketch if sketch is None else sketch
    image = io.BytesIO()
    with h5py.File(image, "w", userblock_size=ROOM) as file:
        _fill(file, ranking)
        if sketch is not None:
            fill_sketch(file.create_group("sketch"), sketch)
    seal(image.getbuffer())
    with atomic_file(Path(path)) as temporary:
        temporary.write_bytes(image.getbuffer())


def _fill(file: h5py.File, ranking: Ranking) -> None:
    file.attrs["format"] = FORMAT
    file.attrs["schema_version"] = SCHEMA_VERSION
    for name in _PLAIN_ATTRIBUTES:
        file.attrs[name] = getattr(ranking, name)
    for name in _JSON_ATTRIBUTES:
        file.attrs[name] = json.dumps(getattr(ranking, name), sort_keys=True)
    file.create_dataset("row_ids", data=np.asarray(ranking.row_ids, dtype=np.int64), track_times=False)
    groups = file.create_group("sites", track_order=True)
    for site in ranking.sites:
        group = groups.create_group(site.name)
        for name in _SITE_ATTRIBUTES:
            group.attrs[name] = getattr(site, name)
        for name in _BASE_ATTRIBUTES:
            if value := getattr(site, name):
                group.attrs[name] = value
        group.attrs["macs_per_unit"] = site.macs_per_unit(ranking.tokens)
        group.attrs["columns"] = np.asarray(site.columns, dtype=np.int64)
        for name in _ARRAYS:
            group.create_dataset(name, data=getattr(site, name), track_times=False)
    if ranking.token_sites:
        fill_tokens(file.create_group("tokens"), ranking.token_sites)
    for name, losses in (("ranks", ranking.rank_sites), ("sublayers", ranking.sublayers)):
        if losses:
            fill_losses(file.create_group(name), losses)
    file.attrs["digest"] = ranking.digest
    file.attrs["checksum"] = _checksum(ranking)
    file.attrs["complete"] = True


def _checksum(ranking: Ranking) -> str:
    """SHA-256 over everything in the file; the digest leaves out what does not change the scores."""
    content = asdict(replace(ranking, sketch=None))
    del content["sketch"]
    for site in content["sites"]:
        site.update({name: digest_bytes(site[name].tobytes()) for name in _ARRAYS})
        for name in _BASE_ATTRIBUTES:
            if not site[name]:  # as before there were any
                del site[name]
    for part in ("token_sites", "rank_sites", "sublayers"):
        for site in content[part]:
            site.update({name: digest_bytes(site[name].tobytes()) for name in ("trajectory", "output")})
        if not content[part]:  # as before they were scored
            del content[part]
    return digest_json(content)


def read_ranking(path: str | Path) -> Ranking:
    """Read and check a ranking.

    Raises `UsageError` for a path that can't be read and `ArtefactError` for a file that is not a ranking, is
    damaged, incomplete, or of another schema.

    Example:
        >>> optin.read_ranking(folder / "r.h5").digest == ranking.digest
        True
    """
    path = Path(path)
    with _opened(path) as headers:
        ranking = _read(headers)
        if _checksum(ranking) != headers.attribute(headers.file, "checksum", str):
            raise _damaged(path)
        return ranking


def read_sketch(path: str | Path) -> Sketch | None:
    """The sketch in a ranking's file, None if it was left out. Raises what `read_ranking` raises.

    Interactions between units are computed from it: gradients [rows, units] of each site.

    Example:
        >>> optin.read_sketch(folder / "r.h5").trajectory["blocks.0.heads"].shape[1]
        4
    """
    path = Path(path)
    with _opened(path) as headers:
        if "sketch" not in headers.file:
            return None
        sketch = load_sketch(headers, headers.group(headers.file, "sketch"))
        if sketch is None:
            raise _damaged(path)
        return sketch


def _damaged(path: Path) -> ArtefactError:
    return ArtefactError(f"{path} is damaged: its content does not match its checksum", _AGAIN)


_AGAIN = "score again to replace it"
_MAKE = "write one with `optin score MODEL --data DATA -o FILE.h5`"


@contextmanager
def _opened(path: Path) -> Iterator[Headers]:
    """An open ranking of the right kind and version; whatever HDF5 raises becomes one message."""
    check_kind(path, "ranking", _MAKE)
    try:
        whole = is_whole(path, probe)
        if whole is None:
            raise ArtefactError(f"{path} is {description(path)}, not a ranking", _MAKE)
        if not whole:
            raise _damaged(path)
        with _headers(path) as headers:
            yield headers
    except PermissionError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from error
    except (OSError, LookupError, ValueError, TypeError, RuntimeError, AttributeError, MemoryError) as error:
        raise ArtefactError(f"{path} is not a readable ranking: {first_line(error)}", _AGAIN) from error


@contextmanager
def _headers(path: Path) -> Iterator[Headers]:
    """The same of a file that is HDF5."""
    with h5py.File(path, "r") as file:
        headers = Headers(file, path)
        if "format" not in file.attrs or headers.attribute(file, "format", str) != FORMAT:
            raise ArtefactError(f"{path} is an HDF5 file, but not a ranking written by optin", _MAKE)
        version = headers.attribute(file, "schema_version", int)
        if version != SCHEMA_VERSION:
            newer = version > SCHEMA_VERSION
            raise ArtefactError(
                f"{path} has schema version {version}; this optin reads version {SCHEMA_VERSION}",
                update_hint(_stated_versions(headers)) if newer else _score_again(headers, path),
            )
        if not bool(file.attrs.get("complete", False)):
            raise ArtefactError(f"{path} is incomplete: its scoring did not finish", _AGAIN)
        yield headers


def _score_again(headers: Headers, path: Path) -> str:
    """The command for a file of an earlier schema. Schema 1 has one sum where today's weights need every block."""
    with suppress(ValueError, LookupError, TypeError):
        model, data = (
            headers.plain(headers.file, name)[key] for name, key in (("model", "id"), ("data", "spec"))
        )
        command = ["optin", "score", model, "--data", data, "-o", str(path), "--force"]
        return f"score again: {shlex.join(command)}"
    return _AGAIN


def _stated_versions(headers: Headers) -> dict[str, Any]:
    """What a file of a later schema says of the optin that it needs or that wrote it."""
    found: dict[str, Any] = {}
    with suppress(ValueError, LookupError):
        found["versions"] = headers.plain(headers.file, "versions")
    with suppress(ValueError, LookupError):
        found[NEEDS] = headers.attribute(headers.file, NEEDS, str)
    return found


def probe(path: str) -> None:
    """Read all of a file, to see whether that ends; what is wrong with it, `read_ranking` says."""
    try:
        with _headers(Path(path)) as headers:
            _read(headers)
            if "sketch" in headers.file:
                load_sketch(headers, headers.group(headers.file, "sketch"))
    except (OptinError, OSError, LookupError, ValueError, TypeError, RuntimeError, AttributeError):
        return


def _read(headers: Headers) -> Ranking:
    file = headers.file
    attributes: dict[str, Any] = {name: headers.plain(file, name) for name in _JSON_ATTRIBUTES}
    hints = get_type_hints(Ranking, include_extras=True)
    problems = [p for name in _JSON_ATTRIBUTES for p in typed.problems(attributes[name], hints[name], name)]
    if problems:
        raise ValueError(", ".join(problems[:_PROBLEMS_SHOWN]))
    for name in _PLAIN_ATTRIBUTES:
        attributes[name] = headers.attribute(file, name, hints[name])
    groups = headers.group(file, "sites")
    sites = [_read_site(headers, name, headers.group(groups, name)) for name in headers.names(groups)]
    tokens = load_tokens(headers, headers.group(file, "tokens")) if "tokens" in file else []
    cuts = {
        "ranks": ({site.name: site.width for site in sites}, ("ranks", "dimensions")),
        "sublayers": (dict.fromkeys((site.name for site in sites), 1), ("the whole sublayer", "loss")),
    }
    losses = {
        name: load_losses(headers, headers.group(file, name), *of) if name in file else []
        for name, of in cuts.items()
    }
    rows = headers.array(file, "row_ids", (None,), "i").tolist()
    parts = {"sites", "token_sites", "rank_sites", "sublayers", "row_ids", "sketch"}
    assert set(attributes) | parts == {f.name for f in fields(Ranking)}
    return Ranking(
        **attributes,
        row_ids=rows,
        sites=sites,
        token_sites=tokens,
        rank_sites=losses["ranks"],
        sublayers=losses["sublayers"],
    )


def _read_site(headers: Headers, name: str, group: h5py.Group) -> RankedSite:
    hints = get_type_hints(RankedSite)
    given = [*_SITE_ATTRIBUTES, *(key for key in _BASE_ATTRIBUTES if key in group.attrs)]
    values = {key: headers.attribute(group, key, hints[key]) for key in given}
    columns, units = headers.attribute(group, "columns", list), values["units"]
    shapes = {
        "score": (units,),
        "trajectory": (units, len(columns)),
        "output": (units,),
        "by_batch": (None, units, 2),
    }
    try:
        arrays = {key: headers.array(group, key, shape, "f") for key, shape in shapes.items()}
    except ValueError as error:
        raise ValueError(f"{name} has {units} units, {len(columns)} columns; {error}") from error
    plain: dict[str, Any] = {key: array.astype(np.float64) for key, array in arrays.items()}
    plain["by_batch"] = arrays["by_batch"]
    site = RankedSite(name=name, **values, columns=columns, **plain)
    if not site.is_finite():
        raise ValueError(f"{name} has scores that are not finite")
    return site
