"""Files that ship with the package: small pretrained models for the demo, the tests and the span benchmarks."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["EMBEDDED", "base_path"]

EMBEDDED = {"embedded": "base", "embedded-long": "long-context"}
"""Names of the embedded models, as recipes and `--base` take them, and their folders."""


def base_path(name: str = "embedded") -> Path:
    """Folder of an embedded model, to give to `from_pretrained`.

    Args:
        name: "embedded", the base model of the demo, or "embedded-long", the long-context organism, which looks up,
            finds and copies over up to two thousand tokens.

    Returns:
        An existing directory with weights, configuration, tokenizer and model card.

    Raises:
        ValueError: for a name that is not embedded.
        FileNotFoundError: when the package was installed without its data files or from an archive
            that cannot be read as a plain folder.
    """
    if name not in EMBEDDED:
        raise ValueError(f"no embedded model is called {name!r}; there are {', '.join(EMBEDDED)}")
    path = Path(str(files(__name__) / EMBEDDED[name]))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"the embedded model {name!r} is missing: {path}")
    return path
