"""A sketch: gradients of a few probes with respect to every unit's mask, kept for the interactions between units.

With t, o the rows of a probe and example, scaled so that the squares add up to the scores,
trajectory(u) = sum_r t_ru^2 and output(u) = sum_r o_ru^2, removing a set S at once costs about
sum_r (sum_{u in S} t_ru)^2 and the same for o (docs/method.md, section 5).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from optin_cli.artefacts.files import digest_bytes
from optin_cli.artefacts.headers import Headers

STORED = np.float16
_CHUNK_ROWS = 64


@dataclass
class Sketch:
    """See the module's docstring. A method without a trajectory (fisher) has output rows alone."""

    examples: NDArray[np.int64]
    """[rows]: the calibration example each row is of. Rows of one example belong together when some are held out."""
    trajectory: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Site name -> [rows, units]."""
    output: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Site name -> [rows, units]."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def nbytes(self) -> int:
        """Size on disk before compression, which random signs hardly allow."""
        arrays = [*self.trajectory.values(), *self.output.values()]
        return sum(a.size for a in arrays) * np.dtype(STORED).itemsize + self.examples.nbytes


def fill_sketch(group: h5py.Group, sketch: Sketch) -> None:
    """Write into an empty group: float16 with one scale an array, chunked by rows, compressed."""
    group.create_dataset("examples", data=sketch.examples, track_times=False)
    for part in ("trajectory", "output"):
        for name, array in getattr(sketch, part).items():
            # float16 holds five decades: the scale moves them to where the values are
            scale = float(np.abs(array).max()) if array.size else 0.0
            stored = (array / scale if scale else array).astype(STORED)
            options = {}
            if array.size:
                chunk = (min(_CHUNK_ROWS, len(array)), array.shape[1])
                options = {"chunks": chunk, "compression": "gzip", "compression_opts": 1, "shuffle": True}
            dataset = group.create_dataset(f"{part}/{name}", data=stored, track_times=False, **options)
            dataset.attrs["scale"] = scale
    group.attrs["checksum"] = _checksum(group)


def load_sketch(headers: Headers, group: h5py.Group) -> Sketch | None:
    """Read what `fill_sketch` wrote; None when it does not match its checksum. Raises `ValueError` for
    anything else."""
    examples = headers.array(group, "examples", (None,), "i")
    parts: dict[str, dict[str, NDArray[np.float32]]] = {"trajectory": {}, "output": {}}
    checked = [_digested(group["examples"], examples, 1.0)]
    for part, arrays in parts.items():
        if part not in group:
            continue
        inner = headers.group(group, part)
        for name in sorted(headers.names(inner)):
            stored = headers.array(inner, name, (len(examples), None), "f")
            scale = headers.attribute(inner[name], "scale", float)
            checked.append(_digested(inner[name], stored, scale))
            arrays[name] = stored.astype(np.float32) * np.float32(scale)
    if digest_bytes(*checked) != headers.attribute(group, "checksum", str):
        return None
    return Sketch(examples, **parts)


def _checksum(group: h5py.Group) -> str:
    datasets = [group["examples"]]
    for part in ("trajectory", "output"):
        datasets += [dataset for _, dataset in sorted(group.get(part, {}).items())]
    return digest_bytes(*(_digested(d, d[:], d.attrs.get("scale", 1.0)) for d in datasets))


def _digested(dataset: h5py.Dataset, stored: NDArray[Any], scale: float) -> bytes:
    return dataset.name.encode() + repr(float(scale)).encode() + stored.tobytes()
