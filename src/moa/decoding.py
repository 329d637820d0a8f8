"""Generation by exactly the settings that are given."""

from __future__ import annotations

import threading
from typing import Any

from transformers import GenerationConfig

_changing = threading.RLock()  # the model's own settings, which all threads see


def generate_by(settings: GenerationConfig, model: Any, **inputs: Any) -> Any:
    """``model.generate`` by these settings and no others.

    What they leave open, transformers takes from the model's own generation settings, which its maker may have filled
    with a least length, suppressed tokens and the like. Inside the model has none of its own; another thread that
    generates so waits meanwhile.
    """
    host = model.get_base_model() if hasattr(model, "get_base_model") else model
    with _changing:
        own, host.generation_config = host.generation_config, GenerationConfig()
        try:
            return model.generate(generation_config=settings, **inputs)
        finally:
            host.generation_config = own
