"""TRL's command line, with a mixture: ``python -m moa.integrations.trl sft --config sft.yaml --moa soft-moa``.

TRL's scripts build a `LoraConfig` by themselves, in processes of their own. This runs the same scripts with one more
setting, ``moa``, on the command line or in the YAML file. For several processes put ``accelerate launch -m`` in front.
"""

from __future__ import annotations

import dataclasses
import runpy
import sys
from dataclasses import dataclass, field
from typing import Any

import trl
from peft import PeftConfig

from moa.integrations.settings import mixture, refuse_lora

SCRIPTS = ("dpo", "grpo", "kto", "reward", "rloo", "sft")


@dataclass
class ModelConfig(trl.ModelConfig):
    """TRL's, and the mixture."""

    moa: str | None = field(
        default=None, metadata={"help": "The mixture: a preset's name, or a configuration as JSON (YAML: a mapping)."}
    )


def get_peft_config(model_args: ModelConfig) -> PeftConfig:
    """As TRL's of this name, for the script that runs now."""
    if model_args.moa is None:
        raise ValueError("name a mixture: --moa soft-moa, or moa: {preset: soft-moa, r: 16} in the file of --config")
    lora = [
        f for f in dataclasses.fields(model_args) if f.name.startswith("lora_") or f.name in ("use_dora", "use_rslora")
    ]
    refuse_lora(f.name for f in lora if getattr(model_args, f.name) not in (f.default, dataclasses.MISSING))
    return mixture(model_args.moa)


def main() -> None:
    """Run one of TRL's scripts."""
    if len(sys.argv) < 2 or sys.argv[1] not in SCRIPTS:
        sys.exit(f"usage: python -m moa.integrations.trl {{{','.join(SCRIPTS)}}} --config FILE --moa soft-moa ...")
    script = sys.argv.pop(1)
    replaced: Any = {"ModelConfig": ModelConfig, "get_peft_config": get_peft_config}
    for name, value in replaced.items():
        setattr(trl, name, value)
    runpy.run_module(f"trl.scripts.{script}", run_name="__main__")


if __name__ == "__main__":
    main()
