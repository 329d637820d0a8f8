"""How much torture: a short form for every run of the tests, more where `make torture` asks for it."""

from __future__ import annotations

import os

SHARE = float(os.environ.get("MOA_TORTURE", "0"))
"""Of the long form; 0: the short form."""


def amount(*, short: int, long: int) -> int:
    """So many turns."""
    return max(short, round(SHARE * long))
