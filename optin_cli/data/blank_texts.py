"""Rows without text: counted, left out of the sample, and replaced."""

from __future__ import annotations

import logging
from itertools import islice

from optin_cli.data.readers import Reader
from optin_cli.data.rows import SplitRows, StreamRows, spare
from optin_cli.errors import InputError, param

log = logging.getLogger("optin")

_MOST_LOOKED_AT = 10
"""Rows that are looked at for each one that is wanted: a column that is nearly blank is not searched through."""


def leave_out_blank(
    source: SplitRows | StreamRows, text: tuple[str, ...], reader: Reader, row_ids: list[int], seed: int
) -> list[int]:
    """Rows with text, in ascending order, as many as `row_ids` where there are so many.

    For each row without text the next spare one is drawn, in an order that the seed fixes, with a warning that counts
    them. Raises `InputError` if no row has any.
    """
    kept: list[int] = []
    looked_at, waiting, spares = 0, row_ids, None
    while waiting and looked_at < _MOST_LOOKED_AT * len(row_ids):
        rows = source.at(waiting)
        texts = zip(*(rows[name][:] for name in text), strict=True)
        kept += [i for i, row in zip(waiting, texts, strict=True) if not reader.lacks_text(row)]
        looked_at += len(waiting)
        if spares is None and len(kept) < len(row_ids):
            spares = iter(spare(source.total, row_ids, seed))
        waiting = sorted(islice(spares or (), len(row_ids) - len(kept)))
    blank = looked_at - len(kept)
    where = f"{source.data.spec} ({source.data.split})"
    named = " and ".join(map(repr, text))
    if not kept:
        raise InputError(
            f"none of {blank} rows of {where} has text in {named}",
            f"name the column of the text with {param('text')}",
        )
    if blank:
        log.warning(
            "%d of %d rows of %s have no text in %s and are left out%s",
            blank,
            looked_at,
            where,
            named,
            ", others taken in their place" if len(kept) == len(row_ids) else "",
        )
    return sorted(kept)
