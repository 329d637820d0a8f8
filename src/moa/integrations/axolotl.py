"""axolotl: a plug-in that understands ``adapter: moa``.

.. code-block:: yaml

    plugins: [moa.integrations.axolotl.MoAPlugin]
    adapter: moa
    moa: {preset: soft-moa, r: 16}
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from pydantic import BaseModel

from moa.integrations.settings import mixture, refuse_lora
from moa.training.routing import log_router

LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear", "lora_modules_to_save")


class MoAArguments(BaseModel):
    """What the plug-in adds to axolotl's configuration."""

    moa: dict[str, Any] | str | None = None


class MoAPlugin(BasePlugin):
    """Builds or loads a mixture where axolotl would have built LoRA, and logs its routers."""

    def get_input_args(self) -> str:
        return f"{__name__}.MoAArguments"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name="moa")]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, PeftConfig] | None:
        if cfg.adapter != "moa":
            return None
        refuse_lora(name for name in LORA if cfg.get(name))
        if cfg.lora_model_dir and not config_only:
            loaded = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return loaded, loaded.active_peft_config
        config = mixture(cfg.moa.to_dict() if hasattr(cfg.moa, "to_dict") else cfg.moa)
        return (None if config_only else get_peft_model(model, config)), config

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if cfg.adapter == "moa" and not cfg.torch_compile:
            log_router(trainer)
