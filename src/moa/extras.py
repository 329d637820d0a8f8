"""Optional dependencies. What `import moa` needs is always there; the rest comes in extras of the distribution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

DISTRIBUTION = "moa-lm"


class MissingExtra(ModuleNotFoundError):
    """A package is not installed that belongs to one of MoA's extras; the message names the extra."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of packages that the extra ``name`` installs.

    Raises:
        MissingExtra: one of them is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if isinstance(error, MissingExtra) or package == "moa":
            raise
        raise MissingExtra(
            f"this part of MoA needs the package {package!r}, which is not installed: "
            f"pip install '{DISTRIBUTION}[{name}]'",
            name=error.name,
        ) from None
