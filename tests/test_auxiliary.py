"""The injected losses: right value and gradient, padding not counted, weighted as the model's loss is; they balance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from families import VOCABULARY, build_family
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from moa import Copies, LoraExpert, MoAConfig, ParallelExpert, Router, Soft, Softmax, Threshold, TopK
from moa.adapters.auxiliary import auxiliary_loss, weight_in_cross_entropy
from moa.adapters.gating import Gates, Gating

TOKENS = torch.randint(3, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "block": {"gating": Soft(balance=0.7, z_loss=0.3), "router": Router(hidden_per_expert=0)},
    "copies": {
        "experts": [LoraExpert(["q"], copies=Copies(3, gating=Softmax(balance=0.7, z_loss=0.3)))],
        "router": None,
    },
    "block but not the first": {
        "gating": Soft(balance=0.7, z_loss=0.3),
        "router": Router(hidden_per_expert=0),
        "layers_to_transform": [1],
    },
    "copies but not in the first block": {
        "experts": [
            LoraExpert(["q"], layers=[0]),
            LoraExpert(["v"], layers=[1], copies=Copies(3, gating=Softmax(balance=0.7, z_loss=0.3))),
        ],
        "router": None,
    },
}
# The z-loss alone is a mean over tokens: it is the same for a batch and, on average, for its parts.
LINEAR: dict[str, dict[str, Any]] = {
    "block": {"gating": Soft(z_loss=0.3), "router": Router(hidden_per_expert=0)},
    "copies": {"experts": [LoraExpert(["q"], copies=Copies(3, gating=Softmax(z_loss=0.3)))], "router": None},
}
every_configuration = pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
every_linear = pytest.mark.parametrize("config", LINEAR.values(), ids=LINEAR)


def adapted(config: dict[str, Any]) -> PeftModel:
    """Experts start as zero, so that the model's own loss gives routers no gradient: all they get is auxiliary."""
    fields = {"experts": [LoraExpert(["q", "v"]), ParallelExpert()]} | config
    return get_peft_model(build_family("llama"), MoAConfig(**fields)).train()


def own_loss(model: PeftModel, tokens: Tensor, **arguments: Any) -> Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False, **arguments).loss


def loss_of_logits(model: PeftModel, tokens: Tensor, **arguments: Any) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False, **arguments).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def scaled_in_place(model: PeftModel, tokens: Tensor, **arguments: Any) -> Tensor:
    loss = own_loss(model, tokens, **arguments)
    loss *= 2
    return loss / 2


LOSSES: dict[str, Callable[..., Tensor]] = {
    "the model's": own_loss,
    "from logits": loss_of_logits,
    "scaled in place": scaled_in_place,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def router_gradients(model: PeftModel) -> Tensor:
    found = [p.grad.flatten() for name, p in model.named_parameters() if "moa_w2" in name and p.grad is not None]
    gradient = torch.cat(found)
    model.zero_grad()
    return gradient


def auxiliary_gradient(model: PeftModel) -> Tensor:
    """What a whole batch gives; not nothing."""
    own_loss(model, TOKENS).backward()
    gradient = router_gradients(model)
    assert gradient.abs().max() > 1e-3
    return gradient


# --- values -----------------------------------------------------------------------------------------------------------


def test_value_of_the_balance_loss_of_a_rule_that_selects() -> None:
    """Two experts, four tokens: shares 3/4 and 1/2, mean scores 0.6 and 0.3."""
    weights = torch.tensor([[1.0, 0], [1, 1], [1, 0], [0, 1]])
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.9, 0.1], [0.1, 0.5]])
    loss = auxiliary_loss(Gates(weights, scores), scores, None, TopK(k=1, balance=0.5))
    assert loss.item() == pytest.approx(0.5 * 2 * (0.75 * 0.6 + 0.5 * 0.3))


@pytest.mark.parametrize("rule", [Soft(balance=0.5), Softmax(balance=0.5)], ids=["soft", "softmax"])
def test_value_of_the_balance_loss_where_every_expert_takes_part(rule: Gating) -> None:
    """Shares of a token's sum are (0.9, 0.1) and (0.5, 0.5): means 0.7 and 0.3."""
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.2]])
    loss = auxiliary_loss(Gates(scores, scores), scores, None, rule)
    assert loss.item() == pytest.approx(0.5 * 2 * (0.7**2 + 0.3**2))


