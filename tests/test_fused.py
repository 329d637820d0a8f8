"""Blocks computed as a whole: numbers of the general path, derivatives by finite differences, and when not to."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from families import VOCABULARY, build_family
from peft import get_peft_model
from test_invariants import mixture, randomise
from torch import Tensor
from transformers import DynamicCache

import moa
from moa.adapters import fused
from moa.adapters.fused.attention import AttentionOutput, Output
from moa.adapters.fused.elementwise import Rotate, signed
from moa.adapters.fused.low_rank import FEW_TOKENS, Update, narrow
from moa.adapters.fused.mlp import GatedMlp, Mlp
from moa.adapters.fused.parts import FAMILIES, Unfit, parts_of
from moa.adapters.fused.projections import NormProject, Projections
from moa.adapters.gating import GATINGS, Soft, Threshold

TOKENS = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
FAMILY_NAMES = [module.split(".")[2] for module in FAMILIES]
EVERYTHING = mixture(
    experts=[
        moa.LoraExpert(["q", "k", "v", "o", "gate", "up", "down"], r=3),
        moa.PromptExpert(4),
        moa.ParallelExpert(6),
    ]
)
MIXTURES = {
    "everything": EVERYTHING,
    "sparse": mixture(gating=Threshold(train_threshold="straight-through")),
    "linear-sparse": mixture(gating=Threshold(), router=moa.Router(hidden_per_expert=0)),
    "ungated": mixture(router=None),
    "no-bias": mixture(router=moa.Router(bias=False)),
    "only-prompt": {"experts": [moa.PromptExpert(3)]},
    "only-parallel": {"experts": [moa.ParallelExpert(3)]},
    "only-k": {"experts": [moa.LoraExpert(["k"], r=2, rslora=True)]},
}


def build(family: str, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    return randomise(get_peft_model(build_family(family).to(dtype), moa.MoAConfig(**copy.deepcopy(config))))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one name for every block that is computed as a whole."""
    calls: list[str] = []
    for module, name in ((fused.training, "with gradients"), (fused.inference, "without")):

        def forward(*args: Any, _forward: Any = module.forward, _name: str = name) -> Tensor:
            result = _forward(*args)
            calls.append(_name)
            return result

        monkeypatch.setattr(module, "forward", forward)
    return calls


