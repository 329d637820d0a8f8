"""An adapter as plain LoRA, for tools that take nothing else, where that is exact."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from moa.adapters.architectures import PROJECTIONS
from moa.adapters.config import MoAConfig
from moa.adapters.experts import LoraExpert

WEIGHTS = "adapter_model.safetensors"
FUSED = {"qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "kv_b_proj", "gate_up_proj"}
_OURS = re.compile(rf"(?P<module>.+)\.mixture_(?P<target>{'|'.join(PROJECTIONS)})\.moa_(?P<side>[AB])\.weight")
_PREFIX = "base_model.model."


def to_lora(adapter: str | Path, output: str | Path) -> LoraConfig:
    """Write an adapter of LoRA experts without a router as PEFT's LoRA; it computes the same.

    Args:
        adapter: the folder of a saved mixture.
        output: folder for ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The configuration that was written. Ranks and scalings that differ between modules are in ``rank_pattern`` and
        ``alpha_pattern``.

    Raises:
        ValueError: it is no mixture, or one that is not LoRA: it has gates, other experts, several copies of one, or
            sits on part of a fused projection.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, MoAConfig):
        raise ValueError(f"{adapter} is an adapter of type {config.peft_type}, not a Mixture of Adapters")
    tensors, modules = _renamed(load_file(Path(adapter, WEIGHTS)), config)
    lora = _configuration(config, modules, tensors)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    lora.save_pretrained(str(folder))
    return lora


def is_exact(adapter: str | Path) -> bool:
    """Whether `to_lora` is the way: the adapter is LoRA but for the names of its tensors, or no mixture at all."""
    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, MoAConfig):
        return True
    plain = all(isinstance(expert, LoraExpert) and expert.copies.number == 1 for expert in config.experts)
    return plain and config.router is None


def _renamed(ours: dict[str, Tensor], config: MoAConfig) -> tuple[dict[str, Tensor], dict[str, str]]:
    """PEFT's names for all tensors, and module -> projection."""
    found = {name: _OURS.fullmatch(name) for name in ours}
    other = sorted(name for name, match in found.items() if match is None)
    copies = [expert for expert in config.experts if expert.copies.number > 1]
    if other or copies or config.router is not None:
        what = f"it also has {other[0]}" if other else f"it has {copies[0].copies.number} copies of an expert"
        raise ValueError(
            f"this adapter is not LoRA: {what}. What depends on the token cannot be written as one matrix, so only "
            "LoRA experts with router=None and one copy, such as the preset 'lora', are LoRA exactly. `moa export` "
            "fits one to a mixture on text and measures what that costs"
        )
    fused = _fused_modules(config)
    tensors, modules = {}, {}
    for name, match in found.items():
        assert match is not None
        module = match["module"]
        if module.rpartition(".")[2] in fused:
            raise ValueError(f"{module} is a fused projection, of which {match['target']} is a part: not exported yet")
        modules[module.removeprefix(_PREFIX)] = match["target"]
        tensors[f"{module}.lora_{match['side']}.weight"] = ours[name].contiguous()
    return tensors, modules


def _fused_modules(config: MoAConfig) -> set[str]:
    """Names of modules that are several projections at once: those of known families, and the configuration's own."""
    own = Counter(path for role, path in (config.architecture or {}).items() if role in PROJECTIONS and path)
    return FUSED | {path.rpartition(".")[2] for path, roles in own.items() if roles > 1}


def _configuration(config: MoAConfig, modules: dict[str, str], tensors: dict[str, Tensor]) -> LoraConfig:
    ranks = {module: len(tensors[f"{_PREFIX}{module}.lora_A.weight"]) for module in modules}
    alphas = {module: _expert(config, module, target).scaling * ranks[module] for module, target in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        rank_pattern={module: value for module, value in ranks.items() if value != rank},
        alpha_pattern={module: value for module, value in alphas.items() if value != alpha},
        target_modules=targets_of(list(modules)),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )


def _expert(config: MoAConfig, module: str, target: str) -> LoraExpert:
    """The expert that sits on a module."""
    block = int(next(part for part in module.split(".") if part.isdigit()))
    for expert in config.experts:
        if isinstance(expert, LoraExpert) and target in expert.targets and block in (expert.layers or [block]):
            return expert
    raise ValueError(f"no expert of the configuration sits on {module}")


def targets_of(modules: list[str]) -> list[str]:
    """Last names where every block has the same ones, which serving engines prefer, else whole paths."""
    blocks: dict[str, set[str]] = {}
    for module in modules:
        _, number, tail = re.split(r"\.(\d+)\.", module, maxsplit=1)
        blocks.setdefault(number, set()).add(tail)
    if len({frozenset(tails) for tails in blocks.values()}) == 1:
        return sorted({module.rpartition(".")[2] for module in modules})
    return sorted(modules)
