"""Low-rank reads and in-place writes: plain formulas, finite differences, and what may be changed in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import VOCABULARY, build_family
from peft import PeftModel, get_peft_model
from test_invariants import mixture, randomise
from torch import Tensor, nn
from transformers import DynamicCache

import moa
from moa.adapters.low_rank import (
    FEW_TOKENS,
    Part,
    add_product,
    changeable,
    narrow,
    read,
    spread,
    tiled,
    weighted,
    widen,
)
from moa.adapters.low_rank import write as write_update

TOKENS = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
QUANTITIES = [3, FEW_TOKENS, FEW_TOKENS + 1]

# q of a concatenated q, k, v of 4, 2 and 2 columns; k of a layout by heads, (heads, (q, k, v), width).
PARTS: dict[str, Part | None] = {"all": None, "concatenated": Part(1, 8, 0, 4), "per_head": Part(2, 3, 1, 2)}
WIDTHS = {"all": 6, "concatenated": 8, "per_head": 12}
OURS = {"all": 6, "concatenated": 4, "per_head": 4}
every_part = pytest.mark.parametrize("part", PARTS)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tensor.to(dtype).requires_grad_(grad)


def columns(part: str) -> list[int]:
    """Which columns of the output are meant, counted by hand."""
    return {"all": [*range(6)], "concatenated": [0, 1, 2, 3], "per_head": [2, 3, 8, 9]}[part]


def plain(y: Tensor, inner: Tensor, matrix: Tensor, scaling: float, part: str) -> Tensor:
    update = torch.zeros_like(y)
    update[..., columns(part)] = scaling * (inner.to(y.dtype) @ matrix.to(y.dtype).T)
    return y + update


# --- read -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", QUANTITIES)
@pytest.mark.parametrize("ranks", [[2], [2, 1, 3]])
def test_reading_is_a_product_with_every_matrix(n: int, ranks: list[int]) -> None:
    x, matrices = draw(n, 5, seed=0), [draw(rank, 5, seed=1 + i) for i, rank in enumerate(ranks)]
    found = read(x, matrices, torch.float64)
    assert [tuple(low.shape) for low in found] == [(n, rank) for rank in ranks]
    for low, matrix in zip(found, matrices, strict=True):
        torch.testing.assert_close(low, x @ matrix.T)


@pytest.mark.parametrize("n", QUANTITIES)
@pytest.mark.parametrize("ranks", [[2], [2, 1, 3]])
def test_derivatives_of_reading(n: int, ranks: list[int]) -> None:
    matrices = [draw(rank, 5, seed=1 + i) for i, rank in enumerate(ranks)]

    def function(x: Tensor, *matrices: Tensor) -> tuple[Tensor, ...]:
        return tuple(read(x, matrices, torch.float64))

    assert torch.autograd.gradcheck(function, (draw(1, n, 5, seed=0), *matrices), fast_mode=n > 3)


def test_reading_what_needs_no_gradient_trains_the_matrices() -> None:
    x, a = draw(2, 3, 5, seed=0, grad=False), draw(2, 5, seed=1)
    (low,) = read(x, [a], torch.float64)
    low.square().sum().backward()
    (expected,) = torch.autograd.grad((x @ a.T).square().sum(), a)
    torch.testing.assert_close(a.grad, expected)


def test_reading_in_a_narrower_dtype_keeps_the_input_as_it_came() -> None:
    """So that no cast of it is kept besides; gradients have the dtype of what they are of."""
    x, a = draw(4, 6, seed=0, dtype=torch.float32), draw(2, 6, seed=1, dtype=torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        (low,) = read(x, [a], torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert any(t.data_ptr() == x.data_ptr() for t in kept)
    assert not [t for t in kept if t.shape == x.shape and t.dtype == torch.bfloat16]
    low.float().sum().backward()
    assert (x.grad.dtype, a.grad.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(a.grad, x.detach().sum(0).expand(2, 6), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("n", [1, FEW_TOKENS - 1, FEW_TOKENS, FEW_TOKENS + 1, 100])
def test_both_orders_of_factors_are_one_product(n: int) -> None:
    x, a = draw(n, 6, seed=1), draw(3, 6, seed=2)
    torch.testing.assert_close(narrow(x, a), x @ a.T)


# --- write ------------------------------------------------------------------------------------------------------------


@every_part
@pytest.mark.parametrize("grad", [True, False])
def test_writing_adds_the_scaled_product_to_its_columns(part: str, grad: bool) -> None:
    y, inner, matrix = draw(2, 3, WIDTHS[part], seed=0), draw(2, 3, 2, seed=1), draw(OURS[part], 2, seed=2)
    expected = plain(y, inner, matrix, 0.7, part)
    with torch.set_grad_enabled(grad):
        found = write_update(y * 1, inner, matrix, 0.7, PARTS[part])
    torch.testing.assert_close(found, expected)


@every_part
@pytest.mark.parametrize("n", [3, FEW_TOKENS + 1])
def test_derivatives_of_writing(part: str, n: int) -> None:
    inputs = (draw(1, n, WIDTHS[part], seed=0), draw(1, n, 2, seed=1), draw(OURS[part], 2, seed=2))

    def function(y: Tensor, inner: Tensor, matrix: Tensor) -> Tensor:
        return write_update(y * 2, inner, matrix, 0.7, PARTS[part])

    assert torch.autograd.gradcheck(function, inputs, fast_mode=n > 3)


@every_part
@pytest.mark.parametrize("bias", [True, False])
def test_derivatives_behind_a_layer(part: str, bias: bool) -> None:
    """A layer with a bias puts out a view where its input has three dimensions."""
    layer = nn.Linear(5, WIDTHS[part], bias=bias, dtype=torch.float64).requires_grad_(False)
    x, inner, matrix = draw(2, 3, 5, seed=0), draw(2, 3, 2, seed=1), draw(OURS[part], 2, seed=2)

    def function(x: Tensor, inner: Tensor, matrix: Tensor) -> Tensor:
        y = write_update(layer(x), inner, matrix, 0.7, PARTS[part])
        return write_update(y, inner.square(), matrix, 1.3, PARTS[part]).sin()

    assert torch.autograd.gradcheck(function, (x, inner, matrix))
    expected = plain(plain(layer(x), inner, matrix, 0.7, part), inner.square(), matrix, 1.3, part).sin()
    torch.testing.assert_close(function(x, inner, matrix), expected)


def test_derivatives_of_a_whole_bottleneck() -> None:
    layer = nn.Linear(5, 6, bias=False, dtype=torch.float64).requires_grad_(False)
    inputs = (draw(2, 3, 5, seed=0), draw(2, 5, seed=1), draw(6, 2, seed=2), draw(2, 3, 1, seed=3))

    def function(x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
        (low,) = read(x, [a], torch.float64)
        return write_update(layer(x), weighted(low, gate), b, 0.7, None)

    assert torch.autograd.gradcheck(function, inputs)
    x, a, b, gate = inputs
    torch.testing.assert_close(function(*inputs), layer(x) + 0.7 * gate * (x @ a.T @ b.T))


@pytest.mark.parametrize("bias", [True, False])
def test_a_layers_output_is_changed_in_place_where_it_can_be(bias: bool) -> None:
    x, layer = draw(4, 5, seed=0), nn.Linear(5, 6, bias=bias, dtype=torch.float64).requires_grad_(False)
    y = layer(x)
    assert changeable(y)
    found = write_update(y, draw(4, 2, seed=1), draw(6, 2, seed=2), 1.0, None)
    assert found.data_ptr() == y.data_ptr()


def test_what_backward_looks_at_is_left_alone() -> None:
    """The derivative of a sigmoid is made of what it put out; of a view, the base belongs to somebody else."""
    x, inner, matrix = draw(4, 6, seed=0), draw(4, 2, seed=1), draw(6, 2, seed=2)
    for function in (torch.sigmoid, torch.tanh, torch.exp, lambda x: (x * 2).view(2, 2, 6).view(4, 6)):
        y = function(x)
        assert not changeable(y)
        before = y.detach().clone()
        found = write_update(y, inner, matrix, 0.5, None)
        assert torch.equal(y.detach(), before)
        expected = function(x) + 0.5 * inner @ matrix.T
        torch.testing.assert_close(found, expected)
        ours = torch.autograd.grad(found.square().sum(), (x, inner, matrix))
        theirs = torch.autograd.grad(expected.square().sum(), (x, inner, matrix))
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their)


def test_a_leaf_that_is_trained_is_not_overwritten() -> None:
    """As if somebody's layer hands its own parameter through."""
    leaf = draw(4, 6, seed=0)
    before = leaf.detach().clone()
    found = write_update(leaf, draw(4, 2, seed=1), draw(6, 2, seed=2), 1.0, None)
    found.sum().backward()
    assert torch.equal(leaf.detach(), before)
    torch.testing.assert_close(leaf.grad, torch.ones_like(leaf))


