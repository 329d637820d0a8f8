"""Files that ship with the package: the small pretrained base model of the demo."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["base_path"]


def base_path() -> Path:
    """Folder of the embedded base model, to give to `from_pretrained`.

    Returns:
        An existing directory with weights, configuration, tokenizer and model card.

    Raises:
        FileNotFoundError: when the package was installed without its data files or from an archive
            that cannot be read as a plain folder.
    """
    path = Path(str(files(__name__) / "base"))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"the embedded base model is missing: {path}")
    return path
