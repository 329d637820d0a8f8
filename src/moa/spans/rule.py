"""The span function, the one place that says how long a head's span is.

A head keeps the first ``sink`` tokens of a text and a window of the latest ones; its span is both together. The span
is elastic: ``alpha + beta * length``, cut to whole tokens and rounded up to whole blocks (Mixture of Attention spans,
arXiv 2406.14909, equation 2). Search, masks, cache and densities all call `span`.
"""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """An elastic rule: a span of ``alpha + beta * length`` tokens."""

    alpha: float
    beta: float


def span(rule_alpha: float, rule_beta: float, length: int, *, sink: int, block: int) -> int:
    """Tokens that the last row of a text of ``length`` tokens sees, the sink included.

    Whole blocks, at least ``sink + block``, and never more than ``length``: a text that is not longer than its span is
    dense.

    Args:
        rule_alpha: offset in tokens.
        rule_beta: slope, tokens per token.
        length: tokens of the whole text, those still to be generated included.
        sink: first tokens that are always seen, a multiple of ``block``.
        block: granularity in tokens.
    """
    wanted = max(int(rule_alpha + rule_beta * length), sink + block)
    return min(-(-wanted // block) * block, length)