@pytest.mark.parametrize("function", ["read", "write"])
def test_a_second_derivative_is_refused(function: str) -> None:
    x, a = draw(3, 5, seed=0), draw(2, 5, seed=1)
    output = (
        read(x, [a], torch.float64)[0]
        if function == "read"
        else write_update(x * 1, draw(3, 2, seed=2), a.T, 1.0, None)
    )
    (gradient,) = torch.autograd.grad(output.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@every_part
def test_widening_puts_zeros_beside_a_part(part: str) -> None:
    delta = draw(2, 3, OURS[part], seed=0)
    expected = torch.zeros(2, 3, WIDTHS[part], dtype=torch.float64)
    expected[..., columns(part)] = delta
    assert torch.equal(widen(delta, PARTS[part]), expected)
    if PARTS[part] is not None:
        assert torch.equal(PARTS[part].of(expected).reshape(delta.shape), delta)


def test_copies_share_and_weigh_a_bottleneck() -> None:
    inner, weights = draw(2, 3, seed=0), draw(2, 2, seed=1)
    by_hand = torch.cat([weights[:, :1] * inner, weights[:, 1:] * inner], dim=-1)
    torch.testing.assert_close(weighted(tiled(inner, 6), weights), by_hand)
    assert torch.equal(spread(weights, 4), weights[:, [0, 0, 1, 1]])
    assert weighted(inner, None) is inner
    assert tiled(inner, 3) is inner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_over_a_float32_base(dtype: torch.dtype) -> None:
    """Layers put out bfloat16 there, experts' weights are float32: the update is bfloat16's, gradients are float32."""
    x, a, b = (draw(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(4, 8), (2, 8), (6, 2)]))
    layer = nn.Linear(8, 6, bias=False, dtype=dtype).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.to(dtype))
        assert y.dtype == torch.bfloat16
        (low,) = read(x.to(dtype), [a], y.dtype)
        found = write_update(y, low, b, 0.5, None)
    assert found.dtype == torch.bfloat16
    expected = F.linear(x, layer.weight.float()) + 0.5 * x @ a.T @ b.T
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.15)
    ours = torch.autograd.grad(found.float().square().sum(), (x, a, b))
    theirs = torch.autograd.grad(expected.square().sum(), (x, a, b))
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == torch.float32
        assert F.cosine_similarity(our.flatten(), their.flatten(), dim=0) > 0.99


