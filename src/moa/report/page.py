"""The frame of every report: one file with its style inside, readable in light and dark, on paper and by keyboard."""

from __future__ import annotations

from pathlib import Path

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


def shade(value: float, low: float = 0.0, high: float = 1.0) -> str:
    """Inline style of a heat-map cell: ``value`` between ``low`` and ``high`` as a tint for light and dark."""
    share = 0.0 if high <= low else min(max((value - low) / (high - low), 0.0), 1.0)
    return f"--tint:{share:.3f}"
