"""The page of a run that goes on: loss, learning rate, gates by block. It asks for itself again every few seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from moa.extras import extra
from moa.files import read_json
from moa.report.page import duration, frame, render, share, tinted
from moa.spans.journal import read_lines

with extra("train"):
    from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
    from typing_extensions import TypedDict  # pydantic wants it before Python 3.12

LOG, PROGRESS, DONE = "training_log.jsonl", "progress.json", "adapter_config.json"
POINTS = 400  # of a curve; more cannot be told apart
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 220, 110, 24  # of a curve and its margins, in units of the picture


LARGEST = 1e300  # of a number that can be drawn
Count = Annotated[int, Field(ge=0, le=2**53)]


class Router(TypedDict):
    """The mean gates of a router, one for each expert."""

    block: int
    site: str | None
    experts: list[str]
    gates: list[FiniteFloat]


class Progress(TypedDict):
    """Where a run stands."""

    step: Count
    steps: Count
    routers: list[Router]


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
    lines = read_lines(folder / LOG, torn=True) if (folder / LOG).exists() else []
    entries = [entry for entry in lines if "loss" in entry and _is_number(entry.get("step"))]
    progress = _read(folder / PROGRESS)
    done = (folder / DONE).is_file() and (progress is None or progress["step"] == progress["steps"])
    body = render(
        "watch.html",
        state=_state(folder, progress, done),
        facts=_facts(entries),
        curves=[
            curve(entries, "loss", "Loss", "mean over the steps since the point before"),
            curve(entries, "learning_rate", "Learning rate", "of the last step"),
        ],
        tables=_tables(progress["routers"] if progress else []),
    )
    return str(frame(folder.resolve().name, body, None if done else refresh))


def curve(entries: Sequence[dict[str, Any]], key: str, title: str, note: str) -> dict[str, Any]:
    """A line through the logged values of ``key``; neighbours are averaged where there are too many."""
    points = [(entry["step"], entry[key]) for entry in entries if _is_number(entry.get(key))]
    size = -(-len(points) // POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
    values = [value for _, value in means] or [0.0]
    low, high, last = min(values), max(values), max((step for step, _ in means), default=1)
    drawn = [
        (LEFT + (WIDTH - LEFT - 10) * step / last, 10 + (HEIGHT - BOTTOM - 20) * (1 - share(value, low, high)))
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


def _state(folder: Path, progress: Progress | None, done: bool) -> str:
    if progress is None:
        return "Nothing is logged yet."
    step, steps = progress["step"], progress["steps"]
    if done:
        return f"Finished after step {step} of {steps}."
    quiet = time.time() - (folder / PROGRESS).stat().st_mtime
    return f"Step {step} of {steps} ({step / max(steps, 1):.0%}); last heard of {duration(quiet)} ago."


def _facts(entries: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The router's figures of the last log, see `moa.training.routing.figures`."""
    names = {
        "router/gate": "mean gate",
        "router/entropy": "entropy (1: all gates equal)",
        "router/dead": "share of experts that hardly act",
        "router/threshold": "mean threshold",
    }
    last = entries[-1] if entries else {}
    return [(name, f"{last[key]:.3f}") for key, name in names.items() if _is_number(last.get(key))]


def _tables(routers: Sequence[Router]) -> dict[tuple[str, ...], list[list[Any]]]:
    """Rows of mean gates by the experts that they are of: routers with the same ones share a table."""
    found: dict[tuple[str, ...], list[list[Any]]] = {}
    highest = max((gate for router in routers for gate in router["gates"]), default=1.0)
    for router in routers:
        name = f"{router['block']}" if router["site"] is None else f"{router['block']}, {router['site']}"
        cells = [tinted(f"{gate:.2f}", gate, high=highest) for gate in router["gates"]]
        found.setdefault(tuple(router["experts"]), []).append([name, *cells])
    return found


def _is_number(value: Any) -> bool:
    """Whether it can be drawn: a loss may have diverged."""
    return isinstance(value, int | float) and abs(value) < LARGEST


def _read(path: Path) -> Progress | None:
    """What `moa.training.progress` wrote.

    Raises:
        ValueError: something else; names the file and the field.
    """
    if not path.exists():
        return None
    try:
        return TypeAdapter(Progress).validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