def test_adding_without_gradients_allocates_nothing_of_full_width() -> None:
    y, inner, matrix = (draw(*shape, seed=i, grad=False) for i, shape in enumerate([(4, 6), (4, 2), (6, 2)]))
    expected = y + 0.5 * inner @ matrix.T
    place = y.data_ptr()
    with torch.no_grad():
        add_product(y, inner, matrix, 0.5, None)
        torch.testing.assert_close(y, expected)
        assert write_update(y, inner, matrix, -0.5, None).data_ptr() == place
    torch.testing.assert_close(y, expected - 0.5 * inner @ matrix.T)


# --- in a model -------------------------------------------------------------------------------------------------------


def adapted(family: str = "llama", **fields: Any) -> PeftModel:
    return randomise(get_peft_model(build_family(family), moa.MoAConfig(**mixture(**fields))))


@pytest.mark.parametrize("training", [True, False])
def test_users_hooks_on_a_projection_see_its_whole_output(training: bool) -> None:
    """Hooks that came before the adapter see the base's output, later ones what is adapted, and may replace it."""
    base = build_family("llama")
    layer = base.model.layers[0].self_attn.q_proj
    early: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: early.append(output.detach().clone()))  # before ours
    model = randomise(get_peft_model(base, moa.MoAConfig(**mixture()))).train(training)
    late: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: late.append(output.detach().clone()))
    with torch.set_grad_enabled(training):
        before = model(TOKENS, use_cache=False).logits
        assert len(early) == len(late) == 2  # of the text, and of the prompt's tokens
        assert early[0].shape == late[0].shape == (3, 9, 32)
        assert not torch.allclose(early[0], late[0], atol=1e-2)
        assert torch.equal(early[1], late[1])
        handle = layer.register_forward_hook(lambda module, args, output: output * 0)
        assert not torch.allclose(model(TOKENS, use_cache=False).logits, before, atol=1e-2)
        handle.remove()
        assert torch.equal(model(TOKENS, use_cache=False).logits, before)


