"""The injected losses: right gradient, value untouched, padding not counted, scaled like the trainer's loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import VOCABULARY, build_family
from peft import PeftModel, get_peft_model
from torch import Tensor

from moa import Copies, LoraExpert, MoAConfig, ParallelExpert, Router, Soft, Softmax, Threshold
from moa.adapters.auxiliary import auxiliary_loss, auxiliary_scale
from moa.adapters.gating import Gates

TOKENS = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))

CONFIGURATIONS = {
    "block": {"gating": Soft(balance=0.7, z_loss=0.3), "router": Router(hidden_per_expert=0)},
    "copies": {
        "experts": [LoraExpert(["q"], copies=Copies(3, gating=Softmax(balance=0.7, z_loss=0.3)))],
        "router": None,
    },
}


def adapted(config: dict[str, Any]) -> PeftModel:
    fields = {"experts": [LoraExpert(["q", "v"]), ParallelExpert()]} | config
    return get_peft_model(build_family("llama"), MoAConfig(**fields)).train()


def router_gradients(model: PeftModel, tokens: Tensor, mask: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Gradients of the routers alone; experts start as zero, so the model's own loss gives them none."""
    model.zero_grad()
    with auxiliary_scale(scale):
        model(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
    return [p.grad.clone() for name, p in model.named_parameters() if "moa_w2" in name and p.grad is not None]


def test_value_of_the_balance_loss() -> None:
    """Two experts, four tokens: shares 3/4 and 1/2, mean scores 0.6 and 0.3."""
    weights = torch.tensor([[1.0, 0], [1, 1], [1, 0], [0, 1]])
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.9, 0.1], [0.1, 0.5]])
    loss = auxiliary_loss(Gates(weights, scores), scores, None, Softmax(balance=0.5))
    assert loss.item() == pytest.approx(0.5 * 2 * (0.75 * 0.6 + 0.5 * 0.3))


def test_value_of_the_z_loss() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = 0.1 * (torch.log(torch.tensor(2.0)) ** 2 + (1 + torch.log(torch.tensor(2.0))) ** 2) / 2
    gates = Soft()(logits)
    assert auxiliary_loss(gates, logits, None, Soft(z_loss=0.1)).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_padding_is_not_counted(config: dict[str, Any]) -> None:
    model = adapted(config)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    other = TOKENS.clone()
    other[0, :3] = 3
    for ours, theirs in zip(router_gradients(model, TOKENS, mask), router_gradients(model, other, mask), strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_scale_follows_gradient_accumulation(config: dict[str, Any]) -> None:
    model = adapted(config)
    mask = torch.ones_like(TOKENS)
    whole = router_gradients(model, TOKENS, mask)
    quarter = router_gradients(model, TOKENS, mask, scale=0.25)
    for ours, theirs in zip(quarter, whole, strict=True):
        torch.testing.assert_close(ours, theirs / 4)


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_the_reported_loss_is_the_models_own(config: dict[str, Any]) -> None:
    model = adapted(config)
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    with model.disable_adapter():
        assert torch.equal(loss, model(input_ids=TOKENS, labels=TOKENS).loss)


def test_nothing_is_injected_in_evaluation() -> None:
    model = adapted({"gating": Threshold(balance=1.0)}).eval()
    gradients = router_gradients(model, TOKENS, torch.ones_like(TOKENS))
    assert all(gradient.abs().max() == 0 for gradient in gradients)
