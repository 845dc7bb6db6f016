"""Which tokens are kept: those that must be, and the most frequent ones of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from optin_cli.errors import UsageError, param
from optin_cli.vocabulary.settings import VocabularySettings


@dataclass(frozen=True)
class Choice:
    """The tokens that are kept."""

    kept: list[int]
    """Old ids, ascending: each becomes its rank."""
    covered: float
    """Share of the data's tokens that are kept, special ones not counted."""


def choose(
    counts: Counter[int],
    always: set[int],
    ids: Iterable[int],
    needed: Callable[[int], set[int]],
    settings: VocabularySettings,
) -> Choice:
    """Choose tokens by how often the data has them, the most frequent first, each with what it `needed`.

    With `keep`, a token that would need more room is left out, and others that fit are taken: those that the data does
    not have in the order of their `ids`, which most tokenizers give to frequent ones first. `counts` are of tokens that
    are not special. Raises `UsageError` where `keep` is less than what is `always` kept.
    """
    if settings.keep is not None and settings.keep < len(always):
        raise UsageError(
            f"{param('keep', settings.keep)} would drop special tokens, or those that unseen words are split into: "
            f"{len(always)} are always kept",
            f"keep {len(always)} or more",
        )
    total = counts.total()
    wanted = total * (settings.coverage or 1.0)
    kept, covered = set(always), sum(count for token, count in counts.items() if token in always)
    candidates = counts if settings.keep is None else ids
    for token in sorted(candidates, key=lambda one: (-counts[one], one)):
        if settings.keep is None and covered >= wanted:
            break
        if token in kept or len(kept) == settings.keep:
            continue
        more = needed(token) - kept
        if settings.keep is not None and len(kept) + len(more) > settings.keep:
            continue
        kept |= more
        covered += sum(counts[one] for one in more)
    return Choice(sorted(kept), covered / total if total else 1.0)
