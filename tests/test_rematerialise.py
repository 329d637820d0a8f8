"""Activations that are made again in backward: the same gradients to the bit, fewer bytes kept, and when not to."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, build_family
from peft import PeftModel, get_peft_model
from test_invariants import randomise
from torch import Tensor

import moa
from moa.adapters import block

TOKENS = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
NAMES = ["llama", "gemma3_text", "phi3", "gpt2", "olmo2", "mixtral"]
every_family = pytest.mark.parametrize("family", NAMES)


def adapted(family: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    targets = ["q", "k", "v", "o", *(["down"] if FAMILIES[family].down else [])]
    experts = [moa.LoraExpert(targets, r=3), moa.ParallelExpert(4), moa.PromptExpert(3)]
    return randomise(get_peft_model(build_family(family, dtype=dtype), moa.MoAConfig(experts=experts))).train()


@contextlib.contextmanager
def keeping_everything(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(block, "rematerialised", contextlib.nullcontext)
        yield


def gradients(model: PeftModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def saved_bytes(model: PeftModel) -> int:
    """Bytes of the distinct storages that autograd keeps, weights left out."""
    kept = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=TOKENS, use_cache=False)
    del output
    return sum(kept.values())


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_keeping_everything_bit_for_bit(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(family, dtype)
    found = gradients(model)
    with keeping_everything(monkeypatch):
        expected = gradients(model)
    assert_equal(found, expected)


@every_family
def test_fewer_bytes_are_kept(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(family)
    found = saved_bytes(model)
    with keeping_everything(monkeypatch):
        expected = saved_bytes(model)
    if family in ("mixtral", "gpt2"):  # the MLP is stacked experts' own, or its activation is a formula of its own
        assert found <= expected
    else:
        assert found < expected


@pytest.mark.parametrize("family", ["llama", "olmo2", "phi3"])
def test_what_an_expert_on_down_reads_is_not_kept(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two blocks, `silu(gate)` and `silu(gate) * up`: 3 * 9 tokens, 48 wide, 4 bytes each, exactly."""
    config = moa.MoAConfig(experts=[moa.LoraExpert(["down"], r=2)], router=None)
    model = randomise(get_peft_model(build_family(family), config)).train()
    found = saved_bytes(model)
    with keeping_everything(monkeypatch):
        expected = saved_bytes(model)
    # what comes before the first expert needs no gradient and is kept by nobody
    first = 3 * 9 * 48 * 4
    assert expected - found == 2 * first


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_keeps_its_own_hooks(family: str, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which count what is saved when a block is recomputed: the numbers of both runs have to agree."""
    expected = gradients(adapted(family))
    model = adapted(family)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    sizes = saved_bytes(model)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    with keeping_everything(monkeypatch):
        assert saved_bytes(model) == sizes
        torch.testing.assert_close(gradients(model), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_hooks_of_others_see_what_is_still_kept(family: str) -> None:
    """Offloading to the CPU gets the arguments of every recipe, and gives them back."""
    model = adapted(family)
    expected = gradients(model)
    with torch.autograd.graph.save_on_cpu():
        found = gradients(model)
    assert_equal(found, expected)
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or len(packed) - 1, packed.__getitem__):
        assert_equal(gradients(model), expected)
    assert packed


@pytest.mark.parametrize("backward", [1, 2])
def test_two_forwards_that_are_alive_together_make_their_own_again(backward: int) -> None:
    model = adapted("llama")

    def losses() -> list[Any]:
        return [model(input_ids=t, labels=t, use_cache=False).loss for t in (TOKENS, TOKENS.flip(1))]

    alone = []
    for loss in losses():
        model.zero_grad()
        loss.backward(retain_graph=True)
        if backward == 2:
            model.zero_grad()
            loss.backward()
        alone.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    first, second = losses()
    second.backward()
    first.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, alone[0][name] + alone[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["mlp.up_proj", "mlp.gate_proj", "self_attn.v_proj"])
def test_a_change_in_place_of_what_backward_needs_is_noticed(path: str) -> None:
    """As without our hooks, of what is made again and of what is kept: gradients of changed numbers would be wrong."""
    model = adapted("llama")
    seen: list[Tensor] = []
    layer = model.get_base_model().model.layers[0].get_submodule(path)
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    with torch.no_grad():
        seen[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("path", ["mlp", "input_layernorm"])
def test_what_was_changed_without_autograd_is_kept_and_not_made_again(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a hook that silences part of an activation, say: gradients are those of the changed numbers."""
    model = adapted("llama")

    def halve(*tensors: Any) -> None:
        with torch.no_grad():
            (tensors[-1][0] if path == "mlp" else tensors[-1]).mul_(0.5)

    for layer in model.get_base_model().model.layers:
        if path == "mlp":
            layer.mlp.down_proj.register_forward_pre_hook(halve)
        else:
            layer.input_layernorm.register_forward_hook(halve)
    found = gradients(model)
    with keeping_everything(monkeypatch):
        expected = gradients(model)
    assert_equal(found, expected)


def test_a_forward_without_backward_leaves_nothing() -> None:
    """What is kept must not hold the graph that holds it."""
    model = adapted("llama")
    seen: list[weakref.ref[Tensor]] = []

    def note(module: Any, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append(weakref.ref(output))

    for module in model.get_base_model().model.layers.modules():
        module.register_forward_hook(note)
    output = model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    del output
    gc.collect()
    assert len(seen) > 10
    assert not [ref for ref in seen if ref() is not None]
