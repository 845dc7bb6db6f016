"""A schedule of merges: `merges[l]` tokens are merged behind block l, none behind the blocks it does not reach."""

from __future__ import annotations

from collections.abc import Sequence


def tokens_by_block(tokens: float, depth: int, merges: Sequence[int], prefix: int) -> list[float]:
    """How many of `tokens` each of `depth` blocks sees; at a boundary, half of what is not `prefix` merges at most."""
    seen = [tokens]
    for block in range(depth - 1):
        count = merges[block] if block < len(merges) else 0
        most = int(max(0, seen[-1] - prefix)) // 2
        seen.append(seen[-1] - min(count, most))
    return seen
