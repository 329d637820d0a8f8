"""The version of this release, and those of the packages it runs with."""

from importlib.metadata import version

VERSION = "0.1.0"


def versions(*packages: str) -> dict[str, str]:
    """Versions of MoA and of ``packages``, by import name, to be kept beside a result."""
    return {"moa": VERSION} | {name: version(name) for name in packages}
