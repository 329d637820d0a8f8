"""The prompt's attention: one formula in three ways, its derivatives, and kept keys that follow changed weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, build_family
from peft import PeftModel, get_peft_model
from test_invariants import randomise
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import moa
from moa.adapters.low_rank import FEW_TOKENS
from moa.adapters.prompt_attention import KeptPrompt, Prompt, add_prompt, prompt_alone

TOKENS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
SHAPES = {
    "one head per key": (2, 3, 4, 4),
    "shared keys": (2, 3, 4, 2),
    "one key": (1, 5, 4, 1),
    "one token": (3, 1, 2, 1),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def draw(*shape: int, seed: int, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def arguments(shape: tuple[int, int, int, int], grad: bool = True) -> tuple[Tensor, ...]:
    """Output, query, key, value and head gates: width 6, value width 5, a prompt of 4."""
    batch, length, heads, kv_heads = shape
    output, query = draw(batch, length, heads, 5, seed=1, grad=grad), draw(batch, heads, length, 6, seed=2, grad=grad)
    key, value = draw(kv_heads, 4, 6, seed=3, grad=grad), draw(kv_heads, 4, 5, seed=4, grad=grad)
    return output, query, key, value, draw(heads, seed=5, grad=grad)


def by_hand(output: Tensor, query: Tensor, prompt: Prompt, scaling: float, weights: Tensor | None) -> Tensor:
    """Query by query."""
    batch, heads, length, _ = query.shape
    total = output.detach().clone()
    for b in range(batch):
        for head in range(heads):
            group = head * len(prompt.key) // heads
            for t in range(length):
                shares = torch.softmax(prompt.key[group] @ query[b, head, t] * scaling, dim=0)
                if weights is not None:
                    shares = shares * weights[b, t].repeat_interleave(len(shares) // weights.shape[-1])
                total[b, t, head] += prompt.head_gate[head] * shares @ prompt.value[group]
    return total


@every_shape
@pytest.mark.parametrize("copies", [0, 1, 2])
def test_every_way_is_the_formula(shape: tuple[int, int, int, int], copies: int) -> None:
    output, query, *prompt = arguments(shape, grad=False)
    prompt = Prompt(*prompt)
    weights = draw(shape[0], shape[1], copies, seed=6, grad=False) if copies else None
    expected = by_hand(output, query, prompt, 0.4, weights)
    before = output.clone()
    torch.testing.assert_close(add_prompt(output, query, prompt, 0.4, weights), expected)
    assert torch.equal(output, before)
    torch.testing.assert_close(output + prompt_alone(query, prompt, 0.4, weights), expected)
    if copies < 2:
        kept = KeptPrompt.of(prompt, 0.4)
        found = kept.add_to(output.float(), query.float(), None if weights is None else weights.float())
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [None, 1])
def test_an_output_that_is_not_contiguous_is_not_lost(weights: int | None) -> None:
    """Attention functions of others may put out any layout."""
    output, query, *prompt = arguments((2, 3, 4, 2), grad=False)
    gates = None if weights is None else draw(2, 3, 1, seed=6, grad=False)
    expected = by_hand(output, query, Prompt(*prompt), 0.4, gates)
    turned = output.transpose(1, 2).contiguous().transpose(1, 2)
    assert not turned.is_contiguous()
    with torch.no_grad():
        found = add_prompt(turned.clone(), query, Prompt(*prompt), 0.4, gates)
        few = KeptPrompt.of(Prompt(*prompt), 0.4).add_to(turned.clone(), query, gates)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(few, expected)


@pytest.mark.parametrize("copies", [0, 1])
def test_the_gradient_of_queries_lies_in_memory_as_queries_do(copies: int) -> None:
    output, query, *prompt = arguments((2, 3, 4, 2))
    query = draw(2, 3, 4, 6, seed=2).transpose(1, 2)
    weights = draw(2, 3, copies, seed=6) if copies else None
    total = add_prompt(output, query, Prompt(*prompt), 0.4, weights)
    (gradient,) = torch.autograd.grad(total.square().sum(), query)
    assert gradient.stride() == query.stride()
    plain = output + prompt_alone(query, Prompt(*prompt), 0.4, weights)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.square().sum(), query)[0])


def test_one_number_is_a_gate_too() -> None:
    output, query, *prompt = arguments((1, 1, 4, 2), grad=False)
    prompt = Prompt(*prompt)
    expected = by_hand(output, query, prompt, 0.4, torch.full((1, 1, 1), 0.3, dtype=torch.float64))
    found = KeptPrompt.of(prompt, 0.4).add_to(output.float(), query.float(), 0.3)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


@every_shape
@pytest.mark.parametrize("gated", [True, False])
def test_derivatives(shape: tuple[int, int, int, int], gated: bool) -> None:
    weights = draw(shape[0], shape[1], 1, seed=6) if gated else None

    def function(output: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, weights: Any) -> Tensor:
        return add_prompt(output, query, Prompt(key, value, gate), 0.4, weights)

    assert torch.autograd.gradcheck(function, (*arguments(shape), weights))


def test_a_second_derivative_is_refused() -> None:
    output, query, *prompt = arguments((1, 2, 2, 1))
    total = add_prompt(output, query, Prompt(*prompt), 0.4, None)
    (gradient,) = torch.autograd.grad(total.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_gradients_have_the_dtype_of_what_they_are_of(dtype: torch.dtype) -> None:
    tensors = [t.detach().to(dtype if i < 2 else torch.float32) for i, t in enumerate(arguments((2, 3, 4, 2)))]
    tensors = [t.requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        total = add_prompt(tensors[0], tensors[1], Prompt(*tensors[2:]), 0.4, None)
    assert total.dtype == dtype
    expected = by_hand(
        *arguments((2, 3, 4, 2), grad=False)[:2], Prompt(*arguments((2, 3, 4, 2), grad=False)[2:]), 0.4, None
    )
    torch.testing.assert_close(total.double(), expected, rtol=0.05, atol=0.05)
    for tensor, gradient in zip(tensors, torch.autograd.grad(total.float().sum(), tensors), strict=True):
        assert gradient.dtype == tensor.dtype


# --- keys that decoding keeps -----------------------------------------------------------------------------------------


def adapted(**fields: Any) -> PeftModel:
    settings = {"experts": [moa.PromptExpert(4), moa.LoraExpert(["q"], r=2)]} | fields
    return randomise(get_peft_model(build_family("llama"), moa.MoAConfig(**settings)))


def layer_of(model: PeftModel) -> Any:
    return model.get_base_model().model.layers[1].self_attn


def next_logits(model: PeftModel, cache: DynamicCache) -> Tensor:
    with torch.no_grad():
        return model(TOKENS[:1, cache.get_seq_length() :][:, :1], past_key_values=cache).logits


def started(model: PeftModel, length: int = 5) -> DynamicCache:
    cache = DynamicCache()
    with torch.no_grad():
        model(TOKENS[:1, :length], past_key_values=cache)
        model(TOKENS[:1, length : length + 1], past_key_values=cache)  # whatever is kept is kept by now
    return cache


def by_copy(tensor_of: Callable[[PeftModel], Tensor]) -> Callable[[PeftModel, Path], None]:
    def change(model: PeftModel, folder: Path) -> None:
        with torch.no_grad():
            tensor_of(model).copy_(-2 * tensor_of(model))

    return change


def by_state_dict(model: PeftModel, folder: Path) -> None:
    state = {name: -2 * t if ".moa_prompt." in name else t for name, t in model.state_dict().items()}
    model.load_state_dict(state)


def by_assignment(model: PeftModel, folder: Path) -> None:
    state = {name: -2 * t if ".moa_prompt." in name else t for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def by_an_optimiser(model: PeftModel, folder: Path) -> None:
    """Gradients of a second text, of which nothing is kept here."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()
    model(input_ids=TOKENS[1:], labels=TOKENS[1:], use_cache=False).loss.backward()
    optimiser.step()
    model.eval()


