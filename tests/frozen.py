"""Imported last by a warm process: what it holds is frozen, and collecting garbage in its forks copies none of it."""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
