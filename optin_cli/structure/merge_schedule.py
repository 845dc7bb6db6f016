"""A schedule of merges: `merges[l]` tokens are merged behind block l, none behind the blocks it does not reach."""

from __future__ import annotations

from collections.abc import Sequence


def most_merged(tokens: float, prefix: int) -> int:
    """Return how many of `tokens` can be merged at once: half of those behind the first `prefix`."""
    return max(0, int(tokens) - prefix) // 2


def tokens_by_block(tokens: float, depth: int, merges: Sequence[int], prefix: int) -> list[float]:
    """Return how many of `tokens` each of `depth` blocks sees."""
    seen = [tokens]
    for block in range(depth - 1):
        count = merges[block] if block < len(merges) else 0
        seen.append(seen[-1] - min(count, most_merged(seen[-1], prefix)))
    return seen
