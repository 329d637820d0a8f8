"""Base models that are split among processes before an adapter is attached to them."""

from __future__ import annotations

import torch
from torch import nn


def refuse_sharded(model: nn.Module) -> None:
    """Raise ValueError if ``model`` is split already.

    Under tensor parallelism every process holds part of a projection, and an expert that was built for the part fits no
    other number of processes. What is attached after ``fully_shard`` is never synchronised: each process would train an
    adapter of its own, and one of them would be saved.
    """
    tp_size = getattr(model, "tp_size", None) or 1
    if tp_size > 1:
        raise ValueError(
            f"the base model is split by tensor parallelism (tp_size={tp_size}), which a mixture does not support. "
            "Load it without tp_plan; DDP, FSDP2 and DeepSpeed ZeRO train a mixture on several devices"
        )
    sharded = _first_sharded(model)
    if sharded is not None:
        raise ValueError(
            f"the base model is sharded already ({sharded} is a DTensor): an adapter attached now would not be "
            "synchronised among processes. Attach the adapter first, then shard (fully_shard, or leave it to Trainer)"
        )


def _first_sharded(model: nn.Module) -> str | None:
    if not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor

    return next((name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)), None)
