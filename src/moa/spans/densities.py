"""Densities: the kept share of the cache (KV) and of the causal attention, averaged over layers and heads.

A plan of ours has one meaning, the span function. Densities of a published plan are those of its search, whose layout
is here in numbers (`moa.spans.layout.published_layout` draws it).
"""

from __future__ import annotations


def search_band(alpha: float, beta: float, blocks: int, block: int) -> int:
    """Latest blocks a row keeps in the published search (thu-nics/MoA ``elastic_block_sparse.py:75-98``)."""
    return max(int(alpha // block + beta * blocks), 1)


def search_blocks(alpha: float, beta: float, length: int, block: int) -> int:
    """Most blocks a row keeps in the published search: the band, and the sink block on top of it."""
    blocks = length // block
    if blocks < 1:
        raise ValueError(f"length={length}: a published plan's density needs at least one block of {block} tokens")
    return min(search_band(alpha, beta, blocks, block) + 1, blocks)


def causal_pairs(kept: int, rows: int) -> int:
    """Pairs (row, key) that are seen if every row sees ``kept`` keys, or all it has; ``kept <= rows``."""
    return kept * (kept + 1) // 2 + (rows - kept) * kept
