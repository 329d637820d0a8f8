"""The adapter behind attention: its arithmetic against hooks of this test, and that nobody outside knows its kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build_family
from peft import get_peft_model
from tiny import perturb, tiny_llama, tiny_moa
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers.activations import ACT2FN

import moa
from moa.adapters.experts.adapter import ACTIVATIONS
from moa.adapters.members import experts_of, mixtures_of
from moa.inspection.similarity import similarity
from moa.studies.methods import Method
from moa.studies.sizing import Size, variants

IDS = torch.arange(3, 31).reshape(2, 14)
OUTPUT_ELSEWHERE = {"bloom": "adds the residual stream itself"}


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def by_hand(gates: dict[int, Tensor], weights: dict[str, Tensor]) -> Any:
    """A hook on attention that adds ``g * (U silu(D y + b) + c)`` to what it puts out, written down once more."""

    def hook_of(block: int) -> Any:
        down, bias, up, shift = (weights[f"{block}.{name}"] for name in ("down", "bias", "up", "shift"))

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            y = y + gates[block] * (linear(silu(linear(y, down, bias)), up) + shift[0])
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    return hook_of


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "falcon", "gptj", "opt", "mpt", "mixtral"])
def test_adds_a_bottleneck_of_what_attention_puts_out(family: str):
    config = moa.MoAConfig(experts=[moa.AdapterExpert(size=5)])
    model = perturb(get_peft_model(build_family(family), config)).eval()
    with moa.gate_values(model) as record:
        actual = logits(model)
    assert record.experts == ["adapter"]
    weights, handles = {}, []
    base = build_family(family)
    names = {id(module): name for name, module in model.get_base_model().named_modules()}
    for mixture in mixtures_of(model):
        (layer,) = experts_of(mixture, "default")
        down, up = layer.moa_down["default"], layer.moa_up["default"]
        own = {"down": down.weight, "bias": down.bias, "up": up.weight, "shift": up.bias}
        weights |= {f"{mixture.index}.{name}": tensor.detach() for name, tensor in own.items()}
        hook = by_hand(record.gates, weights)(mixture.index)
        handles.append(base.get_submodule(names[id(layer.host)]).register_forward_hook(hook))
    assert not torch.allclose(actual, logits(build_family(family)), atol=1e-2)
    torch.testing.assert_close(actual, logits(base), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sits_in_every_family_whose_attention_puts_out_its_own(family: str):
    config = moa.MoAConfig(experts=[moa.AdapterExpert(size=4)])
    if family in OUTPUT_ELSEWHERE:
        with pytest.raises(
            ValueError, match=f"the adapter expert cannot sit at 'attention'.*{OUTPUT_ELSEWHERE[family]}"
        ):
            get_peft_model(build_family(family), config)
        return
    fresh = get_peft_model(build_family(family), config).eval()
    assert torch.equal(logits(fresh), logits(build_family(family)))
    model = perturb(fresh).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0] == []


def test_two_in_one_place_come_one_after_the_other_also_for_few_tokens_in_bfloat16():
    """The second reads what the first has changed, though it is the same place in memory."""
    config = moa.MoAConfig(experts=[moa.AdapterExpert(size=4), moa.AdapterExpert(size=3)], router=None)
    model = perturb(get_peft_model(tiny_llama(num_hidden_layers=1).to(torch.bfloat16), config)).eval()
    seen: list[Tensor] = []
    attention = model.get_base_model().model.layers[0].self_attn
    attention.o_proj.register_forward_hook(lambda module, args, output: seen.append(output.clone().float()))
    attention.register_forward_hook(lambda module, args, output: seen.append(output[0].clone().float()))
    logits(model, IDS[:1, :1])
    y, expected = seen[0], seen[0]
    for layer in experts_of(mixtures_of(model)[0], "default"):
        down, up = layer.moa_down["default"], layer.moa_up["default"]
        y = y + linear(silu(linear(y, down.weight, down.bias)), up.weight, up.bias[0])
    assert not torch.allclose(y, expected, atol=0.1)
    torch.testing.assert_close(seen[1], y, atol=0.02, rtol=0.02)


def both() -> Any:
    return moa.MoAConfig(experts=[moa.LoraExpert(targets=["o"], r=2), moa.AdapterExpert(size=4, copies=3)])


def test_the_inspector_compares_it_and_its_copies():
    found, _ = similarity(tiny_moa(both()), "default", [row.tolist() for row in IDS])
    named = {(entry.block, entry.site): entry.names for entry in found}
    assert named[0, None] == ["o", "adapter"]
    assert named[1, "adapter"] == ["adapter/0", "adapter/1", "adapter/2"]
    assert all(value is not None for entry in found for row in entry.cka for value in row)


def test_a_study_grows_it():
    method = Method.from_tree("m", {"preset": "parallel-adapter", "experts": [{"kind": "adapter", "size": 4}]})
    (sizable,) = variants(method.section, method.grow, 2)
    assert [(part.name, part.configured) for part in sizable.parts] == [("adapter size", 4)]
    experts = sizable.section([Size(6, raised=1)])["experts"]
    assert [(expert["kind"], expert["size"], expert["layers"]) for expert in experts] == [
        ("adapter", 7, [0]),
        ("adapter", 6, [1]),
    ]


def test_the_official_code_has_none():
    with pytest.raises(ValueError, match="no expert like this model's 'adapter'"):
        moa.load_reference(tiny_moa(both()), {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "adapter expert: size=0 is outside"),
        ({"activation": "sillu"}, "adapter expert: activation='sillu'"),
    ],
)
def test_refuses_what_it_cannot_be(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        moa.AdapterExpert(**fields)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_have_no_weights_that_nobody_would_save(name: str):
    activation = ACT2FN[name]
    assert not [*getattr(activation, "parameters", list)()]
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert activation(x.bfloat16()).dtype == torch.bfloat16
