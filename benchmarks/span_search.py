"""Time and certified gap of a span search at the size of a 7B model: 32 layers, 32 KV heads, 48 rules, three lengths.

The influence is synthetic: every head's decays over a reach that is fixed or grows with the text, at its own scale.
Run it on one thread with `OMP_NUM_THREADS=1 python benchmarks/span_search.py`.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import torch

from moa.spans.search.plans import Candidate, Limits, search, versions

RESULT = Path(__file__).parent / "results" / "span_search.json"
LENGTHS, EXTEND, BLOCK = (2048, 4096, 8192), (16384,), 64


def synthetic(layers: int, heads: int, seed: int = 0) -> dict[int, torch.Tensor]:
    """(layers, heads, blocks, blocks) influence by length: exponential in the distance, zero above the diagonal."""
    rng = np.random.default_rng(seed)
    size = (layers, heads, 1, 1)
    elastic = rng.random(size) < 0.5
    share, blocks, scale = rng.random(size) * 0.6 + 0.02, rng.integers(1, 40, size), rng.lognormal(0, 1.2, size)
    found = {}
    for length in LENGTHS:
        place = np.arange(length // BLOCK)
        distance = place[:, None] - place[None, :]
        reach = np.where(elastic, share * len(place), blocks)
        influence = scale / reach * np.exp(-np.maximum(distance, 0) / reach) * (distance >= 0)
        found[length] = torch.from_numpy(influence.astype(np.float32))
    return found


def gap(candidate: Candidate) -> float:
    return float(candidate.plan.searched["certified_gap"])


def main() -> None:
    influences, limits = synthetic(32, 32), Limits(extend=EXTEND)
    start, marks = time.perf_counter(), []

    def progress(done: int, total: int) -> None:
        marks.append(time.perf_counter() - start)
        print(f"{done}/{total} goals, {marks[-1]:.1f} s", flush=True)

    front = search(influences, limits, progress=progress)
    result = {
        "layers": 32,
        "kv_heads": 32,
        "rules": 48,
        "lengths": LENGTHS,
        "extend": EXTEND,
        "goals": len(marks) - 1,
        "seconds_for_the_first_plan": marks[1],
        "seconds_for_the_front": marks[-1],
        "plans_on_the_front": len(front),
        "greatest_certified_gap": max(gap(candidate) for candidate in front),
        "mean_certified_gap": float(np.mean([gap(candidate) for candidate in front])),
        "front": [{"losses": c.losses, "kv_density": c.densities, "gap": gap(c)} for c in front],
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "processors": os.cpu_count(),
        "versions": versions(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "front"}, indent=1))


if __name__ == "__main__":
    main()
