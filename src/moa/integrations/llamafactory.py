"""LLaMA-Factory, with a mixture: ``python -m moa.integrations.llamafactory train config.yaml``.

The file keeps ``finetuning_type: lora`` and gets ``moa: {preset: soft-moa}``. LLaMA-Factory has no place to plug in a
method, so in this process its module finds the mixture where it looks for LoRA. ``chat`` and ``api`` take its ordinary
files. Several devices: ``torchrun --nproc-per-node N -m moa.integrations.llamafactory train config.yaml``.
"""

import os
import sys
from typing import Any

from llamafactory.cli import main as run_cli
from llamafactory.extras.misc import get_device_count, is_env_enabled
from llamafactory.hparams.parser import read_args
from llamafactory.model import adapter
from llamafactory.train.tuner import run_exp
from peft import PeftModel

from moa.adapters.registration import MOA
from moa.integrations.settings import mixture, refuse_lora

LORA = ("lora_", "loraplus_", "pissa_", "use_dora", "use_rslora", "additional_target", "create_new_adapter")


class Unmerged:
    """LLaMA-Factory merges what it loads for inference; a mixture stays beside the base."""

    @staticmethod
    def from_pretrained(model: Any, *args: Any, **kwargs: Any) -> PeftModel:
        if isinstance(model, PeftModel):
            raise ValueError("a mixture cannot be merged with other adapters: name one adapter")
        loaded = PeftModel.from_pretrained(model, *args, **kwargs)
        if loaded.active_peft_config.peft_type == MOA:
            loaded.merge_and_unload = lambda: loaded  # type: ignore[assignment, return-value]
        return loaded


def train() -> None:
    """Train by a file whose ``moa`` section is the mixture; ValueError if there is none, or it would be passed by."""
    settings = read_args()
    if not isinstance(settings, dict) or "moa" not in settings or settings.get("finetuning_type") != "lora":
        raise ValueError("the file must say finetuning_type: lora and moa: {preset: soft-moa}, or another mixture")
    config = mixture(settings.pop("moa"))
    refuse_lora(name for name in settings if name.startswith(LORA))
    if "LOCAL_RANK" not in os.environ and (get_device_count() > 1 or is_env_enabled("FORCE_TORCHRUN")):
        raise ValueError("several devices: start with torchrun --nproc-per-node N -m moa.integrations.llamafactory")
    adapter.LoraConfig = lambda **lora: config
    run_exp(settings)


if __name__ == "__main__":
    adapter.PeftModel = Unmerged
    if sys.argv[1:2] == ["train"]:
        del sys.argv[1]
        train()
    else:
        run_cli()
