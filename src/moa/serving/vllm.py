"""vLLM serves mixtures: one model class over its Transformers backend, for every family that both know.

vLLM finds it by the entry point ``vllm.general_plugins``; `moa.cli.serve` starts a server with it, and so does

    vllm serve BASE --hf-overrides '{"architectures": ["MoAForCausalLM"], "moa_adapters": {"NAME": "FOLDER"}}'

The mixtures are attached after vLLM has built the model, when its own linear layers, merged projections among them, are
in place, with the same code as in training. At the first forward they are packed, see `moa.serving.packing`.

Without ``--enable-lora`` the model holds one mixture, which every token asks for. With it, it has ``--max-loras``
slots, which `moa.serving.vllm_worker` fills, and a mask says which slot every token asks for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from moa import _hosts
from moa.adapters.architectures import PROJECTIONS
from moa.adapters.config import MoAConfig
from moa.adapters.model import MoAModel, check_tensors
from moa.extras import extra
from moa.serving.adapters import configuration, fingerprint
from moa.serving.adapters import weights as adapter_weights
from moa.serving.packing import Packed
from moa.serving.releases import WORKER, check_release
from moa.serving.vllm_parallel import processes, whole_sizes

with extra("serve"):
    import vllm
    from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM

NO_ATTENTION = "moa_no_attention"
"""An attention function that attends to nothing, for the forward in which experts are asked for their forms."""


class MoAForCausalLM(TransformersForCausalLM):
    """Any decoder of vLLM's Transformers backend with a Mixture of Adapters; dense here, of experts in its subclass."""

    def __new__(cls, *args: Any, **kwargs: Any) -> MoAForCausalLM:
        config = kwargs["vllm_config"].model_config
        return super().__new__(MoAMoEForCausalLM if config.is_moe else MoAForCausalLM, *args, **kwargs)

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        check_release(vllm.__version__)
        folders: dict[str, str] | None = getattr(vllm_config.model_config.hf_config, "moa_adapters", None)
        if not folders:
            raise ValueError("MoAForCausalLM needs hf_overrides={'moa_adapters': {NAME: FOLDER}}; `moa serve` sets it")
        refuse_engine(vllm_config, len(folders))
        given = [configuration(folder) for folder in folders.values()]
        lora = vllm_config.lora_config
        configs = given if lora is None else slots_for(given, lora.max_loras)
        with _own_architectures(vllm_config.model_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        # Compiled code is kept under a name that depends on the configurations and not on the folders.
        del self.config.moa_adapters
        vllm_config.additional_config = {**vllm_config.additional_config, "moa": fingerprint(configs)}
        self.bases = {config.base_model_name_or_path for config in given}
        self.kinds = [fingerprint([config]) for config in configs]
        self.mask: Tensor | None = None
        if lora is None:
            (self._folder,) = folders.values()
        else:
            tokens = -(-vllm_config.scheduler_config.max_num_batched_tokens // 8) * 8  # runners pad to a multiple of 8
            self.mask = torch.zeros(tokens, len(configs), device=self.device_config.device)
        self._packed: Packed | None = None
        self._is_current = False
        with torch.device(self.device_config.device):
            self._attach(configs)

    def _attach(self, configs: Sequence[MoAConfig]) -> None:
        self._slots = [f"slot{number}" for number in range(len(configs))]
        for slot, config in zip(self._slots, configs, strict=True):
            config.inference_mode, config.init_weights = True, False
            config.architecture = _merged(config.architecture, self.packed_modules_mapping)
            with whole_sizes(self.model):
                MoAModel(self.model, {slot: config}, slot)  # attaches; the wrapper itself is not needed
        # In the dtype that they were trained in, whatever the base's. A slot without a mixture is all zeros.
        for name, parameter in self.model.named_parameters():
            if ".moa_" in name:
                parameter.requires_grad_(False)
                parameter.data = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Weights of the base, of the mixture (named as in its file), or both; the mixture's first ones are its file's.

        Raises:
            ValueError: a tensor of the mixture is missing, unknown, or of another shape, or there are slots, of which
                nothing says which one is meant.
        """
        ours: dict[str, Tensor] = {}

        def of_base() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if ".moa_" in name:
                    ours[name] = tensor
                else:
                    yield name, tensor

        loaded = set(super().load_weights(of_base()))
        if self.mask is None:
            return loaded | self.fill(0, ours or adapter_weights(self._folder))
        if ours:
            raise ValueError(
                "these weights do not say which mixture they are of: hand them over as a folder, by "
                "/v1/load_lora_adapter or LLMEngine.add_lora"
            )
        return loaded | {name for name, _ in self.named_parameters() if ".moa_" in name}

    def fill(self, slot: int, given: Mapping[str, Tensor]) -> set[str]:
        """Let a slot compute with these tensors, named as in a mixture's file, from the next forward on.

        Returns:
            The names of the slot's parameters.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape; nothing has changed then.
        """
        adapter = self._slots[slot]
        own: dict[tuple[int, str], str] = {}  # an expert's name is unique in its block
        for name, _ in self.named_parameters():
            if f".{adapter}." in name and ".moa_" in name:
                own[_place(name.replace(f".{adapter}.", ".", 1))] = name
        named = {own.get(_place(name), name): tensor for name, tensor in given.items()}
        check_tensors(self, adapter, named)
        for name, tensor in named.items():
            self.get_parameter(name).data.copy_(tensor)
        self._is_current = False
        return set(named)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_current:
            self._pack()
        return super().forward(*args, **kwargs)

    @torch.inference_mode()
    def _pack(self) -> None:
        """Before the first forward and after new weights: vLLM has finished with the base's weights only now."""
        self._is_current = True
        if self._packed is None:
            self._packed = Packed(self.model, self._slots, self._ask, self.mask, processes())
        else:
            self._packed.refresh()

    def _ask(self) -> None:
        """Run one token through the blocks, attending to nothing and past any compiled code."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device_config.device)
        before = _hosts.stored_implementation(self.text_config)
        _hosts.store_implementation(self.text_config, NO_ATTENTION)
        try:
            forward: Callable[..., Any] = type(self.model).forward
            forward(self.model, input_ids=token, position_ids=token, use_cache=False, return_dict=False)
        finally:
            _hosts.store_implementation(self.text_config, before)  # type: ignore[arg-type]


class MoAMoEForCausalLM(MoAForCausalLM, TransformersMoEForCausalLM):
    """The same over a mixture-of-experts base."""


def _attend_to_nothing(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register(NO_ATTENTION, _attend_to_nothing)


def refuse_engine(vllm_config: Any, mixtures: int) -> None:
    """Raise ValueError for settings of the engine that so many mixtures do not go with."""
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size"):
        size = getattr(parallel, name)
        if size > 1:
            raise ValueError(
                f"{name}={size}: processes share a mixture by tensor parallelism alone. Use {name}=1; "
                "tensor_parallel_size splits a model that is too large for one device, data_parallel_size serves more "
                "requests at a time"
            )
    if vllm_config.speculative_config is not None:
        raise ValueError("--speculative-config does not go with a mixture: leave it out")
    if vllm_config.lora_config is None:
        if mixtures > 1:
            raise ValueError(
                f"{mixtures} mixtures in one engine need --enable-lora --max-loras {mixtures} --worker-cls {WORKER}, "
                "which `moa serve` sets"
            )
    elif parallel.worker_cls != WORKER:
        raise ValueError(
            f"--enable-lora needs --worker-cls {WORKER} beside mixtures, as vLLM would not mix its LoRA in; `moa serve "
            "ADAPTER --max-loras N` sets both"
        )


def slots_for(configs: Sequence[MoAConfig], slots: int) -> list[MoAConfig]:
    """What every slot of an engine has room for, given the mixtures that it starts with.

    Raises:
        ValueError: mixtures of different configurations, and not a slot for each.
    """
    if len({fingerprint([config]) for config in configs}) == 1:
        return [copy.deepcopy(configs[0]) for _ in range(slots)]
    if slots != len(configs):
        raise ValueError(
            f"--max-loras {slots}: mixtures that differ in experts, router or gating have a slot each and nothing "
            f"besides. Use --max-loras {len(configs)}, or serve those of one configuration together"
        )
    return list(configs)


@contextmanager
def _own_architectures(model_config: Any) -> Iterator[None]:
    """Inside, the configuration names the base's own architecture, by which vLLM finds how checkpoints are renamed."""
    config = model_config.hf_config
    ours = config.architectures
    given, _ = PretrainedConfig.get_config_dict(model_config.model, revision=model_config.revision)
    config.architectures = given.get("architectures") or []
    try:
        yield
    finally:
        config.architectures = ours


def _merged(said: Mapping[str, Any] | None, packed: Mapping[str, list[str]]) -> dict[str, Any] | None:
    """What a configuration says of the family's modules, in the names that vLLM has given to those it has merged."""
    changed = dict(said or {})
    for merged, parts in packed.items():
        for role in PROJECTIONS:
            parent, _, name = (changed.get(role) or "").rpartition(".")
            if name in parts:
                changed[role] = f"{parent}.{merged}".lstrip(".")
    if "qkv_proj" in packed:  # queries, keys and values of a family that has them apart
        changed["qkv_layout"] = "concatenated"
    return changed or None


def _place(name: str) -> tuple[int, str]:
    """Number of the block and path from the mixture's own module on; whole names that have neither are kept."""
    match = re.search(r"\.(\d+)\.(?:.*?\.)?(mixture(?:_[^.]*)?\..*)$", name)
    return (-1, name) if match is None else (int(match[1]), match[2])
