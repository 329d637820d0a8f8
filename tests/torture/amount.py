"""How much torture: a short form for every run of the tests, the long one where `make torture` asks for it."""

from __future__ import annotations

import os


def amount(*, short: int, long: int) -> int:
    """So many turns."""
    return long if os.environ.get("MOA_TORTURE") == "long" else short