def test_value_of_the_z_loss() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    expected = 0.1 * (torch.log(torch.tensor(2.0)) ** 2 + (1 + torch.log(torch.tensor(2.0))) ** 2) / 2
    gates = Soft()(logits)
    assert auxiliary_loss(gates, logits, None, Soft(z_loss=0.1)).item() == pytest.approx(expected.item())


BALANCED: dict[str, Gating] = {
    "softmax": Softmax(balance=1),
    "soft": Soft(balance=1),
    **{name: Threshold(balance=1, train_threshold=name) for name in ("frozen", "shifted", "closed-form")},
    "adamole": Threshold(balance=1, train_threshold="shifted", score="softmax", gamma_max=0.25),
}


@pytest.mark.parametrize("rule", BALANCED.values(), ids=BALANCED)
def test_descending_the_balance_loss_alone_evens_experts_out(rule: Gating) -> None:
    """Experts' shares of a token's scores become equal on average, and not by switching all experts off."""
    noise = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([1.5, 0.5, -0.5, -1.5]).requires_grad_()
    own = Softmax() if "softmax" in (rule.kind, getattr(rule, "score", "")) else Soft()

    def spread() -> float:
        scores = own(noise + bias).scores
        return (scores / scores.sum(-1, keepdim=True)).mean(0).std().item()

    def gates() -> Gates:
        return rule(noise + bias, torch.zeros(256, 1))

    before, total = spread(), gates().weights.sum().item()
    for _ in range(300):
        (gradient,) = torch.autograd.grad(auxiliary_loss(gates(), noise + bias, None, rule), bias)
        with torch.no_grad():
            bias -= 0.5 * gradient
    assert before > 0.1
    assert spread() < 0.15 * before
    assert 0.8 * total < gates().weights.sum().item() < 1.4 * total


def test_balance_is_finite_where_scores_lie_about_the_threshold() -> None:
    """Scores minus their threshold sum to zero there; nothing may be divided by that."""
    rule = Threshold(balance=1, train_threshold="shifted", gamma_max=1.0)
    logits = torch.tensor([[1e-6, -1e-6], [0.5, -0.5]]).requires_grad_()
    loss = auxiliary_loss(rule(logits, torch.zeros(2, 1)), logits, None, rule)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert 0 < loss.item() < 2
    assert gradient.abs().max() < 1


# --- the weight of the auxiliary gradient -----------------------------------------------------------------------------


@every_configuration
@every_loss
@pytest.mark.parametrize("factor", [1.0, 0.25, 1024.0])
def test_every_factor_on_the_loss_acts_on_the_auxiliary_loss(
    config: dict[str, Any], loss: Callable[..., Tensor], factor: float
) -> None:
    """Such as a loss scale, or one over the accumulation steps."""
    model = adapted(config)
    expected = auxiliary_gradient(model)
    (loss(model, TOKENS) * factor).backward()
    torch.testing.assert_close(router_gradients(model) / factor, expected, rtol=1e-4, atol=1e-6)


