"""What a run wrote beside its adapter: found in the folder, from a checkpoint in it, and on the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from moa.training.checkpoints import is_checkpoint

_TIMEOUT = 3.0  # seconds for the hub's first answer; a download alone would ask five times more


def beside(adapter: str, name: str) -> Path | None:
    """The file ``name`` that belongs to an adapter.

    Args:
        adapter: a folder, one of its checkpoints, or ``owner/name`` on the hub.
        name: such as ``recipe.yaml``.

    Returns:
        The file, fetched if need be; None if there is none, or if the hub cannot be asked and never was before.
    """
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        own = [folder, folder.resolve().parent] if is_checkpoint(folder.resolve()) else [folder]
        return next((place / name for place in own if (place / name).is_file()), None)
    try:
        files = HfApi().model_info(adapter, timeout=_TIMEOUT).siblings or []
        return Path(hf_hub_download(adapter, name)) if name in [file.rfilename for file in files] else None
    except HFValidationError:  # no name for the hub
        return None
    except Exception:  # of whichever HTTP library the hub's client is built on
        kept = try_to_load_from_cache(adapter, name)
        return Path(kept) if isinstance(kept, str) else None
