"""The page of a run that goes on: loss, learning rate, gates by block. It asks for itself again every few seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moa.report.page import frame, render, shade

LOG, PROGRESS, DONE = "training_log.jsonl", "progress.json", "adapter_config.json"
POINTS = 400  # of a curve; more cannot be told apart
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 220, 110, 24  # of a curve and its margins, in units of the picture


def page_of(folder: Path, refresh: int | None = 5) -> str:
    """The page of a run as it stands.

    Args:
        folder: the run's output, with its log.
        refresh: seconds after which a browser asks again; None: never, and neither for a run that is finished.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    if not (folder / "recipe.yaml").is_file():
        raise FileNotFoundError(f"{folder} holds no run of `moa train`: there is no recipe.yaml in it")
    entries = [entry for entry in _lines(folder / LOG) if "loss" in entry]
    progress = _read(folder / PROGRESS)
    done = (folder / DONE).is_file() and progress.get("step") == progress.get("steps")
    body = render(
        "watch.html",
        state=_state(folder, progress, done),
        facts=_facts(entries),
        curves=[
            curve(entries, "loss", "Loss", "mean over the steps since the point before"),
            curve(entries, "learning_rate", "Learning rate", "of the last step"),
        ],
        tables=_tables(progress.get("routers", [])),
    )
    return str(frame(folder.resolve().name, body, None if done else refresh))


def curve(entries: Sequence[dict[str, Any]], key: str, title: str, note: str) -> dict[str, Any]:
    """A line through the logged values of ``key``; neighbours are averaged where there are too many."""
    points = [(entry["step"], entry[key]) for entry in entries if isinstance(entry.get(key), int | float)]
    size = -(-len(points) // POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
    values = [value for _, value in means] or [0.0]
    low, high, last = min(values), max(values), max((step for step, _ in means), default=1)
    tall = (high - low) or 1.0
    drawn = [
        (LEFT + (WIDTH - LEFT - 10) * step / last, 10 + (HEIGHT - BOTTOM - 20) * (1 - (value - low) / tall))
        for step, value in means
    ]
    return {
        "title": title,
        "note": note,
        "line": " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn),
        "end": drawn[-1] if drawn else None,
        "low": f"{low:.3g}",
        "high": f"{high:.3g}",
        "last": last,
        "now": f"{values[-1]:.4g}" if drawn else "",
    }


def _state(folder: Path, progress: dict[str, Any], done: bool) -> str:
    if not progress:
        return "Nothing is logged yet."
    step, steps = progress["step"], progress["steps"]
    if done:
        return f"Finished after step {step} of {steps}."
    quiet = time.time() - (folder / PROGRESS).stat().st_mtime
    return f"Step {step} of {steps} ({step / max(steps, 1):.0%}); last heard of {_span(quiet)} ago."


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _facts(entries: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The router's figures of the last log, see `moa.training.routing.figures`."""
    names = {
        "router/gate": "mean gate",
        "router/entropy": "entropy (1: all gates equal)",
        "router/dead": "share of experts that hardly act",
        "router/threshold": "mean threshold",
    }
    last = entries[-1] if entries else {}
    return [(name, f"{last[key]:.3f}") for key, name in names.items() if key in last]


def _tables(routers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One table of mean gates for all routers with the same experts."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for router in routers:
        found.setdefault(tuple(router["experts"]), []).append(router)
    highest = max((gate for router in routers for gate in router["gates"]), default=1.0)
    return [
        {
            "experts": experts,
            "rows": [
                {
                    "name": f"{one['block']}" if one["site"] is None else f"{one['block']}, {one['site']}",
                    "cells": [{"text": f"{gate:.2f}", "style": shade(gate, high=highest)} for gate in one["gates"]],
                }
                for one in rows
            ],
        }
        for experts, rows in found.items()
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    """Entries of the log; one that is just being written is left for the next time."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
