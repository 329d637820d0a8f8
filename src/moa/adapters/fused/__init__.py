"""Whole decoder blocks as a few fused functions: less memory traffic, fewer saved activations, fewer calls.

Where a block's structure is known for certain (`moa.adapters.fused.parts`), its forward is replaced by these functions,
with the same result to the bit before training. Everywhere else, and inside ``torch.compile``, blocks run their own
forward with experts attached by hooks: the general path, which `fused_blocks` switches to for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moa.adapters.fused import inference, training
from moa.adapters.fused.parts import Parts, Unfit, parts_of
from moa.adapters.fused.prepared import PreparedBlocks, prepare, state_of

_enabled = True


@contextmanager
def fused_blocks(enabled: bool) -> Iterator[None]:
    """Switch fused blocks on or off inside (they are on unless told otherwise); for tests and measurements."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def continued(block: Any, arguments: dict[str, Any]) -> Tensor | None:
    """As `whole_block`, but only where all is prepared on the KV cache: the short way for every token but the first.

    The block's context need not be open.
    """
    past = arguments.get("past_key_values")
    if past is None or not _enabled or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    kept = past.__dict__.get("moa_prepared")
    prepared = None if kept is None else kept.get(block)
    if prepared is None or prepared.router is None or prepared.state != state_of(block):
        return None
    hidden = arguments["hidden_states"]
    if torch.is_autocast_enabled(hidden.device.type) or hidden.dtype != prepared.norms[0].weight.dtype:
        return None
    return inference.forward(prepared, kept, inference.route(prepared.router, hidden), arguments)


def whole_block(block: Any, arguments: dict[str, Any]) -> Tensor | None:
    """The block's output, computed as a whole, or None if it has to run its own forward.

    Args:
        block: a routed decoder block whose context is open.
        arguments: what it was called with, by name.
    """
    mixture, hidden = block.mixture, arguments["hidden_states"]
    if not _enabled or mixture.disable_adapters or len(mixture.active_adapters) != 1 or torch.compiler.is_compiling():
        return None
    adapter = mixture.active_adapters[0]
    if adapter in mixture.router and adapter not in mixture.context.gates:  # the router reads what attention reads
        return None
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    if arguments.get("output_attentions") or (autocast and torch.get_autocast_dtype(device) != hidden.dtype):
        return None
    gates = mixture.context.gates.get(adapter)
    if gates is not None:
        gates = gates.flatten(0, 1).to(hidden.dtype)
    compute = _with_gradients if torch.is_grad_enabled() else _without_gradients
    try:
        if not autocast:
            return compute(block, adapter, gates, arguments)
        with torch.autocast(device, enabled=False):
            return compute(block, adapter, gates, arguments)
    except Unfit:
        return None


def _with_gradients(block: Any, adapter: str, gates: Tensor | None, arguments: dict[str, Any]) -> Tensor:
    return training.forward(_checked_parts(block, adapter, arguments["hidden_states"]), gates, arguments)


def _without_gradients(block: Any, adapter: str, gates: Tensor | None, arguments: dict[str, Any]) -> Tensor:
    hidden, past = arguments["hidden_states"], arguments.get("past_key_values")
    kept = PreparedBlocks() if past is None else past.__dict__.setdefault("moa_prepared", PreparedBlocks())
    prepared = kept.get(block)
    if prepared is None or prepared.state != state_of(block):
        prepared = kept[block] = prepare(_checked_parts(block, adapter, hidden), hidden)
    columns = [] if gates is None else inference.columns_of(gates, block.mixture.gating[adapter].selects)
    return inference.forward(prepared, kept, columns, arguments)


def _checked_parts(block: Any, adapter: str, hidden: Tensor) -> Parts:
    parts = parts_of(block, adapter)
    weights = (*parts.qkv.weights, *parts.mlp.inner.weights, parts.output.weight, parts.mlp.weight)
    if any(weight.dtype != hidden.dtype or weight.device != hidden.device for weight in weights):
        raise Unfit("weights and hidden states of different dtypes or devices")
    return parts
