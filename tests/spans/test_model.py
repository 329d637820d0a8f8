"""Models that differ in anything that changes their numbers are not the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from planned import tiny
from torch import nn

from moa.spans.model import family, identity


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
