"""Several mixtures of one base in one vLLM engine, chosen per request by vLLM's own means for LoRA.

To vLLM a mixture is a LoRA adapter: its scheduler, its prefix cache and its server know which request asks for which.
What it would do with the adapters' weights is not done: they are in the model already. This worker puts a manager in
the place of vLLM's that tells the model, token by token, which of its mixtures is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moa.extras import extra

with extra("serve"):
    from vllm.platforms import current_platform


def _worker_of_platform() -> Any:
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    if current_platform.is_cuda():
        from vllm.v1.worker.gpu_worker import Worker

        return Worker
    raise ValueError(f"several mixtures in one engine run on CPUs and CUDA, not on {current_platform.device_name}")


class MoAWorker(_worker_of_platform()):  # type: ignore[misc]
    """The platform's worker, with `Mixtures` in the place of vLLM's manager of LoRA adapters."""

    def init_device(self) -> None:
        super().init_device()
        self.model_runner.load_lora_model = functools.partial(_manage, self.model_runner)


def _manage(runner: Any, model: Any, vllm_config: Any, device: torch.device) -> nn.Module:
    runner.lora_manager = Mixtures(model.mixtures, model.mask)
    return model  # type: ignore[no-any-return]


class Mixtures:
    """Knows the mixtures by the numbers that vLLM gives them; has the methods of vLLM's manager that its runners call.

    Args:
        folders: name of every mixture -> its folder, in the order of the mask's columns.
        mask: (tokens, mixtures), written before every forward.
    """

    def __init__(self, folders: dict[str, str], mask: torch.Tensor):
        self._folders = folders
        self._mask = mask
        self._columns: dict[int, int] = {}  # vLLM's number -> column

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        """Before a forward: ``mapping.index_mapping`` has the number of every token's mixture, 0 for the base alone."""
        for request in requests:
            self.add_adapter(request)
        rows = torch.zeros(max(self._columns, default=0) + 1, self._mask.shape[1], dtype=self._mask.dtype)
        for number, column in self._columns.items():
            rows[number, column] = 1
        asked = rows[torch.tensor(mapping.index_mapping, dtype=torch.long)]
        self._mask[: len(asked)].copy_(asked)

    def add_adapter(self, request: Any) -> bool:
        """Learn a mixture's number.

        Raises:
            ValueError: it is none of those that the engine was started with.
        """
        if request.lora_int_id in self._columns and not request.load_inplace:
            return False
        folder = self._folders.get(request.lora_name)
        if folder is None or request.lora_path != folder or request.load_inplace:
            raise ValueError(
                f"{request.lora_name!r} ({request.lora_path}) is not loaded into a running engine: mixtures are given "
                f"at its start. This one has {self._folders}"
            )
        self._columns[request.lora_int_id] = list(self._folders).index(request.lora_name)
        return True

    def remove_adapter(self, number: int) -> bool:
        """Forget a number; the mixture's weights stay."""
        return self._columns.pop(number, None) is not None

    def remove_all_adapters(self) -> None:
        self._columns.clear()

    def list_adapters(self) -> set[int]:
        return set(self._columns)

    def pin_adapter(self, number: int) -> bool:
        return number in self._columns

    def supports_tower_connector_lora(self) -> bool:
        return False

    # --- vLLM's warm-up, with requests that name no mixture -----------------------------------------------------------

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        self._columns[request.lora_int_id] = (request.lora_int_id - 1) % self._mask.shape[1]
        return True
