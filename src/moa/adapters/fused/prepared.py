"""A block's weights as inference reads them, and where they are kept.

When a token at a time is decoded, the number of calls is what costs, not arithmetic. So whatever does not depend on the
tokens is computed beforehand: A's stacked, B's scaled and transposed, the prompt's keys and values with its head gates,
the router's input matrices as one.

What is prepared lives and dies with the KV cache it was made for: no mark on a tensor tells reliably that it has
changed, and nobody trains in the middle of a generation. A copied or pickled cache leaves it behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moa.adapters.attention_interface import host_function
from moa.adapters.fused.attention import per_head
from moa.adapters.fused.elementwise import signed
from moa.adapters.fused.low_rank import narrow
from moa.adapters.fused.parts import Parts
from moa.adapters.fused.projections import Projections, stack
from moa.adapters.fused.training import prompt_of
from moa.adapters.gating import Gating
from moa.adapters.routers import is_watched, stacked


class Linear(NamedTuple):
    """A linear layer: weight (in, out), a view of the model's own, and bias (out,) or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)


class Write(NamedTuple):
    """The second matrix of an update, (rank, out) with its scaling, and its column among the gates (None: ungated)."""

    matrix: Tensor
    column: int | None


class Read(NamedTuple):
    """First matrices of updates below each other, (sum of ranks, in), and their biases (sum of ranks,) or None."""

    matrix: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        low = narrow(x, self.matrix)
        return low if self.bias is None else low.add_(self.bias)


class Group(NamedTuple):
    """Projections of one input: base layers, all A's or None, their ranks, and for every layer a `Write` or None."""

    layers: list[Linear]
    read: Read | None
    ranks: list[int]
    writes: list[Write | None]


class FastRouter(NamedTuple):
    """A token-level router: ``read`` yields ``[w1 x | w3 x | threshold]``, or the logits and the threshold if linear.

    Attributes:
        read: the matrices that read the block's input, as one.
        hidden: width of ``w1 x``; 0 for a linear router.
        write: from the hidden layer to the logits; None for a linear router.
        outputs: how many gates.
        gating: the rule.
        dtype: of the router's own weights.
    """

    read: Read
    hidden: int
    write: Linear | None
    outputs: int
    gating: Gating
    dtype: torch.dtype


class Norm(NamedTuple):
    """An RMSNorm."""

    weight: Tensor
    eps: float


class Prepared(NamedTuple):
    """All of a block.

    Attributes:
        block: the decoder block.
        attention: its attention module.
        attend: the attention function, without guests.
        is_sdpa: whether that is transformers' own SDPA function.
        state: what has to be the same for this to be current, see `PreparedBlocks.current`.
        norms: before attention and before the MLP.
        router: None if the block's gates have to be asked for in the general way.
        qkv, output, inner, down: the projections; those after attention and in the MLP's end are groups of one.
        prompt: keys (heads, prompt, width), scaled, and values (heads, prompt, width), gated by head; or None.
        prompt_column: as in `Write`.
        parallel: the first layer, the second as a `Write`, and its bias; or None.
    """

    block: Any
    attention: Any
    attend: Callable[..., Any]
    is_sdpa: bool
    state: tuple[Any, ...]
    norms: tuple[Norm, Norm]
    router: FastRouter | None
    qkv: Group
    output: Group
    inner: Group
    down: Group
    prompt: tuple[Tensor, Tensor] | None
    prompt_column: int | None
    parallel: tuple[Read, Write, Tensor] | None


class PreparedBlocks(dict[Any, Prepared]):
    """What a KV cache keeps: block -> `Prepared`, and the angles of the forward that is running."""

    sin: Tensor | None = None

    def angles(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and `signed` sines (batch, tokens, 1, width), computed once per forward and not once per block."""
        if self.sin is not sin:
            self.sin, self.both = sin, (cos.unsqueeze(2), signed(sin).unsqueeze(2))
        return self.both

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedBlocks:
        return PreparedBlocks()

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedBlocks, ()


def state_of(block: Any) -> tuple[Any, ...]:
    """What `Prepared` depends on that may change while a cache is in use, cheap to ask."""
    mixture, attention, mlp = block.mixture, block.self_attn, block.mlp
    hooks = len(mixture._forward_hooks), len(attention._forward_hooks), len(mlp._forward_hooks)
    return mixture._active_adapter, mixture._disable_adapters, block.training, hooks


def prepare(parts: Parts, hidden: Tensor) -> Prepared:
    """Everything that does not depend on tokens, in the dtype of ``hidden``."""
    block, dtype = parts.block, hidden.dtype
    mlp = parts.mlp
    prompt = parallel = None
    if parts.prompt is not None:
        key, value, head_gate = prompt_of(parts, hidden)
        key, value = (per_head(x, len(head_gate)) for x in (key, value))
        prompt = (key * parts.output.scaling, (value * head_gate.view(-1, 1, 1)).to(dtype))
    if parts.parallel:
        down, down_bias, up, up_bias = (tensor.to(dtype) for tensor in parts.parallel)
        parallel = (Read(down, down_bias), Write(up.t(), mlp.parallel_column), up_bias)
    function = host_function(block.self_attn)
    output = Projections([parts.output.weight], [parts.output.bias], [parts.output.update], *halves(parts.output_ab))
    return Prepared(
        block=block,
        attention=block.self_attn,
        attend=function,
        is_sdpa=function is sdpa_attention_forward,
        state=state_of(block),
        norms=tuple(  # type: ignore[arg-type]
            Norm(norm.weight, norm.variance_epsilon) for norm in (block.input_layernorm, block.post_attention_layernorm)
        ),
        router=fast_router(block.mixture, parts.adapter, dtype),
        qkv=group(parts.qkv, dtype),
        output=group(output, dtype),
        inner=group(mlp.inner, dtype),
        down=group(Projections([mlp.weight], [mlp.bias], [mlp.update], *halves(parts.down_ab)), dtype),
        prompt=prompt,
        prompt_column=parts.output.prompt_column,
        parallel=parallel,
    )


def halves(ab: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return ab[:1], ab[1:]


def group(projections: Projections, dtype: torch.dtype) -> Group:
    matrices = iter(projections.b)
    return Group(
        layers=[Linear(w.t(), bias) for w, bias in zip(projections.weights, projections.biases, strict=True)],
        read=Read(stack(projections.a, dtype), None) if projections.a else None,
        ranks=[b.shape[1] for b in projections.b],
        writes=[
            None if u is None else Write((next(matrices).t() * u.scaling).to(dtype).contiguous(), u.column)
            for u in projections.updates
        ],
    )


def fast_router(mixture: Any, adapter: str, dtype: torch.dtype) -> FastRouter | None:
    """The block's router without its modules, or None if somebody watches it or it decides for more than a token."""
    if adapter not in mixture.router or mixture.router[adapter].level != "token" or mixture._forward_hooks:
        return None
    w2, first = mixture.moa_w2[adapter], mixture.input_layers(adapter)
    if any(is_watched(layer) for layer in (*first, w2)):
        return None
    linear = first[0] is w2
    return FastRouter(
        read=Read(*stacked(first, dtype)),
        hidden=0 if linear else len(first[0].weight),
        write=None if linear else Linear(w2.weight.t(), w2.bias),
        outputs=len(w2.weight),
        gating=mixture.gating[adapter],
        dtype=w2.weight.dtype,
    )
