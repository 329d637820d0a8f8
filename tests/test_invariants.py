"""What must hold for every mixture on every family: one table of rows, every row through every check."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, build_family
from peft import PeftModel, get_peft_model
from torch import Tensor

import moa
from moa import (
    AdapterExpert,
    Copies,
    Ia3Expert,
    LoraExpert,
    ParallelExpert,
    PromptExpert,
    Router,
    Softmax,
    Threshold,
    TopK,
)

ALL_SEVEN = ["q", "k", "v", "o", "gate", "up", "down"]
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@dataclass(frozen=True)
class Row:
    """One configuration on one family."""

    family: str
    name: str
    config: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.family}-{self.name}"

    def make_config(self, **changes: Any) -> moa.MoAConfig:
        return moa.MoAConfig(**copy.deepcopy(self.config), **changes)


def mixture(**fields: Any) -> dict[str, Any]:
    return {"experts": [LoraExpert(r=3, alpha=6), PromptExpert(length=5), ParallelExpert(size=6)]} | fields


def copied(gating: Any, **fields: Any) -> dict[str, Any]:
    copies = Copies(3, gating=gating, **fields)
    experts = [LoraExpert(r=2, copies=copies), PromptExpert(length=2, copies=copies), ParallelExpert(4, copies=copies)]
    return {"experts": experts}


EVERY_MIXTURE: dict[str, dict[str, Any]] = {
    "soft": mixture(),
    "soft-linear": mixture(router=Router(hidden_per_expert=0)),
    "soft-attention-input": mixture(router=Router(input="attention")),
    "softmax": mixture(gating="softmax"),
    "topk": mixture(gating=TopK(k=5)),
    "frozen": mixture(gating=Threshold(train_threshold="frozen")),
    "straight-through": mixture(gating=Threshold(train_threshold="straight-through")),
    "shifted": mixture(gating=Threshold(train_threshold="shifted", gamma_max=0.8)),
    "closed-form": mixture(gating=Threshold(train_threshold="closed-form")),
    "constant": mixture(gating=Threshold(constant=True, gamma_max=0.1), router=Router(hidden_per_expert=0)),
    "renormalised": mixture(gating=Threshold(score="softmax", gamma_max=0.1, renormalise=True)),
    "instance": mixture(router=Router(level="instance")),
    "instance-attention-input": mixture(router=Router(level="instance", input="attention", hidden_per_expert=0)),
    "no-router": mixture(router=None),
    "all-seven-rslora": {"experts": [LoraExpert(targets=ALL_SEVEN, r=4, rslora=True)]},
    "two-ranks": {"experts": [LoraExpert(["q", "v"], r=2), LoraExpert(["q", "v"], r=5)]},
    "shared-gate": mixture(
        experts=[LoraExpert(gate="lora"), PromptExpert(length=3), ParallelExpert(size=4)], router=Router(0)
    ),
    "some-blocks": {"experts": [LoraExpert(layers=[1]), ParallelExpert(layers=[0]), PromptExpert(layers=[1])]},
    "ia3": {"experts": [Ia3Expert(), LoraExpert(["k", "down"], r=2)]},
    "ia3-copies": {"experts": [Ia3Expert(copies=Copies(3)), PromptExpert(length=3)], "gating": Threshold()},
    "adapter": {"experts": [AdapterExpert(size=6)]},
    "adapter-copies": {"experts": [AdapterExpert(size=4, copies=Copies(3, shared=True))], "gating": Threshold()},
    "adapter-beside-all": mixture(
        experts=[
            LoraExpert(r=3),
            PromptExpert(length=3),
            ParallelExpert(size=4),
            Ia3Expert(["v"]),
            AdapterExpert(size=5),
        ]
    ),
    "copies-softmax": copied(Softmax()),
    "copies-shared": copied(Softmax(), shared=True),
    "copies-threshold": copied(Threshold(gamma_max=1 / 3, score="softmax", train_threshold="shifted"), bias=True),
    "copies-topk": copied(TopK(k=2), bias=True) | {"router": None},
}


def family_rows(family: str) -> list[Row]:
    """Soft with everything the family can host, and sparse with all the projections it has."""
    traits = FAMILIES[family]
    attention = ["q", "k", "v", "o"]
    targets = [*attention, "down"] if traits.down else attention
    experts: list[Any] = [LoraExpert(targets, r=3), ParallelExpert(size=6)]
    widest = [*targets, "up"] if traits.down else targets
    prompt = [PromptExpert(length=4)] if traits.prompt else []
    hard = Threshold(train_threshold="straight-through")  # drops whole experts, and leaves each some token
    return [
        Row(family, "soft", {"experts": experts + prompt}),
        Row(family, "sparse", {"experts": [LoraExpert(widest, r=2), ParallelExpert()], "gating": hard}),
        Row(family, "instance", {"experts": experts + prompt, "router": Router(level="instance", input="attention")}),
    ]


ROWS = [Row("llama", name, config) for name, config in EVERY_MIXTURE.items()]
ROWS += [row for family in FAMILIES if family != "llama" for row in family_rows(family)]


@pytest.fixture(params=ROWS, ids=lambda row: row.id, scope="module")
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


@pytest.fixture(scope="module")
def base(row: Row) -> Any:
    return build_family(row.family)


@pytest.fixture(scope="module")
def model(row: Row) -> PeftModel:
    """The row's mixture with every adapter weight drawn at random, in eval mode."""
    return randomise(get_peft_model(build_family(row.family), row.make_config()))