def test_hooks_that_come_in_the_middle_of_a_generation_run() -> None:
    """On the host, and on the expert's own layers, whose call is otherwise spared for few tokens."""
    model = adapted()
    block = model.get_base_model().model.layers[0]
    hosts = {
        "host": block.self_attn.q_proj,
        "expert": block.self_attn.q_proj.mixture_q.moa_A["default"],
        "router": block.mixture.moa_w2["default"],
        "parallel": block.mlp.mixture_parallel.moa_down["default"],
    }
    with torch.no_grad():
        cache = DynamicCache()
        model(TOKENS[:1, :5], past_key_values=cache)
        for index, (name, module) in enumerate(hosts.items(), start=5):
            expected = model(TOKENS[:1, : index + 1], use_cache=False).logits[:, -1]
            calls: list[str] = []
            handle = module.register_forward_hook(lambda *_, name=name, calls=calls: calls.append(name))
            found = model(TOKENS[:1, index : index + 1], past_key_values=cache).logits[:, -1]
            handle.remove()
            assert calls == [name]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_an_adapted_projection_is_the_plain_formula(family: str) -> None:
    """One LoRA without a router on each of q, k, v: the base's weights with the products added, however it is fused."""
    fields = {"experts": [moa.LoraExpert(["q", "k", "v"], r=3, alpha=6)], "router": None}
    model = randomise(get_peft_model(build_family(family), moa.MoAConfig(**fields)))
    found = model(TOKENS, use_cache=False).logits
    base = build_family(family)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, a in weights.items():
            if ".moa_A." not in name:
                continue
            host, site = name.removeprefix("base_model.model.").split(".mixture_")
            layer, delta = base.get_submodule(host), 2 * weights[name.replace("moa_A", "moa_B")] @ a
            weight = layer.weight.T if layer.weight.shape[0] == 32 and family == "gpt2" else layer.weight
            weight[rows_of(family, site[0])] += delta
        torch.testing.assert_close(found, base(TOKENS, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def rows_of(family: str, site: str) -> list[int]:
    """Rows of a projection's weight that hold q, k or v: 4 heads of 8, of which phi3's keys have 2."""
    if family == "llama":
        return [*range(32 if site == "q" else 16)]
    if family == "gpt_neox":  # by heads
        return [24 * head + 8 * "qkv".index(site) + i for head in range(4) for i in range(8)]
    widths = [32, 16, 16] if family == "phi3" else [32, 32, 32]
    first = sum(widths[: "qkv".index(site)])
    return [*range(first, first + widths["qkv".index(site)])]


def many_and_few(model: PeftModel) -> tuple[Tensor, Tensor]:
    """Logits of a short text with gradients, which takes the way of many tokens, and without."""
    with torch.no_grad():
        few = model(TOKENS[:1, :1], use_cache=False).logits
    return model(TOKENS[:1, :1], use_cache=False).logits.detach(), few


@pytest.mark.parametrize("how", ["in place", "past autograd", "moved", "replaced", "loaded", "cast"])
def test_weights_that_change_between_tokens_are_followed(how: str) -> None:
    model = adapted(gating=moa.Soft()).eval()
    before, _ = many_and_few(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.mixture_q.moa_B["default"]
    with torch.no_grad():
        new = layer.weight * 20
        if how == "in place":
            layer.weight.copy_(new)
        elif how == "past autograd":
            layer.weight.data.copy_(new)
        elif how == "moved":
            layer.weight.data = new
        elif how == "replaced":
            layer.weight = nn.Parameter(new)
        elif how == "loaded":
            layer.load_state_dict({"weight": new}, assign=True)
        else:
            layer.to(torch.float64).weight.copy_(new)
    many, few = many_and_few(model)
    assert not torch.allclose(many, before, atol=1e-3)
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-4)


def test_an_output_that_is_not_contiguous_gets_its_update() -> None:
    """Quantised and patched layers may put out any layout."""
    model = adapted(experts=[moa.LoraExpert(["q"], r=2)]).eval()
    expected, _ = many_and_few(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    plain = type(layer).forward
    layer.forward = lambda x: plain(layer, x).expand(2, -1, -1).transpose(1, 2).contiguous().transpose(1, 2)[:1]
    many, few = many_and_few(model)
    torch.testing.assert_close(many, expected)
    torch.testing.assert_close(few, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_autocast_decodes_as_it_reads_a_text(family: str) -> None:
    model = adapted(family).eval()
    with torch.no_grad():
        exact = model(TOKENS, use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16):
            few = model(TOKENS, use_cache=False).logits
            many = model(TOKENS.repeat(2, 1), use_cache=False).logits[:3]
    assert 2 * TOKENS.numel() > FEW_TOKENS >= TOKENS.numel()
    torch.testing.assert_close(few, many, rtol=0.05, atol=0.05)
    torch.testing.assert_close(few.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_few_and_many_tokens_agree(family: str) -> None:
    """Decoding takes another way through the experts than a whole text does."""
    model = adapted(family, gating=moa.Threshold())
    long = TOKENS.repeat(1, 5)
    assert long.numel() > FEW_TOKENS
    with torch.no_grad():
        many = model(long, use_cache=False).logits
        few = torch.cat([model(row[None, :9], use_cache=False).logits for row in long])
        model.train()
        no_gradients = model(long, use_cache=False).logits
    with_gradients = model(long, use_cache=False).logits
    torch.testing.assert_close(few, many[:, :9], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(no_gradients, many, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(with_gradients, many, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_full_width_is_kept_for_an_update(family: str, dtype: torch.dtype) -> None:
    """What an expert on o keeps beside the base: its input, which attention keeps anyway, and narrow tensors."""
    fields = {"experts": [moa.LoraExpert(["o"], r=2, layers=[0])], "router": None}
    model = randomise(get_peft_model(build_family(family, dtype=dtype), moa.MoAConfig(**fields))).train()
    kept: list[Tensor] = []
    layer = model.get_base_model().model.layers[0].self_attn.o_proj
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    block = model.get_base_model().model.layers[0]
    block.mixture.open(x, [], (), {})
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    block.mixture.context.close()
    own = {p.data_ptr() for p in model.parameters()} | {x.data_ptr()}
    others = [tuple(t.shape) for t in kept if t.data_ptr() not in own and t.shape != layer.weight.T.shape]
    assert all(2 in shape for shape in others), others


@pytest.mark.parametrize("names", [None, ["default", "__base__", "default"]], ids=["alone", "mixed batch"])
def test_a_look_at_a_projection_without_gradients_takes_none_away(names: list[str] | None) -> None:
    """A hook that logs what queries are, say, before attention computes them with gradients."""
    model = adapted(router=moa.Router(input="block"))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(TOKENS, use_cache=False, adapter_names=names).logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def look(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            attention.q_proj(kwargs["hidden_states"])

    expected = gradients()
    for block in model.get_base_model().model.layers:
        block.self_attn.register_forward_pre_hook(look, with_kwargs=True)
    found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 9], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("names", [False, True], ids=["alone", "mixed batch"])
def test_what_a_hook_changes_in_place_is_what_experts_read(dtype: torch.dtype, rows: int, names: bool) -> None:
    """As if it had put another tensor there."""
    fields = mixture(router=moa.Router(input="attention"))
    model = randomise(get_peft_model(build_family("llama", dtype=dtype), moa.MoAConfig(**fields)))
    ids = TOKENS[:1].repeat(rows, 1)
    expected, found = (
        hooked(model, ids, steer, ["default"] * rows if names else None) for steer in (steered, steered_in_place)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, hooked(model, ids, lambda x: x, None), atol=0.1)


def steered(x: Tensor) -> Tensor:
    return x + 0.7


def steered_in_place(x: Tensor) -> Tensor:
    return x.add_(0.7)


def hooked(model: PeftModel, ids: Tensor, steer: Any, names: list[str] | None) -> Tensor:
    """Logits while something is done to what attention reads, after the router has."""

    def before(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"hidden_states": steer(kwargs["hidden_states"])}

    blocks = model.get_base_model().model.layers
    handles = [block.self_attn.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        logits = model(ids, use_cache=False, adapter_names=names).logits
    for handle in handles:
        handle.remove()
    return logits