def outputs(model: Any, enabled: bool, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    with fused.fused_blocks(enabled):
        model.zero_grad()
        result = model(input_ids=TOKENS, attention_mask=mask, labels=TOKENS, use_cache=False)
        result.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return result.logits.detach(), gradients


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_logits_and_gradients_are_those_of_the_general_path(family: str, name: str, computed: list[str]) -> None:
    model = build(family, MIXTURES[name]).train()
    mask = torch.ones_like(TOKENS)
    mask[1, :4] = 0
    logits, gradients = outputs(model, True, mask)
    assert computed == ["with gradients"] * 2
    expected, expected_gradients = outputs(model, False, mask)
    assert len(computed) == 2
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-3, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[key], gradient, rtol=2e-3, atol=2e-3 * scale, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_decoding_is_that_of_the_general_path(family: str, name: str, computed: list[str]) -> None:
    model = build(family, MIXTURES[name])
    found = {}
    for rows in (1, 3):
        for enabled in (True, False):
            with fused.fused_blocks(enabled), torch.no_grad():
                cache = DynamicCache()
                steps = [model(TOKENS[:rows, :5], past_key_values=cache).logits]
                steps += [model(TOKENS[:rows, i : i + 1], past_key_values=cache).logits for i in range(5, 9)]
            found[enabled] = torch.cat(steps, dim=1)
        torch.testing.assert_close(found[True], found[False], rtol=1e-3, atol=1e-4)
    assert computed == ["without"] * 20


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_before_training_the_output_is_the_bases_to_the_bit(family: str, computed: list[str]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = build_family(family).to(dtype)
        with torch.no_grad():
            expected = base(TOKENS).logits
        model = get_peft_model(base, moa.MoAConfig(**copy.deepcopy(EVERYTHING)), autocast_adapter_dtype=True)
        with torch.no_grad():
            assert torch.equal(model(TOKENS).logits, expected)
        assert torch.equal(model(TOKENS).logits, expected)
    assert computed == ["without", "without", "with gradients", "with gradients"] * 2


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bf16_base_is_as_precise_as_on_the_general_path(autocast: bool, computed: list[str]) -> None:
    """Both are compared with float32; what the fused block may lose is what bf16 loses anyway."""
    model = build("llama", mixture(), torch.bfloat16).train()
    exact = build("llama", mixture())
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    expected, expected_gradients = outputs(exact, False)
    errors = {}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for enabled in (True, False):
            logits, gradients = outputs(model, enabled)
            worst = max(float((gradients[k].float() - g).norm() / g.norm()) for k, g in expected_gradients.items())
            errors[enabled] = float((logits.float() - expected).norm() / expected.norm()), worst
    assert len(computed) == 2
    assert errors[True][0] < max(2 * errors[False][0], 0.02)
    assert errors[True][1] < max(2 * errors[False][1], 0.2)


def test_autocast_over_a_float32_base_takes_the_general_path(computed: list[str]) -> None:
    model = build("llama", mixture())
    with torch.autocast("cpu", torch.bfloat16):
        model(TOKENS)
        with torch.no_grad():
            model(TOKENS)
    assert not computed


# --- derivatives ------------------------------------------------------------------------------------------------------


def draw(*shape: int, seed: int, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def layers(outs: list[int], updates: list[Update | None], bias: bool = False) -> Projections:
    weights = [draw(out, 6, seed=10 + i, grad=False) for i, out in enumerate(outs)]
    biases = [draw(out, seed=20 + i, grad=False) if bias else None for i, out in enumerate(outs)]
    a = [draw(2, 6, seed=30 + i) for i, update in enumerate(updates) if update]
    b = [draw(out, 2, seed=40 + i) for i, (out, update) in enumerate(zip(outs, updates, strict=True)) if update]
    return Projections(weights, biases, updates, a, b)


NORM = draw(6, seed=1, grad=False).abs()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [3, FEW_TOKENS + 1])
def test_derivatives_of_the_projections(gated: bool, tokens: int) -> None:
    updates = [Update(0.7, 1), None, Update(1.3, 0)] if gated else [Update(0.7, None), None, Update(1.3, None)]
    qkv = layers([6, 4, 4], updates, bias=True)
    gates = draw(tokens, 3, seed=2) if gated else None

    def function(h: Tensor, gates: Tensor | None, *ab: Tensor) -> Any:
        return NormProject.apply(h, NORM, 1e-6, gates, qkv, *ab)

    assert torch.autograd.gradcheck(function, (draw(1, tokens, 6, seed=3), gates, *qkv.a, *qkv.b), fast_mode=True)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("prompt", [True, False])
def test_derivatives_of_the_attention_output(gated: bool, prompt: bool) -> None:
    site = Output(draw(6, 8, seed=1, grad=False), None, Update(0.7, 1 if gated else None), 0 if gated else None, 0.4)
    gates = draw(6, 2, seed=2) if gated else None
    tensors = (draw(2, 3, 2, seed=4), draw(2, 3, 2, seed=5), draw(4, seed=6)) if prompt else (None, None, None)

    def function(h: Tensor, query: Tensor, output: Tensor, gates: Tensor | None, *trained: Any) -> Tensor:
        return AttentionOutput.apply(h, query, output, gates, site, *trained)

    inputs = (draw(2, 3, 6, seed=7), draw(2, 3, 4, 2, seed=8), draw(2, 3, 4, 2, seed=9), gates)
    assert torch.autograd.gradcheck(function, (*inputs, *tensors, draw(2, 8, seed=10), draw(6, 2, seed=11)))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("down", [True, False])
def test_derivatives_of_the_mlp(gated: bool, parallel: bool, down: bool) -> None:
    inner = layers([5, 5], [Update(0.7, 0 if gated else None), None])
    update = Update(1.3, 1 if gated else None) if down else None
    site = Mlp(inner, draw(6, 5, seed=1, grad=False), draw(6, seed=2, grad=False), update, 2 if gated else None)
    adapter = [draw(2, 6, seed=3), draw(2, seed=4), draw(6, 2, seed=5), draw(6, seed=6)] if parallel else []
    ab = [draw(2, 5, seed=7), draw(6, 2, seed=8)] if down else []
    gates = draw(6, 3, seed=9) if gated else None

    def function(h: Tensor, gates: Tensor | None, *trained: Tensor) -> Tensor:
        return GatedMlp.apply(h, NORM, 1e-6, gates, site, parallel, *trained)

    assert torch.autograd.gradcheck(function, (draw(2, 3, 6, seed=10), gates, *adapter, *ab, *inner.a, *inner.b))


def test_derivatives_of_the_rotation() -> None:
    cos, sin = draw(1, 3, 1, 4, seed=1, grad=False), draw(1, 3, 1, 4, seed=2, grad=False)
    inputs = (draw(2, 3, 4, 4, seed=3), draw(2, 3, 2, 4, seed=4), cos, signed(sin))
    assert torch.autograd.gradcheck(Rotate.apply, inputs)


def test_a_second_derivative_is_refused() -> None:
    model = build("llama", mixture())
    loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    parameter = next(p for p in model.parameters() if p.requires_grad)
    (gradient,) = torch.autograd.grad(loss, parameter, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("n", [1, FEW_TOKENS - 1, FEW_TOKENS, 100])
def test_both_orders_of_factors_are_one_product(n: int) -> None:
    x, a = draw(n, 6, seed=1), draw(3, 6, seed=2)
    torch.testing.assert_close(narrow(x, a), x @ a.T)


# --- when not to, and what must not be kept ---------------------------------------------------------------------------


def reason(model: Any) -> str:
    with pytest.raises(Unfit) as error:
        parts_of(model.get_submodule("base_model.model.model.layers.0"), "default")
    return str(error.value)


def test_what_others_do_with_a_block_is_respected(computed: list[str]) -> None:
    model = build("llama", mixture())
    block = model.get_submodule("base_model.model.model.layers.0")
    seen: list[Tensor] = []
    handle = block.mlp.gate_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    model(TOKENS)
    assert len(seen) == 1
    assert "hook" in reason(model)
    assert computed == ["with gradients"]  # the other block
    handle.remove()
    block.mlp.up_proj.weight.requires_grad_(True)
    assert "trained" in reason(model)
    block.mlp.up_proj.weight.requires_grad_(False)
    block.mlp.up_proj = torch.nn.Sequential(block.mlp.up_proj)
    assert "plain linear" in reason(model)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (mixture(experts=[moa.Ia3Expert()]), "do not know"),
        (mixture(experts=[moa.LoraExpert(["q"]), moa.LoraExpert(["q"])]), "several"),
        (mixture(experts=[moa.LoraExpert(["q"], copies=2)]), "copies"),
        (mixture(experts=[moa.LoraExpert(["q"], dropout=0.5)]), "dropout"),
        (mixture(experts=[moa.ParallelExpert(activation="gelu")]), "gelu"),
    ],
)
def test_experts_that_run_on_the_general_path(config: dict[str, Any], words: str) -> None:
    assert words in reason(build("llama", config).train())


def test_other_families_run_on_the_general_path(computed: list[str]) -> None:
    model = build("gemma2", mixture())
    model(TOKENS)
    assert not computed
    assert "not in the table" in reason(model)


def test_attentions_can_still_be_asked_for(computed: list[str]) -> None:
    model = build("llama", mixture())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(TOKENS, output_attentions=True).attentions
    assert [tuple(a.shape) for a in found] == [(3, 4, 9, 9)] * 2


def test_a_changed_adapter_is_noticed_while_a_cache_is_in_use() -> None:
    model = build("llama", mixture())
    model.add_adapter("other", moa.MoAConfig(**copy.deepcopy(MIXTURES["ungated"])))
    randomise(model)

    def last_logits(start: str, end: str) -> Tensor:
        with torch.no_grad():
            cache = DynamicCache()
            model.set_adapter(start)
            model(TOKENS[:1, :8], past_key_values=cache)
            model.set_adapter(end)
            return model(TOKENS[:1, 8:], past_key_values=cache).logits

    with fused.fused_blocks(False):
        expected = last_logits("default", "other")
    found = last_logits("default", "other")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, last_logits("default", "default"), atol=1e-2)
    with torch.no_grad(), model.disable_adapter():
        expected = model(TOKENS[:1]).logits[:, -1:]
        cache = DynamicCache()
        model(TOKENS[:1, :8], past_key_values=cache)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(TOKENS[:1, 8:], past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_watched_router_is_watched_in_the_middle_of_a_generation() -> None:
    model = build("llama", mixture())
    with torch.no_grad():
        cache = DynamicCache()
        model(TOKENS[:1, :7], past_key_values=cache)
        with moa.gate_values(model) as record:
            model(TOKENS[:1, 7:], past_key_values=cache)
        with moa.gate_values(model) as whole:
            model(TOKENS[:1])
    torch.testing.assert_close(record.gates[1], whole.gates[1][:, 7:], rtol=1e-4, atol=1e-5)


def test_a_copied_or_saved_cache_leaves_prepared_weights_behind() -> None:
    model = build("llama", mixture())
    with torch.no_grad():
        cache = DynamicCache()
        model(TOKENS[:1, :8], past_key_values=cache)
        copied = copy.deepcopy(cache)
        file = io.BytesIO()
        torch.save(cache.__dict__["moa_prepared"], file)
        expected = model(TOKENS[:1, 8:], past_key_values=cache).logits
        assert len(cache.__dict__["moa_prepared"]) == 2
        assert len(copied.__dict__["moa_prepared"]) == 0
        assert file.tell() < 2000
        torch.testing.assert_close(model(TOKENS[:1, 8:], past_key_values=copied).logits, expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_an_expert_that_no_token_chose_is_not_computed(rows: int) -> None:
    """A weight that is not a number would spoil every output it takes part in."""
    model = build("llama", mixture(gating=Threshold(constant=True, gamma_max=0.3, train_threshold="frozen")))
    block = model.get_submodule("base_model.model.model.layers.0")
    with torch.no_grad():
        block.mixture.moa_w2["default"].weight.zero_()
        block.mixture.moa_w2["default"].bias.copy_(torch.tensor([9.0, -9, 9, -9, 9, -9, -9]))
        sites = {
            "k": block.self_attn.k_proj,
            "prompt": block.self_attn,
            "down": block.mlp.down_proj,
            "parallel": block.mlp,
        }
        for site, host in sites.items():
            for parameter in host._modules[f"mixture_{site}"].parameters():
                parameter.fill_(float("nan"))
        cache = DynamicCache()
        logits = model(TOKENS[:rows, :1], past_key_values=cache).logits
        assert logits.isfinite().all()
        with fused.fused_blocks(False):
            assert not model(TOKENS[:rows, :1]).logits.isfinite().all()


def test_fewer_activations_are_saved() -> None:
    model = build("llama", mixture()).train()

    def saved(enabled: bool) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with fused.fused_blocks(enabled), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = model(input_ids=TOKENS, use_cache=False).logits
        total = sum(kept.values())
        del result
        return total

    assert saved(True) < 0.8 * saved(False)


RULES: list[Any] = [Soft(), *(Threshold(train_threshold=name) for name in ("frozen", "shifted", "closed-form"))]
RULES += [Threshold(score="softmax", gamma_max=0.1), Threshold(constant=True), GATINGS["topk"](), GATINGS["softmax"]()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}-{getattr(rule, 'train_threshold', '')}")
def test_one_tokens_gates_are_those_of_the_tensor_rule(rule: Any) -> None:
    for seed in range(50):
        logits = (draw(6, seed=seed, grad=False) * 5).float()
        threshold = (draw(1, seed=seed + 100, grad=False) * 3).float()
        expected = rule(logits, threshold).weights
        torch.testing.assert_close(torch.tensor(rule.of_token(logits.tolist(), threshold.item())), expected)
