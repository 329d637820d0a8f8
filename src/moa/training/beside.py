"""What a run wrote beside its adapter: found in the folder, from a checkpoint in it, and on the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download

from moa.training.checkpoints import is_checkpoint


def beside(adapter: str, name: str) -> Path | None:
    """The file ``name`` that belongs to an adapter.

    Args:
        adapter: a folder, one of its checkpoints, or ``owner/name`` on the hub.
        name: such as ``recipe.yaml``.

    Returns:
        The file, fetched if need be; None if there is none, or if the hub cannot be asked.
    """
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        own = [folder, folder.resolve().parent] if is_checkpoint(folder.resolve()) else [folder]
        return next((place / name for place in own if (place / name).is_file()), None)
    try:
        return Path(hf_hub_download(adapter, name))
    except (OSError, ValueError):
        return None
