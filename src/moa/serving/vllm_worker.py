"""Mixtures that vLLM's engine tells apart, chosen per request by vLLM's own means for LoRA.

To vLLM a mixture is a LoRA adapter: its scheduler, its prefix cache and its server know which request asks for which,
and its API loads and unloads them. What it would do with the adapters' weights is not done: the model has slots for
them. This worker puts a manager in the place of vLLM's that fills the slots and tells the model, token by token, which
is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moa.extras import extra
from moa.serving.slots import Slots

with extra("serve"):
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

PREPARED = "cpp.dynamic_threads"
"""A setting of inductor's by which vLLM prepares compilation on CPUs."""


def _worker_of_platform() -> Any:
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    if current_platform.is_cuda():
        from vllm.v1.worker.gpu_worker import Worker

        return Worker
    raise ValueError(f"mixtures with --enable-lora run on CPUs and CUDA, not on {current_platform.device_name}")


class MoAWorker(_worker_of_platform()):  # type: ignore[misc]
    """The platform's worker, with `Mixtures` in the place of vLLM's manager of LoRA adapters."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        compilation = vllm_config.compilation_config
        if current_platform.is_cpu() and PREPARED in compilation.inductor_compile_config:
            # On CPUs vLLM takes compilation back for the sake of its own LoRA kernels, which do not run here.
            compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        super().init_device()
        self.model_runner.load_lora_model = functools.partial(_manage, self.model_runner)


def _manage(runner: Any, model: Any, vllm_config: Any, device: torch.device) -> nn.Module:
    caching = vllm_config.cache_config.enable_prefix_caching
    runner.lora_manager = Mixtures(Slots(model.kinds, model.fill, model.bases, caching=caching), model.mask)
    return model  # type: ignore[no-any-return]


class Mixtures:
    """Has the methods of vLLM's manager that its runners call.

    Args:
        slots: of the model.
        mask: (tokens, slots), written before every forward.
    """

    def __init__(self, slots: Slots, mask: torch.Tensor):
        self._slots = slots
        self._mask = mask

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        """Before a forward: ``mapping.index_mapping`` has the number of every token's mixture, 0 for the base alone."""
        used = self._slots.use(requests)
        rows = torch.zeros(max(used, default=0) + 1, self._mask.shape[1], dtype=self._mask.dtype)
        for number, slot in used.items():
            rows[number, slot] = 1
        asked = rows[torch.tensor(mapping.index_mapping, dtype=torch.long)]
        self._mask[: len(asked)].copy_(asked)

    def add_adapter(self, request: Any) -> bool:
        """Load a mixture, or with ``load_inplace`` new weights of one; errors are as in `Slots.add`."""
        self._slots.add(request, again=request.load_inplace)
        return True

    def remove_adapter(self, number: int) -> bool:
        return self._slots.remove(number)

    def remove_all_adapters(self) -> None:
        self._slots.clear()

    def list_adapters(self) -> set[int]:
        return self._slots.numbers

    def pin_adapter(self, number: int) -> bool:
        raise ValueError("mixtures are not pinned to a slot: start with as many slots as mixtures, --max-loras N")

    def supports_tower_connector_lora(self) -> bool:
        return False

    # --- vLLM's warm-up, with requests that name no mixture -----------------------------------------------------------

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        self._slots.pretend(request)
        return True
