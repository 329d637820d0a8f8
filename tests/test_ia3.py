"""The (IA)^3 expert: what its file promises beyond the contract that every expert kind is tested for."""

import pytest
import torch
from families import build_family
from peft import PeftModel, get_peft_model

import moa

FAMILIES = ["llama", "phi3", "gpt_neox"]  # separate projections, and two layouts of fused ones
IDS = torch.arange(14).reshape(2, 7)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def adapted(base, **fields):
    experts = fields.pop("experts", [moa.Ia3Expert()])
    torch.manual_seed(1)
    return get_peft_model(base, moa.MoAConfig(experts=experts, **fields)).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("copies", [1, 3])
def test_starts_as_the_base_model_bit_for_bit(family, copies):
    model = adapted(build_family(family), experts=[moa.Ia3Expert(copies=copies)])
    assert torch.equal(logits(model), logits(build_family(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_every_parameter(family):
    model = adapted(build_family(family), experts=[moa.Ia3Expert(copies=2)], init_weights=False)
    model(IDS, labels=IDS).loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("moa_scale" in name for name in trainable)
    assert [name for name, p in trainable.items() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_rescales_its_own_part_and_nothing_else(family):
    """Against the arithmetic: rows of k and v times (1 + d), columns of down's weight times (1 + d), no router."""
    model = adapted(build_family(family), router=None, init_weights=False)
    expected = build_family(family)
    for block, twin in zip(blocks(model.get_base_model()), blocks(expected), strict=True):
        for name, module in block.named_modules():
            if "mixture_ia3" not in name or not hasattr(module, "moa_scale"):
                continue
            change = 1 + module.moa_scale["default"].weight.detach()[0]
            projection = twin.get_submodule(name.rpartition(".")[0])
            if name.endswith("down"):
                projection.weight.data *= change
            else:
                rows = rows_of(expected.config, name[-1], projection.weight.shape[0])
                projection.weight.data[rows] *= change[:, None]
                if projection.bias is not None:
                    projection.bias.data[rows] *= change
    assert not torch.equal(logits(expected), logits(build_family(family)))
    torch.testing.assert_close(logits(model), logits(expected))


def blocks(model):
    return model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers


def rows_of(config, part, total):
    """Rows of k or v in a projection's output, written down per family."""
    width, heads = 8, 4
    if config.model_type == "gpt_neox":  # for every head: query, key, value
        start = {"k": width, "v": 2 * width}[part]
        return [head * 3 * width + start + i for head in range(heads) for i in range(width)]
    kv = 2 * width
    if total == kv:  # not fused
        return list(range(kv))
    start = heads * width + {"k": 0, "v": kv}[part]
    return list(range(start, start + kv))


def test_gates_scale_the_change():
    """With the router's output layer at zero weight, a bias of minus or plus 200 closes or opens every gate."""
    model = adapted(build_family("llama"), init_weights=False)
    ungated = adapted(build_family("llama"), router=None, init_weights=False)
    ungated.load_state_dict({name: model.state_dict()[name] for name in ungated.state_dict()})
    for module in model.modules():
        if hasattr(module, "moa_w2"):
            module.moa_w2["default"].weight.data.zero_()
            module.moa_w2["default"].bias.data.fill_(-200)
    torch.testing.assert_close(logits(model), logits(build_family("llama")))
    for module in model.modules():
        if hasattr(module, "moa_w2"):
            module.moa_w2["default"].bias.data.fill_(200)
    torch.testing.assert_close(logits(model), logits(ungated))


def test_gate_columns_are_named_after_its_targets():
    model = adapted(build_family("llama"), experts=[moa.LoraExpert(targets=["k"]), moa.Ia3Expert()])
    with moa.gate_values(model) as record:
        logits(model)
    assert record.experts == ["k", "ia3_k", "ia3_v", "ia3_down"]


def test_small_changes_survive_a_bf16_base():
    """Beside bf16 activations the factor 1 + d stays float32: 1 + 0.003 would round to 1."""
    base = build_family("llama", dtype=torch.bfloat16)
    model = adapted(base, experts=[moa.Ia3Expert(targets=["down"])], router=None, init_weights=False)
    layer = next(m for m in model.modules() if hasattr(m, "moa_scale"))
    assert layer.moa_scale["default"].weight.dtype == torch.float32
    layer.moa_scale["default"].weight.data.fill_(0.003)
    seen = []
    layer.host.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    with model.disable_adapter():
        logits(model)
    rescaled, plain = seen
    assert rescaled.dtype == torch.bfloat16
    assert not torch.equal(rescaled, plain)


def test_saves_and_loads(tmp_path):
    model = adapted(
        build_family("llama"), experts=[moa.Ia3Expert(copies=2), moa.PromptExpert(length=3)], init_weights=False
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build_family("llama"), tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ["q"]}, "targets='q' is not one of"),
        ({"targets": []}, "must be a list"),
        ({"targets": "k"}, "must be a list"),
        ({"targets": ["k", "k"]}, "twice"),
        ({"copies": {"number": 2, "shared": True}}, "no first matrix to share"),
    ],
)
def test_refuses_what_it_cannot_do(fields, message):
    with pytest.raises(ValueError, match=message):
        moa.Ia3Expert(**fields)
