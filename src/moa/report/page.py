"""The frame of every report: one file with its style inside, readable in light and dark, on paper and by keyboard."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from moa.extras import extra
from moa.files import write_text

with extra("report"):
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

_environment = Environment(
    loader=PackageLoader("moa.report", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Cell(NamedTuple):
    """A cell of a table that is more than its text, see ``table`` in ``moa/report/templates/parts.html``.

    Attributes:
        text: what it says.
        tint: how strong its background is, in [0, 1].
        title: its tooltip.
        colour: number of its background among a page's own colours.
    """

    text: str
    tint: float = 0.0
    title: str = ""
    colour: int | None = None


def tinted(text: str, value: float, low: float = 0.0, high: float = 1.0, title: str = "") -> Cell:
    """A cell of a heat map, with the tint of ``value`` between ``low`` and ``high``."""
    return Cell(text, share(value, low, high), title)


def share(value: float, low: float, high: float) -> float:
    """How far ``value`` is from ``low`` to ``high``, in [0, 1]; 0 where they are the same. Templates know it, too."""
    return 0.0 if high <= low else min(max((value - low) / (high - low), 0.0), 1.0)


_environment.globals["share"] = share


def render(template: str, **values: object) -> Markup:
    """A template of ``moa/report/templates`` filled in; every value is escaped unless it is `Markup` already."""
    return Markup(_environment.get_template(template).render(**values))


def write_page(path: str | Path, title: str, body: Markup) -> Path:
    """Write ``body`` as a page of its own.

    Args:
        path: the file; its folder is created.
        title: the page's title and first heading.
        body: HTML that was made by `render`.
    """
    path = Path(path)
    write_text(path, frame(title, body))
    return path


def frame(title: str, body: Markup, refresh: int | None = None) -> Markup:
    """A whole page around ``body``.

    Args:
        title: the page's title and first heading.
        body: HTML that was made by `render`.
        refresh: seconds after which a browser asks for the page again; None: never.
    """
    return render("page.html", title=title, body=body, refresh=refresh)


def duration(seconds: float) -> str:
    """For people: ``75 s``, ``12 min``, ``3 h 5 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
