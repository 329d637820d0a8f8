"""How vLLM's tensor parallelism splits the modules that host experts.

Every process of an engine holds the mixtures whole, as they are in their files, and computes with its part of them; see
`moa.serving.shards` for the rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from moa.extras import extra
from moa.serving.shards import Processes, Share, beside, columns, part

with extra("serve"):
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_reduce,
    )
    from vllm.model_executor.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR


def processes() -> Processes | None:
    """The engine's processes among which the model is split; None: there is one."""
    if get_tensor_model_parallel_world_size() == 1:
        return None
    return Processes(share_of, tensor_model_parallel_all_reduce)


@contextmanager
def whole_sizes(model: nn.Module) -> Iterator[None]:
    """Inside, merged projections of queries, keys and values say the size that their weights have in a file.

    Where there are fewer KV heads than processes, several hold the same one, and vLLM counts it for each of them.
    """
    counted = {
        module: module.output_size
        for module in model.modules()
        if isinstance(module, QKVParallelLinear) and module.num_kv_head_replicas > 1
    }
    for module in counted:
        module.output_size = sum(_widths(module))
    try:
        yield
    finally:
        for module, size in counted.items():
            module.output_size = size


def share_of(module: nn.Module) -> Share:
    """What this process holds of a module.

    Raises:
        ValueError: it is split in a way that experts do not follow.
    """
    if isinstance(module, RowParallelLinear):
        return _share_of_rows(module)
    if isinstance(module, ColumnParallelLinear):
        return _share_of_columns(module)
    attention = getattr(module, VLLM_ATTN_ATTR, None)
    if attention is None:
        return Share()
    ranks = get_tensor_model_parallel_world_size()
    return Share(heads=part(attention.num_heads * ranks, get_tensor_model_parallel_rank(), ranks))


def _share_of_rows(module: RowParallelLinear) -> Share:
    if not module.reduce_results:
        raise ValueError(
            f"an expert sits at {module.prefix}, of which every process puts out a summand that vLLM adds up later: "
            "use tensor_parallel_size=1, or train without an expert there"
        )
    if not module.input_is_parallel:
        return Share()
    return Share(inputs=part(module.input_size, module.tp_rank, module.tp_size))


def _share_of_columns(module: ColumnParallelLinear) -> Share:
    outputs = _outputs(module)
    if len(outputs) != module.output_size_per_partition:
        raise ValueError(
            f"an expert sits at {module.prefix}, which is split as {type(module).__name__} does, and experts follow "
            "ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear and RowParallelLinear only: use "
            "tensor_parallel_size=1"
        )
    return Share() if module.gather_output else Share(outputs=outputs)


def _outputs(module: ColumnParallelLinear) -> Tensor:
    """Numbers of the columns that this process computes."""
    rank, ranks = module.tp_rank, module.tp_size
    if isinstance(module, QKVParallelLinear):
        heads = part(module.total_num_heads, rank, ranks)
        kv_heads = part(module.total_num_kv_heads, rank, ranks)
        own = [columns(heads, module.head_size), columns(kv_heads, module.head_size)]
        return beside([*own, columns(kv_heads, module.v_head_size)], _widths(module))
    if isinstance(module, MergedColumnParallelLinear):
        return beside([part(size, rank, ranks) for size in module.output_sizes], module.output_sizes)
    return part(module.output_size, rank, ranks)


def _widths(module: QKVParallelLinear) -> Sequence[int]:
    """Of all queries, all keys and all values."""
    keys = module.total_num_kv_heads
    return module.total_num_heads * module.head_size, keys * module.head_size, keys * module.v_head_size
