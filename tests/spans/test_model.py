"""Models that differ in anything that changes their numbers are not the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from planned import tiny
from torch import nn

from moa.spans.model import ModelShape, family, identity


def adapted() -> nn.Module:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    return model.eval()


def test_a_model_is_itself() -> None:
    assert identity(tiny()) == identity(tiny())
    assert family(tiny()) == family(tiny().to(torch.bfloat16))


def permuted(model: nn.Module) -> None:
    weight = model.get_parameter("model.layers.1.self_attn.v_proj.weight")
    weight.data = weight.data.flip(0)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.get_parameter("model.layers.1.mlp.down_proj.weight").data[3, 5].add_(1e-3),
        permuted,
        lambda model: model.to(torch.bfloat16),
    ],
    ids=["one number", "order", "dtype"],
)
def test_changed_weights_are_another_model(change: Callable[[nn.Module], object]) -> None:
    model = tiny()
    with torch.no_grad():
        change(model)
    assert identity(model) != identity(tiny())
    assert family(model) == family(tiny())


def test_an_adapter_makes_another_model_of_the_same_family() -> None:
    torch.manual_seed(0)
    model = adapted()
    found = [identity(tiny()), identity(model)]
    with model.disable_adapter():
        found.append(identity(model))
    model.merge_adapter()
    found.append(identity(model))
    assert len({one["weights"] for one in found}) == 4
    assert family(model) == family(tiny())


def test_heads_that_differ_from_layer_to_layer_are_refused() -> None:
    """Gemma 4's layers that see everything have wider heads than those with a window."""
    if "gemma4_text" not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers has no Gemma 4")
    config = transformers.Gemma4TextConfig(
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 8, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    )
    if not getattr(config, "is_heterogeneous", False):
        pytest.skip("this transformers has one configuration for all layers")
    with pytest.raises(ValueError, match=r"gemma4_text: head_dim is \[8, 16\] in its layers"):
        ModelShape.of(config)