def by_another_adapter(model: PeftModel, folder: Path) -> None:
    model.add_adapter("other", moa.MoAConfig(experts=[moa.PromptExpert(6)], init_weights=False))
    model.set_adapter("other")


def by_the_old_name(model: PeftModel, folder: Path) -> None:
    other = adapted()
    with torch.no_grad():
        layer_of(other).mixture_prompt.moa_prompt["default"].weight.mul_(-2)
    other.save_pretrained(folder)
    model.delete_adapter("default")
    model.load_adapter(folder, "default")
    model.set_adapter("default")
    model.eval()


CHANGES: dict[str, Callable[[PeftModel, Path], None]] = {
    "prompt": by_copy(lambda model: layer_of(model).mixture_prompt.moa_prompt["default"].weight),
    "head gate": by_copy(lambda model: layer_of(model).mixture_prompt.moa_prompt["default"].head_gate),
    "k_proj": by_copy(lambda model: layer_of(model).k_proj.weight),
    "v_proj": by_copy(lambda model: layer_of(model).v_proj.weight),
    "load_state_dict": by_state_dict,
    "load_state_dict, assigned": by_assignment,
    "optimiser": by_an_optimiser,
    "set_adapter": by_another_adapter,
    "load_adapter under the old name": by_the_old_name,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_act_at_once_while_a_cache_goes_on(
    change: Callable[[PeftModel, Path], None], tmp_path: Path
) -> None:
    """The text's own keys stay those of the old weights; the prompt's are the new ones, as if nothing were kept."""
    model = adapted()
    cache = started(model)
    unchanged = next_logits(model, copy.deepcopy(cache))
    change(model, tmp_path)
    found = next_logits(model, copy.deepcopy(cache))
    for module in model.modules():
        if hasattr(module, "kept"):
            module.kept.clear()
    torch.testing.assert_close(found, next_logits(model, cache), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, unchanged, atol=1e-3)


@pytest.mark.parametrize("length", [5, FEW_TOKENS + 1])
def test_a_new_text_sees_changes_that_nothing_counts(length: int) -> None:
    """Averages of weights are swapped in past autograd, which then counts no change."""
    model = adapted()
    long = TOKENS[:1].repeat(1, 5)

    def second_token() -> Tensor:
        with torch.no_grad():
            cache = model(long[:, :length]).past_key_values
            return model(long[:, length : length + 1], past_key_values=cache).logits

    before = second_token()
    tokens = layer_of(model).mixture_prompt.moa_prompt["default"].weight
    tokens.data.copy_(-2 * tokens.data)
    found = second_token()
    assert not torch.allclose(found, before, atol=1e-3)
    with torch.no_grad():
        expected = model(long[:, : length + 1], use_cache=False).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_training_drops_what_decoding_kept() -> None:
    model = adapted()
    started(model)
    guests = [module for module in model.modules() if hasattr(module, "kept")]
    assert [list(guest.kept) for guest in guests] == [["default"]] * 2
    model.train()
    model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    assert not [guest for guest in guests if guest.kept]


@pytest.mark.parametrize("between", ["another cache", "no cache", "training"])
def test_texts_may_take_turns(between: str) -> None:
    model = adapted()
    expected = [next_logits(model, started(model)), next_logits(model, started(model, 6))]
    first, second = started(model), started(model, 6)
    if between == "no cache":
        with torch.no_grad():
            model(TOKENS)
    if between == "training":
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    found = [next_logits(model, first), next_logits(model, second)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_attention_function_that_others_put_in_place_is_called() -> None:
    model = adapted()
    with torch.no_grad():
        expected = model(TOKENS).logits
    calls: list[str] = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append("theirs")
        output, weights = original(*args, **kwargs)
        return output * 1.5, weights

    ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
    try:
        with torch.no_grad():
            changed = model(TOKENS).logits
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # a local entry; the library's own lies beneath
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is original
    assert calls == ["theirs"] * 2
    assert not torch.allclose(changed, expected, atol=1e-2)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected)
