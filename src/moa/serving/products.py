"""The narrow products of packed experts: by a library, or written out as sums where a compiler makes more of them.

A bottleneck is a few numbers wide, so that most of what its products take is the calls. In code compiled for CPUs a
sum becomes a loop inside of the loops before and after it, and no call is left. Measured on a CPU with AVX-512
against the library: 8 to 62 rows read in 0.4 to 1 times as long, for 1 to 2048 tokens; what is 8 to 50 wide is added
in 0.5 to 1.3 times as long for up to 32 tokens, and for more, where it is some 2 % of a block's time, in 1.1 to 1.6
times. That is float32; in bfloat16 a call takes ten times what a token's sum does, sums of 32 tokens take 1.2 times
as long as the library, of 256 three to four times. Not compiled, a sum would hold all of its summands at once, and
accelerators have units for products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moa.adapters.low_rank import spread
from moa.adapters.prompt_attention import Prompt, prompt_alone

NARROW = 64
"""What is written out is at most so wide; two mixtures side by side often are wider."""


def read(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` (..., rows) for ``x`` (..., in), ``weight`` (rows, in) and ``bias`` (rows,)."""
    if not _is_written_out(x, len(weight)):
        return F.linear(x, weight, bias)
    low = (x.unsqueeze(-2) * weight).sum(-1, dtype=_wide(x))
    return (low if bias is None else low + bias).to(x.dtype)


def add(y: Tensor, inner: Tensor, up: Tensor) -> Tensor:
    """``y + inner U`` (n, out) for ``inner`` (n, width) and ``up`` (width, out)."""
    if not _is_written_out(y, len(up)):
        return torch.addmm(y, inner, up)
    return (y + (inner.unsqueeze(-1) * up).sum(-2, dtype=_wide(y))).to(y.dtype)


def attend(query: Tensor, prompt: Prompt, scaling: float, weights: Tensor | None) -> Tensor:
    """See `moa.adapters.prompt_attention.prompt_alone`, which this computes."""
    kv_heads, size, _ = prompt.key.shape
    if not _is_written_out(query, size):
        return prompt_alone(query, prompt, scaling, weights)
    grouped = (query * scaling).unflatten(1, (kv_heads, -1)).unsqueeze(-2)  # (batch, kv_heads, group, tokens, 1, width)
    scores = (grouped * prompt.key.view(kv_heads, 1, 1, size, -1)).sum(-1, dtype=_wide(query)).flatten(1, 2)
    shares = torch.softmax(scores, dim=-1)
    shares = shares * prompt.head_gate.to(shares.dtype).view(-1, 1, 1)
    if weights is not None:
        shares = shares * spread(weights, size).to(shares.dtype).unsqueeze(1)
    parts = shares.to(query.dtype).unflatten(1, (kv_heads, -1)).unsqueeze(-1)
    return (parts * prompt.value.view(kv_heads, 1, 1, size, -1)).sum(-2).flatten(1, 2).transpose(1, 2)


def _is_written_out(x: Tensor, width: int) -> bool:
    return width <= NARROW and torch.compiler.is_compiling() and x.device.type == "cpu"


def _wide(x: Tensor) -> torch.dtype:
    """What is summed in, as libraries do, so that half precision is rounded to once."""
    return torch.promote_types(x.dtype, torch.float32)