@every_linear
@every_loss
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_accumulated_batches_are_one_batch(
    config: dict[str, Any], loss: Callable[..., Tensor], reentrant: bool | None
) -> None:
    model = adapted(config)
    expected = auxiliary_gradient(model)
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for row in TOKENS.split(1):
        (loss(model, row) / len(TOKENS)).backward()
    torch.testing.assert_close(router_gradients(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_forwards_that_are_alive_together_keep_their_own_factors(reentrant: bool | None) -> None:
    model = adapted(LINEAR["block"])
    expected = sum(
        factor * gradient
        for factor, row in zip((1.0, 2.0, 0.5, 3.0), TOKENS.split(1), strict=True)
        for gradient in [(own_loss(model, row).backward(), router_gradients(model))[1]]
    )
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    losses = [own_loss(model, row) for row in TOKENS.split(1)]
    sum(factor * loss for factor, loss in zip((1.0, 2.0, 0.5, 3.0), losses, strict=True)).backward()
    torch.testing.assert_close(router_gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_a_share_of_a_larger_batch_counts_by_its_tokens() -> None:
    """As transformers' trainer asks for: the loss is a sum over these tokens, divided by the number of all."""
    model = adapted(LINEAR["block"])
    expected = auxiliary_gradient(model)
    own_loss(model, TOKENS, num_items_in_batch=torch.tensor(8 * 5)).backward()
    torch.testing.assert_close(router_gradients(model), expected / 2, rtol=1e-4, atol=1e-6)


def test_a_base_that_is_called_without_its_peft_model_follows_too() -> None:
    model = adapted(LINEAR["block"])
    expected = auxiliary_gradient(model)
    (model.get_base_model()(input_ids=TOKENS, labels=TOKENS).loss / 8).backward()
    torch.testing.assert_close(router_gradients(model), expected / 8, rtol=1e-4, atol=1e-6)


def trained_gradient(trainer_of: Callable[..., Any], batch: int, steps: int, **options: Any) -> Tensor:
    """Router gradients that arrive at the optimiser when a trainer makes ``steps`` batches of ``batch`` rows one."""
    model = adapted(LINEAR["block"])
    found: list[Tensor] = []

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            found.append(router_gradients(model))

    options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 1}
    options |= {"max_grad_norm": 0, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    trainer_of(model, options | {"logging_strategy": "no"}, [Record()]).train()
    return found[0]


ROWS = Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in TOKENS])


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_trainers_weigh_accumulated_batches_as_one(
    trainer: str, reentrant: bool | None, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    def transformers_trainer(model: Any, options: dict[str, Any], callbacks: Any) -> Any:
        return Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=ROWS, callbacks=callbacks)

    def trl_trainer(model: Any, options: dict[str, Any], callbacks: Any) -> Any:
        arguments = SFTConfig(str(tmp_path), bf16=False, dataset_kwargs={"skip_prepare_dataset": True}, **options)
        return SFTTrainer(model, arguments, train_dataset=ROWS, processing_class=tiny_tokenizer, callbacks=callbacks)

    build = transformers_trainer if trainer == "transformers" else trl_trainer
    checkpointing: dict[str, Any] = {"gradient_checkpointing": reentrant is not None}
    if reentrant is not None:
        checkpointing["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    expected = auxiliary_gradient(adapted(LINEAR["block"]))
    for batch, steps in ((4, 1), (1, 4)):
        found = trained_gradient(build, batch, steps, **checkpointing)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_weight_in_cross_entropy_of_hand_values() -> None:
    """Two tokens of three count, with weight 0.3 each: 0.6 in all, whatever the labels and however sure the model."""
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0], [5.0, -5.0, 1.0]])
    p = torch.softmax(logits, -1)
    grad = 0.3 * (p - F.one_hot(torch.tensor([2, 1, 0]), 3))
    grad[2] = 0
    assert weight_in_cross_entropy(logits, grad).item() == pytest.approx(0.6, rel=1e-5)
    assert weight_in_cross_entropy(logits[None], grad[None] * 1024).item() == pytest.approx(0.6 * 1024, rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weight_in_cross_entropy_is_what_the_loss_was_multiplied_by(reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 11, generator=generator).requires_grad_()
    labels = torch.randint(0, 11, (2, 7), generator=generator)
    labels[0, :3] = -100
    loss = 3 * F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(loss, logits)
    expected = 3 * (1 if reduction == "mean" else 11)
    assert weight_in_cross_entropy(logits.detach(), grad).item() == pytest.approx(expected, rel=1e-4)


def test_weight_in_cross_entropy_of_no_gradient_is_nothing() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert weight_in_cross_entropy(logits, torch.zeros_like(logits)).item() == 0


# --- what must not change ---------------------------------------------------------------------------------------------


@every_configuration
def test_padding_is_not_counted(config: dict[str, Any]) -> None:
    model = adapted(config)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    other = TOKENS.clone()
    other[0, :3] = 3
    found = []
    for tokens in (TOKENS, other):
        model(input_ids=tokens, attention_mask=mask, labels=tokens.where(mask > 0, -100)).loss.backward()
        found.append(router_gradients(model))
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found)


@every_configuration
def test_the_reported_loss_is_the_models_own(config: dict[str, Any]) -> None:
    model = adapted(config)
    loss = own_loss(model, TOKENS)
    with model.disable_adapter():
        assert torch.equal(loss, own_loss(model, TOKENS))


@pytest.mark.parametrize("gating", [Threshold(balance=1.0), Soft(balance=1.0, z_loss=1.0)])
def test_nothing_is_injected_in_evaluation(gating: Gating) -> None:
    model = adapted({"gating": gating}).eval()
    own_loss(model, TOKENS).backward()
    assert router_gradients(model).abs().max() == 0


def test_logits_that_a_caller_scales_in_place_still_train() -> None:
    """As a temperature is applied; autograd forbids that for views that a function of ours made."""
    model = adapted(LINEAR["block"])
    logits = model(input_ids=TOKENS).logits
    logits /= 2
    F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    in_place = router_gradients(model)
    expected = auxiliary_gradient(model)
    assert F.cosine_similarity(in_place, expected, dim=0) > 0.999
