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
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from moa import _hosts
from moa.adapters import attention_interface
from moa.adapters.context import Forward, bound_arguments, parameters_of_forward
from moa.adapters.experts.base import ExpertConfig, ExpertLayer, Site, as_tensor
from moa.adapters.gradients import check_gradient
from moa.adapters.prompt_attention import KeptPrompt, Prompt, add_prompt, prompt_alone
from moa.choices import check_range


@dataclass
class PromptExpert(ExpertConfig):
    """Learned tokens in attention (Zhang et al. 2023; official `llama.py:480-510`).

    Attributes:
        length: number of prompt tokens.
    """

    kind = "prompt"
    size_setting = "length"
    needs_attention_interface = True
    length: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("prompt expert: length", self.length, low=1, whole=True)

    def sites(self) -> list[Site]:
        return [Site("prompt", "attention")]

    def obstacle_to_splitting(self) -> str | None:
        return None


class PromptTokens(nn.Module):
    """The tokens (copies * length, hidden), standard normal at first, and one gate per head (heads,), zero at first.

    A module that is called, and not bare parameters, so that offloading and FSDP find its weights in place.
    """

    def __init__(self, length: int, hidden_size: int, heads: int, init_weights: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(length, hidden_size))
        self.head_gate = nn.Parameter(torch.zeros(heads) if init_weights else torch.randn(heads))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.head_gate


class Kept(NamedTuple):
    """A prompt that decoding reads, and the weights it was made of with their state at that time."""

    prompt: KeptPrompt
    sources: list[Tensor]
    state: list[tuple[int, int]]

    def is_current(self, tokens: Tensor) -> bool:
        return self.sources[0] is tokens and self.state == _hosts.state_of(self.sources)


class PromptLayer(ExpertLayer):
    """Weights: ``moa_prompt``, a `PromptTokens`.

    Attributes:
        kept: adapter -> its keys and values, for the tokens that follow a prefill. Made anew by every forward that
            starts a text, dropped by every forward of many tokens or with gradients, and left alone only while no
            weight has changed.
    """

    config = PromptExpert
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("moa_prompt",)
    adding: ClassVar[str] = "_attend"
    moa_prompt: nn.ModuleDict

    def hook(self) -> None:
        self.kept: dict[str, Kept] = {}
        self._attention_parameters = parameters_of_forward(type(self.host))
        attention_interface.install(self.host)
        self.add_hook(self.host, before=self._before_attention)

    def build(self, adapter: str, config: PromptExpert, init_weights: bool) -> None:
        length = config.length * config.copies.number
        heads = self.place.config.num_attention_heads
        self.moa_prompt[adapter] = PromptTokens(length, self.place.in_features, heads, init_weights)

    def split_along(self, adapter: str) -> dict[str, dict[str, int]]:
        """The tokens are whole: the base's own projections make each process's heads of them."""
        return {"moa_prompt": {"head_gate": 0} if self.split is not None and self.split.heads_share else {}}

    def update(self, adapter: str, x: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        """``x`` are queries (batch, heads, tokens, width), ``y`` attention's output (batch, tokens, heads * width)."""
        now = self.context.now
        return prompt_alone(x, self._prompt(now, adapter), now.notes["scaling"], weights).flatten(-2)

    def form(self, adapter: str) -> Prompt:
        return self._prompt(self.context.now, adapter)

    def _before_attention(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = self.context.forward
        if now is not None and not now.bypassed:
            now.notes[id(self)] = kwargs if not args else bound_arguments(self._attention_parameters, args, kwargs)

    def after_attention(self, attention: nn.Module, query: Tensor, scaling: float | None, output: Tensor) -> Tensor:
        """Add this expert to the interface's ``output`` (batch, tokens, heads, width)."""
        if self._disable_adapters:
            return output
        now = self.context.now
        now.notes["scaling"] = scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        arguments = now.notes[id(self)]
        hidden = arguments["hidden_states"]
        if self.training:
            check_gradient(self.site, attention, hidden, query)
        if now.groups is None:
            for adapter in self.enabled():
                output = self._attend(now, adapter, query, hidden, scale, output)
            return output
        for group in now.groups:
            if group.adapter in self.output:
                with self.context.alone(group) as own:
                    rows = (group.of(query), group.input(hidden), scale, group.of(output))
                    output = group.put(output, self._attend(own, group.adapter, *rows), in_place=True)
        return output

    def _attend(
        self, now: Forward, adapter: str, query: Tensor, hidden: Tensor, scale: float, output: Tensor
    ) -> Tensor:
        """``output`` with what the queries find in one adapter's prompt."""
        if self.observers:
            self.show(adapter, query, output.flatten(-2))
        weights = self.weights(now, adapter, hidden)
        if self.split is not None and self.split.heads_share and isinstance(weights, Tensor):
            weights = self.split.spread(weights)
        if now.few and (not isinstance(weights, Tensor) or weights.shape[-1] == 1):
            return self._kept(now, adapter, query, scale).add_to(output, query, weights)
        return add_prompt(output, query, self._prompt(now, adapter), scale, as_tensor(weights, hidden))

    def _kept(self, now: Forward, adapter: str, query: Tensor, scaling: float) -> KeptPrompt:
        kept = self.kept.get(adapter)
        if (
            kept is None
            or self._starts_text(now.notes[id(self)], query)
            or not kept.is_current(self.moa_prompt[adapter].weight)
        ):  # type: ignore[arg-type]
            sources = [*self.moa_prompt[adapter].parameters()]
            sources += [p for name, p in self.host.named_parameters() if ".moa_" not in f".{name}"]
            prompt = KeptPrompt.of(self._prompt(now, adapter), scaling)
            kept = self.kept[adapter] = Kept(prompt, sources, _hosts.state_of(sources))
        return kept.prompt

    def _starts_text(self, arguments: dict[str, Any], query: Tensor) -> bool:
        """Whether the KV cache, which has these tokens by now, held none before. Without asking an accelerator."""
        past = _hosts.cache_of(arguments)
        if past is None:
            return True
        seen = past.get_seq_length(getattr(self.host, "layer_idx", 0))
        if isinstance(seen, Tensor) and seen.device.type != "cpu":
            return query.shape[2] > 1
        return int(seen) <= query.shape[2]

    def _prompt(self, now: Forward, adapter: str) -> Prompt:
        """Run the attention module on the prompt and catch what arrives at the attention interface."""
        self.kept.pop(adapter, None)
        tokens, head_gate = self.moa_prompt[adapter]()
        arguments = now.notes[id(self)]
        probe: dict[str, Any] = {
            name: value
            for name, value in arguments.items()
            if isinstance(value, bool) and name in ("output_attentions", "use_cache")
        }
        probe |= {"hidden_states": tokens.to(arguments["hidden_states"].dtype).unsqueeze(0), "attention_mask": None}
        if "position_embeddings" in arguments:  # None: this block does not rotate
            probe["position_embeddings"] = _no_rotation(arguments["position_embeddings"], len(tokens))
        now.bypassed = True
        try:
            self.host.forward(**probe)
        finally:
            now.bypassed = False
        key, value = now.notes.pop("probe")
        return Prompt(key.squeeze(0), value.squeeze(0), head_gate)

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
