"""Prompt expert: learned tokens that every query may attend to, with a softmax of their own.

Output of the attention module before its output projection: ``Attn(q, K, V) + g * h * softmax(q K_p') V_p`` with a
zero-initialised scalar ``h`` per head (LLaMA-Adapter). The queries are the block's own, rotated; ``K_p`` and ``V_p``
go through the frozen key and value projections and whatever norm the family puts on keys, without rotation and
without the block's LoRA experts.

To know nothing about families, keys and values are obtained by running the attention module's own forward on the
prompt, with an identity rotation, up to transformers' attention interface. Limits: the module must use that
interface; logit soft-capping (Gemma 2) and attention sinks (gpt-oss) act on the text's softmax only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moa.adapters import attention_interface, ops
from moa.adapters.architectures import Host
from moa.adapters.block import BlockContext, bound_arguments, parameters_of_forward
from moa.adapters.choices import check_range
from moa.adapters.experts.base import ExpertConfig, ExpertLayer, Site


@dataclass
class PromptExpert(ExpertConfig):
    """Learned tokens in attention (Zhang et al. 2023; official `llama.py:480-510`).

    Attributes:
        length: number of prompt tokens.
    """

    kind = "prompt"
    length: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("prompt expert: length", self.length, low=1)

    def sites(self) -> list[Site]:
        return [Site("prompt", "attention")]


class Prompt(nn.Module):
    """The tokens (copies * length, hidden), standard normal at first, and one gate per head (heads,), zero at first.

    A module that is called, and not bare parameters, so that offloading and FSDP find its weights in place.
    """

    def __init__(self, length: int, hidden_size: int, heads: int, init_weights: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(length, hidden_size))
        self.head_gate = nn.Parameter(torch.zeros(heads) if init_weights else torch.randn(heads))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.head_gate


class PromptLayer(ExpertLayer):
    """Weights: ``moa_prompt``, a `Prompt`."""

    config = PromptExpert
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("moa_prompt",)

    def __init__(self, site: str, host: Host, context: BlockContext):
        super().__init__(site, host, context)
        self.moa_prompt = nn.ModuleDict()
        self._attention_parameters = parameters_of_forward(type(host.module))
        attention_interface.install(host.module)
        self.add_hook(host.module, before=self._before_attention)

    def build(self, adapter: str, config: PromptExpert, init_weights: bool) -> None:
        length = config.length * config.copies.number
        heads = self.place.config.num_attention_heads
        self.moa_prompt[adapter] = Prompt(length, self.place.in_features, heads, init_weights)

    def _before_attention(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.context.bypassed:
            self.context.notes[id(self)] = bound_arguments(self._attention_parameters, args, kwargs)

    def after_attention(self, attention: nn.Module, query: Tensor, scaling: float | None, output: Tensor) -> Tensor:
        """Add this expert to the interface's ``output`` (batch, tokens, heads, width)."""
        arguments: dict[str, Any] = self.context.notes.get(id(self), {})
        for adapter in self.enabled(self.moa_prompt):
            prompt, head_gate = self.moa_prompt[adapter]()
            hidden = arguments["hidden_states"]
            key, value = self._keys_and_values(adapter, attention, prompt, arguments)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            route = self.weights(adapter, hidden)
            extra = ops.prompt_attention(query, key, value, scale, head_gate, route)
            output = output + extra.to(output.dtype).view_as(output)
        return output

    def _keys_and_values(
        self, adapter: str, attention: nn.Module, prompt: Tensor, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """As `_probe`, but once per KV cache, with which they live and die.

        Not kept for longer: no mark on a tensor tells reliably that it has changed (fused optimisers and ``.data``
        leave its version as it was), and reentrant checkpointing runs training forwards without gradients.
        """
        past = arguments.get("past_key_values")
        if past is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._probe(attention, prompt, arguments)
        kept = past.__dict__.setdefault("moa_prompts", {})
        place = (id(self), adapter)
        if place not in kept or kept[place][0] is not prompt:
            kept[place] = (prompt, self._probe(attention, prompt, arguments))
        return kept[place][1]

    def _probe(self, attention: nn.Module, prompt: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Run the attention module on the prompt (length, hidden) and catch what arrives at the attention interface.

        Returns:
            Key and value, each (kv_heads, length, width).
        """
        tokens = prompt.to(arguments["hidden_states"].dtype).unsqueeze(0)
        probe: dict[str, Any] = {
            name: value
            for name, value in arguments.items()
            if isinstance(value, bool) and name in ("output_attentions", "use_cache")
        }
        probe |= {"hidden_states": tokens, "attention_mask": None}
        if "position_embeddings" in arguments:  # None: this block does not rotate
            probe["position_embeddings"] = _no_rotation(arguments["position_embeddings"], prompt.shape[0])
        self.context.bypassed = True
        try:
            attention.forward(**probe)
        finally:
            self.context.bypassed = False
        key, value = self.context.notes.pop("probe")
        return key.squeeze(0), value.squeeze(0)

    def detach(self) -> None:
        super().detach()
        attention_interface.uninstall(self.host)


def _no_rotation(embeddings: Any, length: int) -> Any:
    """Embeddings of ``length`` positions that rotate nothing, in the form of a block's own: cosine and sine, or complex
    numbers, or None where a block does not rotate.
    """
    if embeddings is None:
        return None
    cos = embeddings if isinstance(embeddings, Tensor) else embeddings[0]
    ones = cos.new_ones((*(1,) * (cos.dim() - 2), length, cos.shape[-1]))
    return ones if isinstance(embeddings, Tensor) else (ones, torch.zeros_like(ones))