def randomise(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".moa_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))


def positions(model: PeftModel, mask: Tensor) -> dict[str, Tensor]:
    """Positions that start at the first real token, for families that take them."""
    if "position_ids" not in inspect.signature(model.get_base_model().forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}


def logits(model: PeftModel, tokens: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    mask = torch.ones_like(tokens) if mask is None else mask
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=mask, **positions(model, mask), **kwargs).logits


def test_starts_as_the_base_model_bit_for_bit(row: Row, base: Any, tokens: Tensor) -> None:
    expected = logits_of_base(base, tokens)
    fresh = get_peft_model(build_family(row.family), row.make_config()).eval()
    assert torch.equal(logits(fresh, tokens), expected)


def test_disabled_is_the_base_model_bit_for_bit(model: PeftModel, base: Any, tokens: Tensor) -> None:
    expected = logits_of_base(base, tokens)
    assert not torch.allclose(logits(model, tokens), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), expected)


def logits_of_base(base: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return base(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def test_loads_what_it_saved(row: Row, model: PeftModel, tokens: Tensor, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_family(row.family), tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_a_deep_copy_is_independent_and_equal(model: PeftModel, tokens: Tensor) -> None:
    expected = logits(model, tokens)
    copied_model = copy.deepcopy(model)
    assert torch.equal(logits(copied_model, tokens), expected)
    with torch.no_grad():
        for parameter in copied_model.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, tokens), expected)


def test_no_token_moves_an_earlier_logit(model: PeftModel, tokens: Tensor) -> None:
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 7 - 3) % (VOCABULARY - 3) + 3
    before, after = logits(model, tokens), logits(model, changed)
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=2e-6)
    assert not torch.allclose(after[:, 5:], before[:, 5:], atol=1e-3)


def test_neighbours_in_the_batch_change_nothing(model: PeftModel, tokens: Tensor) -> None:
    together = logits(model, tokens)
    for index in range(len(tokens)):
        torch.testing.assert_close(logits(model, tokens[index : index + 1])[0], together[index], **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: PeftModel, tokens: Tensor, side: str) -> None:
    alone = logits(model, tokens[:1, :6])
    mask = torch.ones_like(tokens)
    padded = tokens.clone()
    text = slice(3, 9) if side == "left" else slice(0, 6)
    mask[0] = 0
    mask[0, text] = 1
    padded[0] = 0
    padded[0, text] = tokens[0, :6]
    torch.testing.assert_close(logits(model, padded, mask)[0, text], alone[0], **TOLERANCE)


@pytest.mark.parametrize("padding", [0, 3])
def test_cached_decoding_is_a_full_forward(model: PeftModel, tokens: Tensor, padding: int) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    full = logits(model, tokens, mask)
    place = positions(model, mask)
    cut = {name: value[:, :5] for name, value in place.items()}
    with torch.no_grad():
        out = model(input_ids=tokens[:, :5], attention_mask=mask[:, :5], use_cache=True, **cut)
        steps = [out.logits]
        for t in range(5, tokens.shape[1]):
            now = {name: value[:, t : t + 1] for name, value in place.items()}
            out = model(
                input_ids=tokens[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
                **now,
            )
            steps.append(out.logits)
    text = mask.bool()
    torch.testing.assert_close(torch.cat(steps, dim=1)[text], full[text], **TOLERANCE)


def test_every_trainable_tensor_gets_a_gradient(model: PeftModel, tokens: Tensor) -> None:
    for name, gradient in gradients(model, [tokens]).items():
        assert gradient is not None, f"{name} has no gradient"
        assert gradient.abs().max() > 0, f"{name} has a gradient of zeros"


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(row: Row, model: PeftModel, tokens: Tensor, reentrant: bool) -> None:
    """Also with two forwards alive at once, whose gates must not be mixed up in recomputation."""
    batches = [tokens, tokens.flip(0)[:2]]
    expected = gradients(model, batches)
    again = randomise(get_peft_model(build_family(row.family), row.make_config()))
    again.enable_input_require_grads()
    again.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, gradient in gradients(again, batches).items():
        torch.testing.assert_close(gradient, expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def gradients(model: PeftModel, batches: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of the summed loss of several forwards that are all alive before backward."""
    model.zero_grad()
    model.train()
    outputs = [
        model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch, use_cache=False)
        for batch in batches
    ]
    sum(out.loss for out in outputs).backward()
    model.eval()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_bfloat16_base_under_autocast(row: Row, tokens: Tensor) -> None:
    """A bf16 base with float32 adapters: finite, identical at the start, gradients in float32."""
    base = build_family(row.family, dtype=torch.bfloat16)
    expected = logits_of_base(base, tokens)
    model = get_peft_model(base, row.make_config()).eval()
    assert torch.equal(logits(model, tokens), expected)
    randomise(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, gradient in gradients(model, [tokens]).items():
            assert gradient.dtype == torch.float32, name
            assert torch.isfinite(gradient).all(), name


def test_recorded_gates_are_those_of_the_rule(row: Row, model: PeftModel, tokens: Tensor) -> None:
    """One column per expert; under a hard threshold exact zeros below it and the plain score above."""
    with moa.gate_values(model) as record:
        logits(model, tokens)
    gating = row.make_config().gating
    hard = getattr(gating, "train_threshold", None) in ("frozen", "straight-through")
    for block, gates in record.gates.items():
        assert gates.shape == (*tokens.shape, len(record.columns[block]))
        threshold = record.thresholds[block]
        assert (threshold is None) == (not isinstance(gating, Threshold))
        if hard:
            assert threshold is not None
            kept = gates != 0
            assert (gates >= threshold)[kept].all()
