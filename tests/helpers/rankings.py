"""Rankings drawn at random, and how the content of one is compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from optin_cli.artefacts.ranking import (
    RankedSite,
    Ranking,
    read_ranking,
)
from optin_cli.artefacts.sealed import seal
from optin_cli.errors import ArtefactError

ARRAYS = ("score", "trajectory", "output", "by_batch")


def as_plain(ranking: Ranking) -> dict:
    """Every field, with arrays as shape, dtype and bytes: equal only if bitwise equal."""
    plain = dataclasses.asdict(ranking)
    for site in plain["sites"]:
        for name in ARRAYS:
            site[name] = (site[name].shape, str(site[name].dtype), site[name].tobytes())
    return plain


finite = st.floats(allow_nan=False, allow_infinity=False)

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)

plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | finite
    | words
    | st.lists(st.integers(), max_size=3)
)

facts = st.dictionaries(words, plain, max_size=3)


@st.composite
def ranked_sites(draw, block: int) -> RankedSite:
    units, columns = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["heads", "neurons"]))
    sizes = [draw(st.integers(0, 2**40)) for _ in range(3)]
    return RankedSite(
        f"blocks.{block}.{kind}",
        kind,
        block,
        units,
        draw(st.integers(1, 128)),
        *sizes,
        score=draw(arrays.arrays(np.float64, units, elements=finite)),
        trajectory=draw(arrays.arrays(np.float64, (units, columns), elements=finite)),
        output=draw(arrays.arrays(np.float64, units, elements=finite)),
        columns=draw(st.lists(st.integers(0, 40), min_size=columns, max_size=columns)),
        by_batch=draw(
            arrays.arrays(
                np.float32, (draw(st.integers(0, 3)), units, 2), elements=st.floats(0, 1e6, width=32)
            )
        ),
    )


# damage


def resealed(path: Path) -> Path:
    """The file with a digest that fits: what is wrong with it, a program has written so."""
    content = bytearray(path.read_bytes())
    seal(memoryview(content))
    path.write_bytes(content)
    return path


def refused(path: Path) -> str:
    """The message with which a file is refused as damaged or no ranking."""
    with pytest.raises(ArtefactError) as caught:
        read_ranking(path)
    assert str(path) in str(caught.value)
    return str(caught.value)
